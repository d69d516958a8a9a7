"""EGPO: advantages weighed by certainty, and a push where all are wrong (arXiv:2602.22751).

Changes one thing in GRPO: baseline and scale give way to `advantages.weigh_by_certainty`. Ratios are
of tokens, as in the library that the paper used. Reported, pass@1 on MATH-500 and GSM8K: GRPO 67.2 and
71.7, EGPO 74.0 and 79.8 (Qwen2.5-Math-1.5B). Small-scale check: tests/methods/test_egpo.py.

The paper speaks of over-confident failures, but its clamp leaves them at weight 1 and softens unsure
ones only; this is the clamp. Deviations divide by n; the paper does not say.

Falls short of the card: the mirrored rule, which would weigh confident failures, is not offered, and how far
apart right and wrong answers are in entropy is logged but not compared.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.advantage = [dict(name="weigh_by_certainty", low=0.8, high=2.0, all_wrong=-1.0)]
  return config


def get_evidence():
  return dict(
      reported="MATH-500 / GSM8K pass@1 74.0 / 79.8, GRPO 67.2 / 71.7 (Qwen2.5-Math-1.5B)",
      arms=dict(
          grpo=dict(config="configs/grpo.py"),
          unweighted=dict(overrides={"advantage": [
              dict(name="weigh_by_certainty", low=1.0, high=1.0, all_wrong=-1.0)]})),
      claims=[
          dict(text="samples are better", metric="test/sampled_accuracy", expect="higher",
               baseline="grpo"),
          dict(text="weights add to the push where all are wrong", metric="test/sampled_accuracy",
               expect="higher", baseline="unweighted")])
