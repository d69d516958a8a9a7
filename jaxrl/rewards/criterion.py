"""What a judge says about one sample: a score with a status, never a bare number."""

from collections.abc import Callable, Sequence
import dataclasses
import math
import numbers
import traceback
from typing import Any

import numpy as np

STATUSES = ("ok", "unscorable", "failed")
DETAIL_CHARACTERS = 4000  # of an explanation that are kept: a traceback's end is what matters


@dataclasses.dataclass(frozen=True)
class Criterion:
  """One named piece of evidence about one sample.

  Attributes:
    score: finite; 0 and meaningless unless the status is `ok`.
    status: `ok`; `unscorable`: the judge ran and cannot say (there is no reference answer);
      `failed`: the judge broke (it raised, hung, died, or returned something that is no finite
      number). The last two take the sample out of the statistics; failures also count towards the
      rate at which a run stops.
    detail: for people: what was compared, or the traceback.
  """

  score: float
  status: str = "ok"
  detail: str = ""

  def __post_init__(self):
    if self.status not in STATUSES:
      raise ValueError(f"criterion status {self.status!r} is none of {', '.join(STATUSES)}")
    if not _is_finite_number(self.score):
      raise ValueError(f"criterion score {self.score!r} is not a finite number; return "
                       "unscorable(detail) when there is nothing to say")
    object.__setattr__(self, "score", float(self.score) if self.status == "ok" else 0.0)
    object.__setattr__(self, "detail", str(self.detail)[-DETAIL_CHARACTERS:])


def ok(score: float, detail: str = "") -> Criterion:
  """A judgement. Raises ValueError unless `score` is a finite number."""
  return Criterion(score, "ok", detail)


def unscorable(detail: str) -> Criterion:
  """The judge works but cannot judge this sample."""
  return Criterion(0.0, "unscorable", detail)


def failed(detail: str) -> Criterion:
  """The judge itself broke on this sample."""
  return Criterion(0.0, "failed", detail)


def declare(*, inline: bool = False, batched: bool = False, warm_up: Callable[[], Any] | None = None,
            check: Callable[..., None] | None = None) -> Callable[[Callable], Callable]:
  """Declares what the scorer may assume about a criterion function.

  Args:
    inline: it can neither hang nor crash and costs next to nothing, so it runs in the main process.
      Everything else runs in worker processes under a time-out.
    batched: it judges all samples of a call at once, as `function(pairs, mesh, *, ...)` -> one
      judgement for each, in the main process: for models that run on the mesh.
    warm_up: called once when a worker starts, outside the time-out (slow imports).
    check: called with the configured keyword arguments when the scorer is built; raises ValueError
      when they make no sense.
  """
  def mark(function):
    function.inline, function.batched = inline, batched
    function.warm_up, function.check = warm_up, check
    return function
  return mark


def as_criterion(value: Any) -> Criterion:
  """What a criterion function returned, as evidence; anything but a finite number is `failed`."""
  if isinstance(value, Criterion):
    return value
  if _is_finite_number(value):
    return ok(value)
  what = repr(value) if isinstance(value, float | np.floating) else f"a {type(value).__name__}"
  return failed(f"returned {what}; return a finite number, a bool or a Criterion (unscorable(...) "
                "when there is nothing to say)")


def judge(function: Callable, task: Any, completion: Any) -> Criterion:
  """Calls a criterion function; whatever it raises becomes evidence."""
  try:
    return as_criterion(function(task, completion))
  except KeyboardInterrupt:
    raise
  except BaseException:  # SystemExit and the time-out exceptions of libraries are failures too
    return failed(traceback.format_exc())


def judge_all(function: Callable, pairs: Sequence[tuple[Any, Any]], mesh: Any) -> list[Criterion]:
  """Calls a batched criterion function; whatever it raises becomes evidence about every sample."""
  try:
    found = [as_criterion(value) for value in function(pairs, mesh)]
    if len(found) != len(pairs):
      raise ValueError(f"returned {len(found)} judgements of {len(pairs)} samples")
    return found
  except Exception:
    return [failed(traceback.format_exc())] * len(pairs)


def _is_finite_number(value):
  if isinstance(value, bool | np.bool_):
    return True
  try:
    return isinstance(value, numbers.Real) and math.isfinite(value)
  except OverflowError:  # an int beyond the range of floats
    return False
