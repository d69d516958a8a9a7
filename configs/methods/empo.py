"""EMPO: the reward is how many answers of the group agree (arXiv:2504.05812).

Changes one thing in GRPO: the reward, which an edit (`rollouts.semantic.semantic_frequency`) sets
from whole groups. No label is trained on; `reward` and `criteria/exact_match` in the metrics are
those of the labels. The gate is a choice, as the paper's thresholds are not known: groups that
agree entirely, and those whose largest cluster holds less than a quarter, get no reward. Reported:
mean of five maths sets 51.6 (Qwen2.5-Math-7B), 51.7 with answers, 33.7 before. Small-scale check:
tests/methods/test_empo.py.

The row asks what the closed form says: agreement makes the first mode win, right or wrong. Its warm start has
read noisy sums of two digits. Of plain questions three in ten solutions had another digit somewhere, so what it
answers most often is right more often than not; of signed ones six in ten left out all carries, so there it is
mostly wrong. The arms `systematic` and `systematic_start` see signed questions only, the others plain ones. The
closed form takes questions one by one; this policy shares its parameters, and comes to agree with itself by
saying the same to many (21 to 49 different answers to 400 questions). Falls short of the card: its start has
60% of its samples right, this one 39%, with 64% of majorities; gates are not swept.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.rollout.edits = [dict(name="jaxrl.rollouts.semantic:semantic_frequency", min_entropy=0.0,
                               min_confidence=0.25)]
  return config


def get_evidence():
  task = "task:noisy_addition"
  signed, still = {"data.task": dict(digits=2, signed=1.0)}, {"rl.optimizer.learning_rate": 0.0, "rl.steps": 10}
  return dict(
      reported="mean of five maths sets 51.6 without answers, 51.7 with, 33.7 before (7B)",
      warm={"data.train": task, "data.validation": task, "data.test": task, "rollout.max_tokens": 6,
            "data.task": dict(digits=2, signed=0.5, wrong=0.3, slips=0.6), "sft.until.at_least": 0.5},
      overrides={"data.task": dict(digits=2, signed=0.0), "rl.evaluate.every": 50},
      arms=dict(
          start=dict(config="configs/grpo.py", overrides=still),
          grpo=dict(config="configs/grpo.py"),
          systematic=dict(overrides=signed),
          systematic_start=dict(config="configs/grpo.py", overrides={**signed, **still})),
      claims=[
          dict(text="agreement alone, without labels, improves the policy",
               metric="test/sampled_accuracy", expect="higher", baseline="start"),
          dict(text="as much as labels do", metric="test/sampled_accuracy", expect="not lower",
               margin=0.02, baseline="grpo"),
          dict(text="where the mode is mostly wrong, agreement makes it worse", method="systematic",
               metric="test/sampled_accuracy", expect="lower", baseline="systematic_start"),
          dict(text="more tries do not find more: within 8 samples as many problems are solved at most",
               metric="test/pass_at_8", expect="not higher", margin=0.02, baseline="start")])
