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

The row asks whether some weight lambda of a soft penalty dominates, with answers as good and as often within
the budget: lambda is 0.03, 0.1 and 0.3, before the divergence in the loss. These arms report the share of
answers within the budget of 0.1 by a piece whose penalty of 1e-9 changes nothing. Falls short of the card: the
teacher is as large as the student and no better, as the student begins as a copy of it.
"""

from configs import grpo

PENALTY = 1.0
LAMBDAS = (0.03, 0.1, 0.3)


def get_config():
  config = grpo.get_config()
  config.advantage.insert(0, dict(name="constrain_divergence", budget=0.1, penalty=PENALTY))
  config.objective.append(dict(name="divergence_cost", penalty=PENALTY,
                               aggregation="sequence_mean"))
  return config


def get_evidence():
  scaled = [dict(name="center_by_group"), dict(name="scale_by_group_std")]

  def soft(weight):
    return dict(config="configs/grpo.py", overrides={
        "advantage": [dict(name="constrain_divergence", budget=0.1, penalty=1e-9, mode="keep"), *scaled],
        "objective": [dict(name="clipped_surrogate", low=0.2, high=0.2),
                      dict(name="kl", beta=weight, estimator="k2")]})
  grid = {f"soft_{weight:g}".replace(".", "_"): weight for weight in LAMBDAS}
  claims = [(dict(text=f"answers are as good as with a soft penalty of {weight:g}",
                  metric="test/sampled_accuracy", expect="not lower", margin=0.02, baseline=name),
             dict(text=f"and more often within the budget than with one of {weight:g}",
                  metric="late/within_budget", expect="higher", baseline=name))
            for name, weight in grid.items()]
  return dict(
      reported="satisfies constraints and reasons better than soft baselines; no figure read",
      overrides={"rl.evaluate.every": 50},
      arms=dict(
          **{name: soft(weight) for name, weight in grid.items()},
          no_budget=dict(overrides={"advantage": [
              dict(name="constrain_divergence", budget=1000.0, penalty=PENALTY), *scaled]})),
      claims=[
          *[claim for pair in claims for claim in pair],
          dict(text="nearer to the teacher than without a budget", metric="late/divergence",
               expect="lower", baseline="no_budget")])
