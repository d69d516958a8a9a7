"""What a run keeps on the host, in two files that cannot be read back wrong.

`0.json` holds a JSON record, `0.npz` NumPy arrays; the record carries the CRC-32 of itself and of
the other file. It is the same in all processes, so that process 0 writes it for all.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


RECORD, ARRAYS = "0.json", "0.npz"


class Unreadable(Exception):
  """A file is missing, torn or altered; the message names it and says how it shows."""


def write(directory: pathlib.Path, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
          ) -> None:
  """Writes the record and the arrays. See `plain` for what a record may hold."""
  refuse_unstorable(arrays)
  data = directory / ARRAYS
  with open(data, "wb") as file:  # bfloat16 and its like are no NumPy types: store their bytes
    np.savez(file, **{_member(i): np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                      for i, array in enumerate(arrays.values())})
  body = {
      "record": plain(record),
      "arrays": [[name, str(array.dtype), list(array.shape)] for name, array in arrays.items()],
      "arrays_crc32": zlib.crc32(data.read_bytes()),
  }
  text = json.dumps({"crc32": zlib.crc32(_canonical(body)), **body}, indent=1)
  (directory / RECORD).write_text(text, encoding="utf-8")


def read(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Reads back what `write` wrote.

  Raises:
    Unreadable: either file is missing or differs from what was written.
  """
  path, data = directory / RECORD, directory / ARRAYS
  try:
    content = json.loads(path.read_bytes())
    claimed = content.pop("crc32")
    if claimed != zlib.crc32(_canonical(content)):
      raise Unreadable(f"{path}: checksum differs")
    if content["arrays_crc32"] != zlib.crc32(data.read_bytes()):
      raise Unreadable(f"{data}: checksum differs")
    with np.load(data, allow_pickle=False) as stored:
      arrays = {name: stored[_member(i)].view(jnp.dtype(dtype)).reshape(shape)
                for i, (name, dtype, shape) in enumerate(content["arrays"])}
    return content["record"], arrays
  except FileNotFoundError as error:
    raise Unreadable(f"{error.filename} is missing") from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise Unreadable(f"{path} cannot be parsed ({error})") from error


def refuse_unstorable(arrays: Mapping[str, np.ndarray]) -> None:
  """Raises TypeError if an array is not plain numbers, booleans or fixed-width strings."""
  for name, array in arrays.items():
    if array.dtype.hasobject or array.dtype.names:
      raise TypeError(f"array {name!r} of a checkpoint has dtype {array.dtype}; store plain "
                      "numbers, or put the value into the JSON part")


def plain(value: Any, where: str = "host") -> Any:
  """`value` as plain JSON types, or an error that names the offending entry.

  Numbers survive exactly, NaN and infinities included; tuples become lists and NumPy scalars become
  Python numbers. Keys must be strings, for JSON would turn others into strings silently.

  Raises:
    TypeError: an entry is neither of these.
  """
  if value is None or isinstance(value, (bool, int, float, str)):
    return value.item() if isinstance(value, np.generic) else value
  if isinstance(value, np.generic):
    return plain(value.item(), where)
  if isinstance(value, Mapping):
    for key in value:
      if not isinstance(key, str):
        raise TypeError(f"{where} has the key {key!r}: keys of a checkpoint's JSON are strings")
    return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
  raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold: convert it to "
                  "numbers, strings, lists and dicts, or put arrays into `buffer`")


def _canonical(content: Any) -> bytes:
  return json.dumps(content, sort_keys=True).encode()


def _member(index: int) -> str:
  return f"array_{index}"


class HostHandler(ocp.CheckpointHandler):
  """Writes the host record; Orbax calls it between making a step and committing it."""

  def save(self, directory, args: "HostSave"):
    if jax.process_index() == 0:
      write(pathlib.Path(directory), args.record, args.arrays)

  def restore(self, directory, args: "HostRestore | None" = None):
    return read(pathlib.Path(directory))


@ocp.args.register_with_handler(HostHandler, for_save=True)
@dataclasses.dataclass
class HostSave(ocp.args.CheckpointArgs):
  """What to write: see `write`."""

  record: dict[str, Any]
  arrays: dict[str, np.ndarray]


@ocp.args.register_with_handler(HostHandler, for_restore=True)
@dataclasses.dataclass
class HostRestore(ocp.args.CheckpointArgs):
  """Nothing to say: there is one record."""
