"""REINFORCE: the policy gradient with no baseline but that of the batch (Williams, 1992).

Changes the baseline of GRPO to the mean of the batch, and drops ratios and clipping: one update per
batch, on-policy.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.advantage = [dict(name="center_by_batch")]
  config.objective = [dict(name="reinforce")]
  config.aggregation.kind = "sequence_sum"
  return config
