"""CMDP distillation: reward within a budget of divergence from the teacher (arXiv:2509.22921).

Changes two things in GRPO: `advantages.constrain_divergence` gives an answer that is over its
budget a penalty instead of its reward, and `objectives.divergence_cost` is the part of that
penalty's gradient that does not go through sampling; without it the rest still learns. Only the
abstract and a public discussion were read, so the form is a choice: KL(student || teacher) over the
vocabulary, its mean over the tokens of an answer, 0.1 nats, and -(1 + excess) beyond. The teacher
is the reference, here the warm start itself, so the budget need not be annealed; a student that
begins outside it gets `budget=dict(schedule="linear", ...)`. Reported: better constraint
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
