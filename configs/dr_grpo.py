"""Dr. GRPO: no division by the deviation of the group, none by the length (arXiv:2503.20783).

Changes two things in GRPO: the chain ends with `center_by_group`, and sums over tokens are divided by
a constant. Reported: AIME24 43.3 with a 7B base model in 27 hours on 8 A100.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.advantage = [dict(name="center_by_group")]
  config.aggregation.update(kind="constant", constant=8.0)  # rollout.max_tokens
  return config
