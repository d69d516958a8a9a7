"""Sources that are made of another one."""

import bisect
from collections.abc import Callable, Mapping, Sequence
import itertools
from typing import Any

from jaxrl.data.sources import BadRow
from jaxrl.data.sources import Source


class Derived:
  """The rows that a function makes of each row of a source, any number of each.

  Every row is read once to count what it gives, and again when that is asked for. One that the
  function refuses stays in its place and is refused there too, so that `on_bad_row` decides.

  Raises:
    ValueError: no row gives anything.
  """

  def __init__(self, source: Source, make: Callable[[dict[str, Any], str], Sequence[Mapping]],
               name: str):
    """
    Args:
      source: what rows are made of.
      make: of a row and where it stands; a BadRow refuses it.
      name: of what is made, for error messages.
    """
    self._source, self._make = source, make
    self._ends = list(itertools.accumulate(self._count(i) for i in range(len(source))))
    if not len(self):
      raise ValueError(f"{name} makes nothing of {len(source)} rows, "
                       f"{source.where(0) if len(source) else 'for there are none'}")

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index: int) -> dict[str, Any]:
    row, number = self._locate(index)
    return dict(self._made(row)[number])

  def where(self, index: int) -> str:
    """Where the row that it is made of stands, with `#number` if that gives several."""
    row, number = self._locate(index)
    first = self._ends[row - 1] if row else 0
    return self._source.where(row) + (f"#{number}" if self._ends[row] - first > 1 else "")

  def _made(self, row):
    return self._make(self._source[row], self._source.where(row))

  def _count(self, row):
    try:
      return len(self._made(row))
    except BadRow:
      return 1

  def _locate(self, index):
    if not 0 <= index < len(self):
      raise IndexError(f"row {index} of a source of {len(self)} rows")
    row = bisect.bisect_right(self._ends, index)
    return row, index - (self._ends[row - 1] if row else 0)


class Selected:
  """Some rows of a source, in the order of their indices there."""

  def __init__(self, source: Source, indices: Sequence[int]):
    self._source, self._indices = source, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._source[self._indices[index]]

  def where(self, index: int) -> str:
    """Where that row stands in the whole source."""
    return self._source.where(self._indices[index])
