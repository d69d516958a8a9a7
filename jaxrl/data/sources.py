"""Rows of JSONL, Parquet and TFDS data, by index and without reading what is not asked for."""

import array
import bisect
from collections.abc import Sequence
import glob
import gzip
import io
import itertools
import json
import os
import re
from typing import Any, Protocol
import zlib

import numpy as np

from jaxrl import compose

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class BadRow(ValueError):
  """A row that cannot be used.

  Attributes:
    reason: one word for counting.
    where: `file:line`.
    message: what is wrong with it.
  """

  def __init__(self, reason: str, where: str, message: str):
    super().__init__(f"{where}: {message}")
    self.reason, self.where, self.message = reason, where, message


class Source(Protocol):
  """Random access to rows."""

  def __len__(self) -> int:
    """Number of rows."""

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The row at an index from 0; BadRow where it cannot be read."""

  def where(self, index: int) -> str:
    """Where that row stands, for error messages."""


def open_source(spec: str) -> Source:
  """Opens data by name.

  Args:
    spec: a path ending in `.jsonl`, `.jsonl.gz`, `.parquet` or `.json`, a glob pattern, several of these
      between commas (read one after the other, a pattern's files in order of their names), or
      `tfds:name[/config][:version]:split[?data_dir=directory]`.

  Raises:
    ValueError: there is no such file or data set, it cannot be read, or it has no rows.
  """
  if spec.startswith("tfds:"):
    source = _open_tfds(spec)
  else:
    parts = [_open_file(path) for path in _paths(spec)]
    source = parts[0] if len(parts) == 1 else Concatenation(parts)
  if not len(source):
    raise ValueError(f"{spec}: no rows in it")
  return source


class JsonLines:
  """A `.jsonl` or `.jsonl.gz` file; blank lines are no rows.

  Only the offsets of the lines are kept, and, of a compressed file, its text.
  """

  def __init__(self, path: str):
    self.path = path
    self._text = None
    try:
      if path.endswith(".gz"):
        with gzip.open(path) as file:
          self._text = file.read()
      with io.BytesIO(self._text) if self._text is not None else open(path, "rb") as lines:
        self._spans, self._lines = _index(lines)
    except (OSError, EOFError, zlib.error) as error:
      raise ValueError(f"cannot read {path}: {error}") from error

  def __len__(self) -> int:
    return len(self._lines)

  def __getitem__(self, index: int) -> dict[str, Any]:
    start, end = (int(x) for x in self._spans[_within(index, self)])
    if self._text is None:
      with open(self.path, "rb") as file:
        file.seek(start)
        line = file.read(end - start)
    else:
      line = self._text[start:end]
    try:
      row = json.loads(line.removeprefix(BYTE_ORDER_MARK))
    except json.JSONDecodeError as error:
      raise BadRow("unreadable", self.where(index),
                   f"not valid JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # broken UTF-8, endless digits, endless nesting
      raise BadRow("unreadable", self.where(index), f"not valid JSON ({error})") from error
    if not isinstance(row, dict):
      raise BadRow("unreadable", self.where(index),
                   f"a row is a JSON object, {{...}}, but this is a {type(row).__name__}")
    return row

  def where(self, index: int) -> str:
    """`file:line`, lines counted from 1 as editors do."""
    return f"{self.path}:{self._lines[index]}"


class JsonList:
  """A `.json` file that holds one list of objects, all of which are kept in memory."""

  def __init__(self, path: str):
    self.path = path
    try:
      with open(path, encoding="utf-8-sig") as file:
        text = file.read()
      self._rows, starts = _items(text)
    except (OSError, ValueError, RecursionError) as error:
      raise ValueError(f"cannot read {path}: {error}") from error
    ends = [i for i, character in enumerate(text) if character == "\n"]
    self._lines = [1 + bisect.bisect_left(ends, start) for start in starts]

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    row = self._rows[_within(index, self)]
    if not isinstance(row, dict):
      raise BadRow("unreadable", self.where(index),
                   f"a row is a JSON object, {{...}}, but this is a {type(row).__name__}")
    return dict(row)

  def where(self, index: int) -> str:
    """`file:line` at which the object begins, lines counted from 1."""
    return f"{self.path}:{self._lines[index]}"


class Parquet:
  """A Parquet file. The first access decodes it into an Arrow table, which stays in memory.

  Binary values that are UTF-8 become text.
  """

  def __init__(self, path: str):
    import pyarrow
    import pyarrow.parquet
    self.path = path
    self._table = None
    try:
      self._rows = pyarrow.parquet.read_metadata(path).num_rows
    except (OSError, pyarrow.ArrowException) as error:
      raise ValueError(f"cannot read {path}: {error}") from error

  def __len__(self) -> int:
    return self._rows

  def __getitem__(self, index: int) -> dict[str, Any]:
    index = _within(index, self)
    if self._table is None:
      import pyarrow.parquet
      self._table = pyarrow.parquet.read_table(self.path)
    return _plain(self._table.slice(index, 1).to_pylist()[0])

  def where(self, index: int) -> str:
    """`file:row`, rows counted from 0 as data frames do."""
    return f"{self.path}:{index}"


class Tfds:
  """A split of TensorFlow Datasets in array_record format; bytes that are UTF-8 become text.

  Args:
    rows: random access to examples, as `tfds.data_source` gives it.
    name: what error messages call it.
  """

  def __init__(self, rows: Sequence[Any], name: str):
    self._rows, self.name = rows, name

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return _plain(self._rows[_within(index, self)])

  def where(self, index: int) -> str:
    """`tfds:name:split:row`, rows counted from 0."""
    return f"{self.name}:{index}"


class Concatenation:
  """Sources one after the other."""

  def __init__(self, parts: Sequence[Source]):
    self._parts = parts
    self._ends = list(itertools.accumulate(len(part) for part in parts))

  def __len__(self) -> int:
    return self._ends[-1]

  def _locate(self, index):
    part = bisect.bisect_right(self._ends, _within(index, self))
    return self._parts[part], index - (self._ends[part - 1] if part else 0)

  def __getitem__(self, index: int) -> dict[str, Any]:
    part, index = self._locate(index)
    return part[index]

  def where(self, index: int) -> str:
    """Where the row stands in its own part."""
    part, index = self._locate(index)
    return part.where(index)


FORMATS = {".jsonl": JsonLines, ".jsonl.gz": JsonLines, ".parquet": Parquet, ".json": JsonList}


def _paths(spec):
  """The files that a spec names, in order."""
  paths = []
  for part in [spec] if os.path.exists(spec) else spec.split(","):
    part = os.path.expanduser(part.strip())
    found = [part] if os.path.exists(part) else sorted(glob.glob(part, recursive=True))
    if not found:
      raise ValueError(f"no file {part!r}{f' (from {spec!r})' if part != spec else ''}: relative "
                       f"paths start at {os.getcwd()}; TensorFlow Datasets are tfds:name:split")
    paths += found
  return paths


def _open_file(path):
  for ending, kind in FORMATS.items():
    if path.endswith(ending) and os.path.isfile(path):
      return kind(path)
  what = "is a directory" if os.path.isdir(path) else "has an unknown format"
  raise ValueError(f"{path} {what}: name files that end in {', '.join(FORMATS)}, or a pattern such "
                   f"as {os.path.join(path if os.path.isdir(path) else 'data', '*.jsonl')!r}")


def _index(lines):
  """Spans in bytes [rows, 2] and numbers from 1 [rows] of the lines that are not blank."""
  start, spans, numbers = 0, array.array("q"), array.array("q")
  for number, line in enumerate(lines, start=1):
    if line.strip():
      spans.extend((start, start + len(line)))
      numbers.append(number)
    start += len(line)
  return np.array(spans, np.int64).reshape(-1, 2), np.array(numbers, np.int64)


def _items(text):
  """The values of a JSON list, and where each begins."""
  decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
  position = blank.match(text).end()
  if text[position:position + 1] != "[":
    raise ValueError("it has to hold one list of objects, [{...}, {...}]")
  rows, starts, position = [], [], blank.match(text, position + 1).end()
  while text[position:position + 1] != "]":
    row, end = decoder.raw_decode(text, position)
    rows.append(row)
    starts.append(position)
    position = blank.match(text, end).end()
    if text[position:position + 1] not in (",", "]"):
      raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    if text[position] == ",":
      position = blank.match(text, position + 1).end()
  if text[position + 1:].strip():
    raise json.JSONDecodeError("Extra data", text, position + 1)
  return rows, starts


def _open_tfds(spec):
  match = re.fullmatch(r"tfds:(?P<name>[^:?]+(?::[0-9*.]+)?):(?P<split>[^?]+)"
                       r"(?:\?data_dir=(?P<data_dir>.+))?", spec)
  if not match:
    raise ValueError(f"{spec!r} is not of the form tfds:name[/config][:version]:split"
                     "[?data_dir=directory], such as tfds:math_qa:train or tfds:math_qa:train[:10%]")
  import tensorflow_datasets as tfds
  data_dir = match["data_dir"] and os.path.expanduser(match["data_dir"])
  try:
    rows = tfds.data_source(match["name"], split=match["split"], data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    name = match["name"].split("/")[0].split(":")[0]
    known = tfds.list_builders(with_community_datasets=False)
    raise ValueError(f"{spec}: TensorFlow Datasets knows no {name!r}{compose.nearest(name, known)}"
                     ) from error
  except Exception as error:  # builders download, unpack and import, and fail in as many ways
    raise ValueError(f"{spec}: TensorFlow Datasets cannot open it ({error}); prepare it once with "
                     "file_format='array_record' and name its directory with ?data_dir=") from error
  return Tfds(rows, spec.split("?")[0])


def _within(index, source):
  if not 0 <= index < len(source):
    raise IndexError(f"row {index} of a source of {len(source)} rows")
  return index


def _plain(value):
  """NumPy values and UTF-8 bytes as the Python values that JSON would give."""
  if isinstance(value, bytes):
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError:
      return value
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, np.ndarray | np.generic):
    return _plain(value.tolist())
  return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
