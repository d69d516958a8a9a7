"""Pairs of pairs: of two preferences, which is the stronger (DPO-PoP, arXiv:2509.22851)."""

from collections.abc import Sequence
import math
from typing import Any

from jaxtyping import Int
import numpy as np

from jaxrl.data.examples import present
from jaxrl.data.sources import BadRow
from jaxrl.data.sources import Source

SCHEMES = ("random", "iterative")


def pairs_of_pairs(source: Source, *, seed: int, gap: str = "gap", scheme: str = "random",
                   times: int = 1, noise: float = 0.0, field: str = "weaker") -> Source:
  """Rows of pairs, each with the row of a pair whose preference is weaker in a field of its own.

  Annotators are simulated by a field with how much better the chosen answer is; `compared_pairs` says
  how. Real labels need no transform: rows that hold such a field already.

  Args:
    source: of pairs, all of which are read once.
    seed: of what is drawn.
    gap: field with how much better the chosen answer is, a number.
    scheme, times, noise: as for `compared_pairs`.
    field: that the weaker pair is put into, which `config.data.weaker` has to name.

  Raises:
    BadRow: a row without a gap.
    ValueError: as `compared_pairs`.
  """
  gaps = [_gap(source, index, gap) for index in range(len(source))]
  return _Tuples(source, compared_pairs(gaps, scheme=scheme, times=times, noise=noise, seed=seed), field)


def compared_pairs(gaps: Sequence[float], *, scheme: str, times: int, noise: float, seed: int
                   ) -> Int[np.ndarray, "tuples 2"]:
  """Which pairs are compared, and the index of the stronger and of the weaker one of each comparison.

    random     `times` comparisons for each pair, of two different pairs at random. A pair is the stronger
               one the more often, the larger its gap.
    iterative  every pair is the stronger one `times` times, against pairs of smaller gaps at random, so
               that those of small gaps stand there as often as in the data. Those of the smallest gap have
               no such partner.

  Args:
    gaps: of each pair.
    noise: probability that an annotator errs and names the other one.
    seed: of what is drawn.

  Raises:
    ValueError: another scheme, numbers out of range, or gaps that are all the same.
  """
  if scheme not in SCHEMES or times < 1 or not 0 <= noise <= 1:
    raise ValueError(f"pairs_of_pairs: scheme={scheme!r}, times={times}, noise={noise}; schemes are "
                     f"{' and '.join(map(repr, SCHEMES))}, times is at least 1, noise from 0 to 1")
  gaps, rng = np.asarray(gaps, np.float64), np.random.default_rng([seed, 2509, 22851])
  if len(np.unique(gaps)) < 2:
    raise ValueError("pairs_of_pairs: there are no two pairs of different gaps to compare")
  if scheme == "random":
    first = rng.integers(len(gaps), size=times * len(gaps))
    second = (first + rng.integers(1, len(gaps), size=len(first))) % len(gaps)
    exchange = gaps[first] < gaps[second]
  else:
    order = np.argsort(gaps, kind="stable")
    below = np.searchsorted(gaps[order], gaps)  # pairs of smaller gaps come first in that order
    first = np.repeat(np.flatnonzero(below), times)
    second = order[rng.integers(below[first])]
    exchange = np.zeros(len(first), bool)
  exchange ^= rng.random(len(first)) < noise
  return np.where(exchange[:, None], np.stack([second, first], 1), np.stack([first, second], 1))


class _Tuples:
  """The rows of stronger pairs, with those of weaker ones inside."""

  def __init__(self, source, tuples, field):
    self._source, self._tuples, self._field = source, tuples, field

  def __len__(self) -> int:
    return len(self._tuples)

  def __getitem__(self, index: int) -> dict[str, Any]:
    stronger, weaker = map(int, self._tuples[index])
    return {**self._source[stronger], self._field: self._source[weaker]}

  def where(self, index: int) -> str:
    return " over ".join(self._source.where(int(i)) for i in self._tuples[index])


def _gap(source, index, field):
  where = source.where(index)
  value = present(source[index], field, "transforms", where)
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise BadRow("wrong_type", where, f"field {field!r} holds {value!r}, but pairs_of_pairs compares "
                 "finite numbers")
  return float(value)
