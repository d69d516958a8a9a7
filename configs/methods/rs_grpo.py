"""RS-GRPO: a group advantage that seeks risk (arXiv:2509.24261).

Changes one thing in GRPO: baseline and scale give way to `advantages.risk_seeking`. Reported: pass@1 /
pass@32 of 21.3 / 42.0, GRPO 21.4 / 37.5 (Qwen2.5-Math-1.5B, mean of six maths sets). Small-scale check:
tests/methods/test_rs_grpo.py.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.advantage = [dict(name="risk_seeking", beta=2.0)]
  return config


def get_evidence():
  return dict(
      reported="pass@1 / pass@32 21.3 / 42.0, GRPO 21.4 / 37.5 (Qwen2.5-Math-1.5B)",
      claims=[
          dict(text="more problems are solved within 8 samples", metric="test/pass_at_8",
               expect="higher", baseline="grpo"),
          dict(text="single samples are as good", metric="test/sampled_accuracy",
               expect="not lower", margin=0.02, baseline="grpo"),
          dict(text="the policy stays more uncertain", metric="late/entropy", expect="higher",
               baseline="grpo")])
