"""GMPO: the geometric mean of the token ratios (arXiv:2507.20673).

Changes one thing in GRPO: the objective (`objectives.geometric_mean`), with two updates per batch.
Reported: 4.1 points over GRPO on the mean of five maths sets (R1-Distill-Qwen-7B).
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.objective = [dict(name="geometric_mean", high=0.4)]
  config.rollout.updates = 2
  return config
