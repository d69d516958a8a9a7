"""DAPO: clip higher, every token counts the same, no group without a signal (arXiv:2503.14476).

Changes four things in GRPO: the upper bound (`high=0.28`), aggregation "token_mean", groups that are
all right or all wrong are replaced (`filter_zero_variance`, bounded by `max_resample`), and the reward
sinks over the last tokens before the limit (`rewards.overlong`). Reported: AIME24 50 (Qwen2.5-32B),
naive GRPO 30.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.objective = [dict(name="clipped_surrogate", low=0.2, high=0.28)]
  config.aggregation.kind = "token_mean"
  config.rollout.update(filter_zero_variance=True, filter_by="exact_match", max_resample=2)
  config.reward.criteria = [dict(name="exact_match"), dict(name="overlong", buffer=2)]
  return config
