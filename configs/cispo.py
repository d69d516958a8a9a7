"""CISPO: importance weights are clipped, tokens are not (MiniMax-M1, arXiv:2506.13585).

Changes one thing in GRPO: the surrogate becomes `reinforce` with a weight that is held constant and at
most `importance_cap`, so every token keeps its gradient. The paper leaves the lower bound open and
tunes the upper one. Aggregation is over all tokens. Reported: twice the speed of DAPO to the same
AIME24 score (Qwen2.5-32B).
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.objective = [dict(name="reinforce", importance_cap=5.0)]
  config.aggregation.kind = "token_mean"
  config.rollout.updates = 2
  return config
