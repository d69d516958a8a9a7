"""GSPO: the ratio is that of the sequence, and so is the clipping (arXiv:2507.18071).

Changes one thing in GRPO: `clipped_surrogate(level="sequence")`, with the paper's narrow bounds, and
two updates per batch, without which there is nothing to clip.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.objective = [dict(name="clipped_surrogate", level="sequence", low=3e-4, high=4e-4)]
  config.rollout.updates = 2
  return config
