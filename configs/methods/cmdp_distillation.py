"""CMDP distillation: reward within a budget of divergence from the teacher (arXiv:2509.22921).

Changes two things in GRPO: `advantages.constrain_divergence` gives an answer that is over its
budget a penalty instead of its reward, and `objectives.divergence_cost` is the part of that
penalty's gradient that does not go through sampling; without it the rest still learns. Only the
abstract and a public discussion were read, so the form is a choice: KL(student || teacher) over the
vocabulary, its mean over the tokens of an answer, 0.1 nats, and -(1 + excess) beyond. The teacher
is the reference, here the warm start itself, so the budget need not be annealed; a larger one of another
run is `config.reference.source`, and a student that begins outside its budget gets
`budget=dict(schedule="linear", ...)`. Reported: better constraint
satisfaction and reasoning than soft Lagrangian baselines (Qwen2.5-Math-1.5B, Llama-3.2-3B), no
figure that was read. Small-scale check: tests/methods/test_cmdp_distillation.py.
"""

from configs import grpo

PENALTY = 1.0


def get_config():
  config = grpo.get_config()
  config.advantage.insert(0, dict(name="constrain_divergence", budget=0.1, penalty=PENALTY))
  config.objective.append(dict(name="divergence_cost", penalty=PENALTY,
                               aggregation="sequence_mean"))
  return config


def get_evidence():
  return dict(
      reported="satisfies constraints and reasons better than soft baselines; no figure read",
      arms=dict(
          soft=dict(config="configs/grpo.py", overrides={"objective": [
              dict(name="clipped_surrogate", low=0.2, high=0.2), dict(name="kl", beta=0.04)]}),
          no_budget=dict(overrides={"advantage": [
              dict(name="constrain_divergence", budget=1000.0, penalty=PENALTY),
              dict(name="center_by_group"), dict(name="scale_by_group_std")]})),
      claims=[
          dict(text="answers are better than with a soft penalty", metric="test/sampled_accuracy",
               expect="higher", baseline="soft"),
          dict(text="and nearer to the teacher than without a budget", metric="late/divergence",
               expect="lower", baseline="no_budget")])
