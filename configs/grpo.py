"""GRPO: a group of samples is its own baseline (arXiv:2402.03300).

The parent of most configs in `configs/methods`: the quickstart's task, model and warm start, then
reinforcement learning without the choices of later papers. Reported: GSM8K 82.9 -> 88.2, MATH 46.8 ->
51.7 (DeepSeekMath-Instruct 7B). The paper's KL term is `kl(beta=0.04)`; it is left out here, as most
later work does.
"""

from configs import quickstart


def get_config():
  config = quickstart.get_config()
  config.rollout.filter_zero_variance = False
  config.advantage = [dict(name="center_by_group"), dict(name="scale_by_group_std")]
  config.objective = [dict(name="clipped_surrogate", low=0.2, high=0.2)]
  config.aggregation.kind = "sequence_mean"
  config.rl.steps = 100
  config.rl.until = None
  return config
