"""RLOO: the baseline of a sample is the mean of the others in its group (arXiv:2402.14740).

Changes the baseline (`advantages.leave_one_out`) and, as the paper does, takes sequences as single
actions without ratios. The KL to the warm start is in the reward. Reported: win rates of 77.9 against
67.6 of PPO (TL;DR, Pythia 6.9B).
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.advantage = [dict(name="penalise_kl", beta=0.01), dict(name="leave_one_out")]
  config.objective = [dict(name="reinforce")]
  config.aggregation.kind = "sequence_sum"
  return config
