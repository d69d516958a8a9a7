"""From evidence to a reward: `(evidence, *, ...) -> float`, or None for a sample without a reward.

Evidence that is not `ok` never enters a sum: where it is needed, there is no reward.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import math
import numbers

from jaxrl import compose
from jaxrl.rewards.criterion import Criterion


def weighted_sum(evidence: Mapping[str, Criterion], *, weights: Mapping[str, float] | None = None
                 ) -> float | None:
  """`sum_i weights[i] * score[i]`; None if a criterion in it is not `ok`.

  Args:
    evidence: criteria by label.
    weights: by label; criteria without a weight, or with 0, are recorded only. None weighs all 1.
  """
  if weights is None:
    weights = dict.fromkeys(evidence, 1.0)
  used = {label: weight for label, weight in weights.items() if weight}
  if any(evidence[label].status != "ok" for label in used):
    return None
  return math.fsum(weight * evidence[label].score for label, weight in used.items())


def product_gate(evidence: Mapping[str, Criterion], *, gates: Sequence[str],
                 weights: Mapping[str, float] | None = None) -> float | None:
  """`prod_g score[g] * sum_i weights[i] * score[i]`: the gates decide whether the rest counts.

  A gate of 0 gives 0 whatever the rest is, broken judges included; otherwise None if a gate or a
  weighted criterion is not `ok`. With nothing but gates, their product.

  Args:
    evidence: criteria by label.
    gates: labels of the factors.
    weights: of the other criteria, by label, as in `weighted_sum`. None weighs all of them 1.
  """
  if any(evidence[gate].status == "ok" and evidence[gate].score == 0 for gate in gates):
    return 0.0
  if any(evidence[gate].status != "ok" for gate in gates):
    return None
  rest = {label: found for label, found in evidence.items() if label not in gates}
  total = weighted_sum(rest, weights=weights) if rest else 1.0
  return None if total is None else math.prod(evidence[gate].score for gate in gates) * total


def check_labels(aggregate: Callable, labels: Iterable[str], *, where: str = "config") -> None:
  """Refuses an aggregator whose `weights` or `gates` do not fit the criteria.

  Args:
    aggregate: a built piece; its keywords `weights` and `gates`, if any, hold labels.
    labels: of the criteria that there are.
    where: path of the aggregator in the config, for error messages.

  Raises:
    ValueError: an unknown label (with the nearest one), a weight that is no finite number, a gate
      that is also weighted.
  """
  keywords = aggregate.keywords if isinstance(aggregate, functools.partial) else {}
  labels, weights, gates = list(labels), keywords.get("weights"), keywords.get("gates", ())
  if isinstance(gates, str) or not isinstance(gates, Sequence):
    raise ValueError(f"{where}.gates={gates!r} is not a list of criteria; write [{gates!r}]")
  if weights is not None and not isinstance(weights, Mapping):
    raise ValueError(f"{where}.weights={weights!r} is not a dict of criterion: weight")
  for key, names in (("weights", weights or ()), ("gates", gates)):
    for name in names:
      if name not in labels:
        raise ValueError(f"{where}.{key}: there is no criterion {name!r}"
                         f"{compose.nearest(str(name), labels)}")
  for name, weight in (weights or {}).items():
    if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
      raise ValueError(f"{where}.weights[{name!r}]={weight!r} is not a finite number")
    if name in gates:
      raise ValueError(f"{where}: {name!r} is a gate and has a weight; a gate is a factor, so "
                       "leave it out of the weights")
  if weights is not None and not any(weights.values()):
    raise ValueError(f"{where}.weights gives every criterion 0, so that every reward would be 0; "
                     f"give one of {', '.join(labels)} a weight")
