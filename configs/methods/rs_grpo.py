"""RS-GRPO: a group advantage that seeks risk (arXiv:2509.24261).

Changes one thing in GRPO: baseline and scale give way to `advantages.risk_seeking`. Reported: pass@1 /
pass@32 of 21.3 / 42.0, GRPO 21.4 / 37.5 (Qwen2.5-Math-1.5B, mean of six maths sets). Small-scale check:
tests/methods/test_rs_grpo.py.

The row asks whether GRPO's samples lose right answers that risk-seeking ones keep, on Countdown, where a
problem has many and the warm start writes one family of them. It is one value of beta, the recommended 2,
and 16 and 32 samples, not a curve; the card wants 0, 2 and 4. A group of one learns nothing here, where
the released code compares its sample with a reward of 0.
"""

from configs import grpo, countdown


def get_config():
  config = grpo.get_config()
  config.advantage = [dict(name="risk_seeking", beta=2.0)]
  return config


def get_evidence():
  return dict(
      reported="pass@1 / pass@32 21.3 / 42.0, GRPO 21.4 / 37.5 (Qwen2.5-Math-1.5B)",
      warm={**countdown.TASK, "sft.until.at_least": 0.4},
      overrides={"evaluate.samples": 32, "evaluate.k": 16, "rl.evaluate.every": 50},
      claims=[
          dict(text="more problems are solved within 16 samples", metric="test/pass_at_16",
               expect="higher", baseline="grpo"),
          dict(text="single samples are as good", joint=True, metric="test/sampled_accuracy",
               expect="not lower", margin=0.02, baseline="grpo"),
          dict(text="32 samples hold more different right answers", metric="test/distinct_right",
               expect="higher", baseline="grpo"),
          dict(text="the policy stays more uncertain", metric="late/entropy", expect="higher",
               baseline="grpo")])
