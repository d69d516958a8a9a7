"""What transforms share: a source whose rows are made from those of another."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxrl.data.sources import BadRow
from jaxrl.data.sources import Source

Row = Mapping[str, Any]


class Mapped:
  """The rows of a source, each as `change(index, row)` gives it; they stand where they stood."""

  def __init__(self, source: Source, change: Callable[[int, Row], dict[str, Any]]):
    self._source, self._change = source, change

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._change(index, self._source[index])

  def where(self, index: int) -> str:
    """Where the row stood before."""
    return self._source.where(index)


def readable(source: Source, index: int) -> Row | None:
  """A row, None if it cannot be read."""
  try:
    return source[index]
  except BadRow:
    return None


def is_text(value: Any) -> bool:
  """Whether a value can stand in a template: text that is not blank, or a number."""
  if isinstance(value, str):
    return bool(value.strip())
  return isinstance(value, int | float) and not isinstance(value, bool)
