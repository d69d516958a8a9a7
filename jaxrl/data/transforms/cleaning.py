"""Noise in the labels of pairs, and its cleaning: remove or turn around what looks wrong
(PrefCleanBench, arXiv:2509.23564).

A cleaner is a score per row and an action. Scores (`transforms.preference_scores`) are low where the
label is doubted; the lowest share of rows, or all below 0, is flagged.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from jaxtyping import Bool, Float
import numpy as np

from jaxrl import compose
from jaxrl.compose import nearest
from jaxrl.data.sources import Source
from jaxrl.data.transforms import preference_scores
from jaxrl.data.transforms import score_arithmetic
from jaxrl.data.transforms.derived import Selected

ACTIONS = ("remove", "flip")
MISLABELLED = "mislabelled"  # field: whether `flip_labels` has turned the row around
CLEANED = "cleaned"  # field: what a cleaner has done, see `Cleaned`


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a cleaner says about every row.

  Attributes:
    keep: rows that stay.
    flip: rows whose answers change places; they stay.
    score: low where the label is doubted, NaN where nothing can be said.
  """

  keep: Bool[np.ndarray, "rows"]
  flip: Bool[np.ndarray, "rows"]
  score: Float[np.ndarray, "rows"]

  @property
  def flagged(self) -> Bool[np.ndarray, "rows"]:
    """Rows that the cleaner doubts."""
    return self.flip | ~self.keep


def judge_rows(score: Float[np.ndarray, "rows"], *, action: str, rate: float | None = None) -> Verdict:
  """Flags the `rate * rows` lowest scores, or without a rate all below 0.

  Of equal scores those that come first are flagged first; NaN never is.

  Args:
    score: of every row.
    action: "remove" or "flip", for what is flagged.
    rate: share of all rows, 0 to 1.

  Raises:
    ValueError: another action, or a rate that is no share.
  """
  if action not in ACTIONS:
    raise ValueError(f"action={action!r}{nearest(action, ACTIONS)}")
  if rate is not None and not 0 <= rate <= 1:
    raise ValueError(f"rate={rate} has to be a share from 0 to 1, or None for all scores below 0")
  score = np.asarray(score, np.float64)
  if rate is None:
    flagged = score < 0
  else:
    order = np.argsort(score, kind="stable")  # NaN comes last
    flagged = np.zeros(len(score), bool)
    flagged[order[:round(rate * len(score))]] = True
    flagged &= ~np.isnan(score)
  nothing = np.zeros(len(score), bool)
  return Verdict(*((~nothing, flagged) if action == "flip" else (~flagged, nothing)), score)


class Cleaned:
  """A source after a verdict. Rows have the field `cleaned`: `{by, score, flipped}`.

  Attributes:
    source: before it.
    verdict: about its rows.
    rows: indices there of those that are left. [len(self)]
  """

  def __init__(self, source: Source, verdict: Verdict, by: str, chosen: str, rejected: str):
    self.source, self.verdict, self.rows = source, verdict, np.flatnonzero(verdict.keep)
    self._by, self._fields = by, (chosen, rejected)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    at = self.rows[index]
    row, flip = self.source[int(at)], bool(self.verdict.flip[at])
    row = _exchanged(row, *self._fields) if flip else dict(row)
    return {**row, CLEANED: dict(by=self._by, score=float(self.verdict.score[at]), flipped=flip)}

  def where(self, index: int) -> str:
    """Where that row stands in the whole source."""
    return self.source.where(int(self.rows[index]))


class Noisy:
  """A source with some of its labels turned around, which the field `mislabelled` tells."""

  def __init__(self, source: Source, seed: int, rate: float, chosen: str, rejected: str):
    self._source, self._seed, self._rate, self._fields = source, seed, rate, (chosen, rejected)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    row = self._source[index]
    wrong = bool(np.random.default_rng([self._seed, index]).random() < self._rate)
    return {**(_exchanged(row, *self._fields) if wrong else row), MISLABELLED: wrong}

  def where(self, index: int) -> str:
    """Where the row stands."""
    return self._source.where(index)


def flip_labels(source: Source, *, seed: int, rate: float, chosen: str = "chosen",
                rejected: str = "rejected") -> Noisy:
  """Exchanges the answers of every row with probability `rate`, and says so in `mislabelled`.

  Args:
    source: of pairs.
    seed: row i is turned around or not by (seed, i) alone.
    rate: 0 to 1.
    chosen, rejected: fields of the answers.

  Raises:
    ValueError: a rate that is no probability.
  """
  if not 0 <= rate <= 1:
    raise ValueError(f"flip_labels: rate={rate} has to be a probability from 0 to 1")
  return Noisy(source, seed, rate, chosen, rejected)


def clean(source: Source, *, seed: int, score: Mapping[str, Any] | str, action: str = "remove",
          rate: float | None = None, chosen: str = "chosen", rejected: str = "rejected") -> Cleaned:
  """Removes or turns around the pairs whose labels a score doubts.

  Args:
    source: of pairs.
    seed: of the score, where it draws anything.
    score: a piece of `transforms.preference_scores`, `dict(name=..., ...)`.
    action, rate: as in `judge_rows`.
    chosen, rejected: fields of the answers.

  Raises:
    ValueError: no such score, action or rate, or a score that does not fit the rows.
  """
  spec = {"name": score} if isinstance(score, str) else dict(score)
  piece = compose.build(spec, preference_scores, where="clean: score", given=dict(seed=seed))
  found = np.asarray(piece(source), np.float64)
  if found.shape != (len(source),):
    raise ValueError(f"clean: score {spec['name']!r} gives an array of shape {found.shape}, but there are "
                     f"{len(source)} rows")
  return Cleaned(source, judge_rows(found, action=action, rate=rate), spec["name"], chosen, rejected)


def leave_part_out(source: Source, *, seed: int, part: int, of: int = 2) -> Source:
  """The rows outside of one of several parts, for a model that shall score the rows of that part.

  Args:
    source: any.
    seed: of the division, see `score_arithmetic.parts`; all that share a division give the same one.
    part: that is left out, 0 to `of` - 1.
    of: parts.

  Raises:
    ValueError: no such part.
  """
  if not 0 <= part < of:
    raise ValueError(f"leave_part_out: part={part} has to be at least 0 and below of={of}")
  inside = score_arithmetic.parts(len(source), of, seed) == part
  return Selected(source, np.flatnonzero(~inside).tolist())


def _exchanged(row, chosen, rejected):
  return {**row, chosen: row.get(rejected), rejected: row.get(chosen)}
