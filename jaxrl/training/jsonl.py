"""Files of one JSON object per line that survive a kill at any moment."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

DIGITS = 7  # what float32 holds


class JsonLines:
  """Appends objects to one file; each is on disk (or in the system's hands) when `append` returns.

  A line that a killed run left unfinished is removed when the file is opened.

  Args:
    path: created on the first `append`, with its directory.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._file = None

  def append(self, row: Mapping[str, Any]) -> None:
    """Writes one line. See `jsonable` for how values are written."""
    self.extend([row])

  def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one line per row, flushed once."""
    data = b"".join(encode(row) for row in rows)
    try:
      if self._file is None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(self.path)
        self._file = open(self.path, "ab")
      self._file.write(data)
      self._file.flush()
    except OSError as error:
      raise OSError(error.errno, f"cannot write to {self.path}: {error.strerror}. Make room there; "
                    "the same command continues from the last checkpoint") from error

  def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites the file with the rows for which `wanted` is true, in one atomic step."""
    self.close()
    if not self.path.exists():
      return
    temporary = self.path.with_name(self.path.name + ".tmp")
    with open(temporary, "wb") as file:
      for line, row in _parse(self.path):
        if wanted(row):
          file.write(line)
    os.replace(temporary, self.path)

  def close(self) -> None:
    """Closes the file; the next `append` opens it again."""
    if self._file is not None:
      self._file.close()
      self._file = None


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """All rows of a file; none if there is no file. Lines that do not parse are left out."""
  return [row for _, row in _parse(path)] if path.exists() else []


def number(value: Any) -> float:
  """A metric as it was before `jsonable`; NaN if it is no number."""
  try:
    return float(value)
  except (TypeError, ValueError):
    return math.nan


def jsonable(value: Any) -> Any:
  """Any value as strict JSON.

  Floats keep 7 significant digits. JSON has no NaN or infinities: they become the strings `"NaN"`,
  `"Infinity"` and `"-Infinity"`, which `float` reads in Python and `Number` in JavaScript. Arrays
  become lists, dataclasses and mappings objects, and what JSON has no notion of becomes its `str`.
  """
  if isinstance(value, np.generic) or getattr(value, "shape", None) == ():
    value = np.asarray(value).item()
  if value is None or isinstance(value, (bool, int, str)):
    return value
  if isinstance(value, float):
    if math.isnan(value):
      return "NaN"
    if math.isinf(value):
      return "Infinity" if value > 0 else "-Infinity"
    return float(f"{value:.{DIGITS}g}")
  if isinstance(value, Mapping):
    return {str(key): jsonable(item) for key, item in value.items()}
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
  if isinstance(value, (list, tuple, set, frozenset)) or hasattr(value, "tolist"):
    return [jsonable(item) for item in (value.tolist() if hasattr(value, "tolist") else value)]
  return str(value)


def encode(row: Any, *, exact: bool = False) -> bytes:
  """One line of JSON in UTF-8; lone surrogates, which UTF-8 cannot hold, stay escaped.

  Args:
    exact: floats keep all digits, and NaN is what `json` writes for it, so that what was read from JSON is
      read again; it is strict JSON otherwise, see `jsonable`.
  """
  how = dict(default=_plain) if exact else dict(allow_nan=False)
  row = row if exact else jsonable(row)
  try:
    return (json.dumps(row, ensure_ascii=False, **how) + "\n").encode()
  except UnicodeEncodeError:
    return (json.dumps(row, **how) + "\n").encode()


def _plain(value):
  """What JSON has no notion of, as a list or text."""
  return value.tolist() if hasattr(value, "tolist") else str(value)


def write_json(path: pathlib.Path, value: Any, *, exact: bool = False) -> None:
  """Writes a file of one indented JSON object, atomically.

  Args:
    exact: `value` is plain JSON already; its floats keep all digits, so that Python's `json.load`
      gives back an equal value.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  text = json.dumps(value if exact else jsonable(value), indent=2, allow_nan=exact)
  temporary.write_text(text + "\n", encoding="utf-8")
  os.replace(temporary, path)


def cut_torn_line(path: pathlib.Path) -> None:
  """Removes what follows the last newline of a file, if there is a file."""
  if not path.exists():
    return
  with open(path, "rb+") as file:
    end = position = file.seek(0, os.SEEK_END)
    while position > 0:
      start = max(0, position - 65536)
      file.seek(start)
      newline = file.read(position - start).rfind(b"\n")
      if newline >= 0:
        position = start + newline + 1
        break
      position = start
    if position < end:
      file.truncate(position)


def _parse(path: pathlib.Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
  with open(path, "rb") as file:
    for line in file:
      try:
        row = json.loads(line)
      except ValueError:  # torn or garbled
        continue
      if isinstance(row, dict) and line.endswith(b"\n"):
        yield line, row
