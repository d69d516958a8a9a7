"""EMPO: the reward is how many answers of the group agree (arXiv:2504.05812).

Changes one thing in GRPO: the reward, which an edit (`rollouts.semantic.semantic_frequency`) sets
from whole groups. No label is trained on; `reward` and `criteria/exact_match` in the metrics are
those of the labels. The gate is a choice, as the paper's thresholds are not known: groups that
agree entirely, and those whose largest cluster holds less than a quarter, get no reward. Reported:
mean of five maths sets 51.6 (Qwen2.5-Math-7B), 51.7 with answers, 33.7 before. Small-scale check:
tests/methods/test_empo.py.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.rollout.edits = [dict(name="jaxrl.rollouts.semantic:semantic_frequency", min_entropy=0.0,
                               min_confidence=0.25)]
  return config


def get_evidence():
  return dict(
      reported="mean of five maths sets 51.6 without answers, 51.7 with, 33.7 before (7B)",
      arms=dict(
          start=dict(config="configs/grpo.py", overrides={"rl.optimizer.learning_rate": 0.0}),
          grpo=dict(config="configs/grpo.py")),
      claims=[
          dict(text="agreement alone, without labels, improves the policy",
               metric="test/sampled_accuracy", expect="higher", baseline="start"),
          dict(text="as much as labels do", metric="test/sampled_accuracy", expect="not lower",
               margin=0.02, baseline="grpo")])
