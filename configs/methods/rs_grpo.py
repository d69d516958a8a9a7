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
