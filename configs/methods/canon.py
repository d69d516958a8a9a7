"""CANON: halves of a group decide whether more entropy pays (arXiv:2509.23962).

Changes one thing in Dr. GRPO with clip-higher: the baseline (`advantages.contrast_halves`), which
compares every response with the half of its group that has the lower, or higher, entropy. `mu=1` is
CANON-Inter, 0 CANON-Intra, "1 - reward" First-Inter-Later-Intra; `metric="length"` with `alpha=0.9`
shortens answers. Reported (Qwen2.5-Math-7B), mean of six maths sets: Dr. GRPO 55.7, CANON-Inter
57.6, GRPO 53.8; with length and alpha 45.5% fewer tokens at equal performance. Small-scale check:
tests/methods/test_canon.py.

The released code puts alpha on other sides for entropy than for length; here it is on the half that
`disfavour` names. Groups have 8 responses instead of 16.

The row asks of entropy alone; that length with alpha makes answers shorter is not measured.
"""

from configs import dr_grpo


def get_config():
  config = dr_grpo.get_config()
  config.advantage = [dict(name="contrast_halves", metric="entropy", mu=1.0)]
  config.objective = [dict(name="clipped_surrogate", low=0.2, high=0.28)]
  return config


def get_evidence():
  return dict(
      reported="mean of six maths sets 57.6, Dr. GRPO 55.7 (Qwen2.5-Math-7B)",
      arms=dict(  # of equal halves, mu=0.5 is Dr. GRPO
          dr_grpo=dict(overrides={"advantage": [
              dict(name="contrast_halves", metric="entropy", mu=0.5)]}),
          intra=dict(overrides={"advantage": [
              dict(name="contrast_halves", metric="entropy", mu=0.0)]})),
      claims=[
          dict(text="comparing halves with each other answers better",
               metric="test/sampled_accuracy", expect="higher", baseline="dr_grpo"),
          dict(text="and better than comparing within halves", metric="test/sampled_accuracy",
               expect="higher", baseline="intra")])
