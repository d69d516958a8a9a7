"""From runs of a method and its baseline, one per seed, to a verdict."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

RULE = ("A claim compares a method with a baseline on the same seeds. With d the mean over seeds of "
        "(method - baseline) and I its 95% interval (Student's t over seeds): *confirmed* if all of I "
        "lies on the claimed side of 0 (for \"not lower\" and \"not higher\": of the margin beyond "
        "0), *contradicted* if all of it lies on the other side, else *no difference*. A method's "
        "verdict is that of its first claim, or the worst of that and of those that the paper claims with "
        "it in one breath, marked *and*.")
WORST_FIRST = ("contradicted", "no difference", "confirmed")
EXPECTATIONS = ("higher", "lower", "not lower", "not higher")
# Two-sided 95% quantiles of Student's t, by degrees of freedom from 1 on; beyond, the normal one.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
       2.052, 2.048, 2.045, 2.042)


@dataclasses.dataclass(frozen=True)
class Claim:
  """What a card says will be seen.

  Attributes:
    text: in words.
    metric: of the runs, as in `runs.metrics_of`.
    expect: one of `EXPECTATIONS`, of the method against the baseline.
    baseline: name of the arm that it is compared with.
    method: name of the arm that is compared.
    margin: for "not lower" and "not higher": a difference that does not matter, at least 0.
    joint: whether the first claim means little without this one, as "shorter" without "as often right".
  """

  text: str
  metric: str
  expect: str
  baseline: str
  method: str = "method"
  margin: float = 0.0
  joint: bool = False

  def __post_init__(self):
    if self.expect not in EXPECTATIONS:
      raise ValueError(f"claim {self.text!r}: expect={self.expect!r} is none of "
                       f"{', '.join(EXPECTATIONS)}")
    if self.margin < 0 or (self.margin and not self.expect.startswith("not ")):
      raise ValueError(f"claim {self.text!r}: margin={self.margin} must be at least 0, and only "
                       "'not lower' and 'not higher' have one")


def interval(values: Sequence[float]) -> tuple[float, float]:
  """Mean and half of the 95% interval of the mean; infinite for fewer than two values."""
  values = np.asarray(values, np.float64)
  mean = float(values.mean())
  if len(values) < 2:
    return mean, math.inf
  t = T95[len(values) - 2] if len(values) - 2 < len(T95) else 1.96
  return mean, float(t * values.std(ddof=1) / math.sqrt(len(values)))


def judge(claim: Claim, method: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
  """A claim's entry in the results.

  Args:
    method, baseline: one value per seed, in the same order of seeds.

  Raises:
    ValueError: another number of seeds, or none; a run in which there was nothing to measure.
  """
  for name, values in ((claim.method, method), (claim.baseline, baseline)):
    if not np.all(np.isfinite(values)):
      raise ValueError(f"claim {claim.text!r}: {claim.metric} is {list(values)} in the runs of "
                       f"{name!r}, and a claim needs a finite number of each; look at their samples, "
                       "or claim something that is always there")
  if len(method) != len(baseline) or not len(method):
    raise ValueError(f"claim {claim.text!r} compares {len(method)} runs with {len(baseline)}: both "
                     "arms need a run for each seed")
  mean, half = interval(np.subtract(method, baseline))
  sign = -1 if claim.expect in ("lower", "not higher") else 1
  slack = claim.margin if claim.expect.startswith("not ") else 0.0
  centre = sign * mean + slack
  if centre - half > 0 or (slack > 0 and centre - half >= 0):
    verdict = "confirmed"
  elif centre + half < 0:
    verdict = "contradicted"
  else:
    verdict = "no difference"

  def arm(values):
    mean, half = interval(values)
    return {"mean": mean, "interval": None if math.isinf(half) else half,
            "runs": [float(v) for v in values]}
  return {"text": claim.text, "metric": claim.metric, "expect": claim.expect,
          "margin": claim.margin, "joint": claim.joint, "baseline_name": claim.baseline,
          "baseline": arm(baseline), "method": arm(method), "difference": mean,
          "difference_interval": None if math.isinf(half) else half, "verdict": verdict}


def of_method(claims: Sequence[Mapping[str, Any]]) -> str:
  """The verdict of a method, from its judged claims: the worst of the first and of those joined to it."""
  return min((c["verdict"] for i, c in enumerate(claims) if not i or c["joint"]), key=WORST_FIRST.index)


def claims_of(entries: Sequence[Mapping[str, Any]], arms: Sequence[str], where: str) -> list[Claim]:
  """The claims of a config's `get_evidence`.

  Raises:
    ValueError: no claim, an unknown field or arm.
  """
  names = [field.name for field in dataclasses.fields(Claim)]
  claims = []
  for entry in entries:
    if unknown := set(entry) - set(names):
      raise ValueError(f"{where}: a claim has no field {sorted(unknown)[0]!r}; it has "
                       f"{', '.join(names)}")
    claim = Claim(**entry)
    for arm in (claim.method, claim.baseline):
      if arm not in arms:
        raise ValueError(f"{where}: claim {claim.text!r} speaks of the arm {arm!r}; there are "
                         f"{', '.join(arms)}")
    claims.append(claim)
  if not claims:
    raise ValueError(f"{where} makes no claim")
  return claims
