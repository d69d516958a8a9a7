"""Splits of data that is published in one piece."""

from collections.abc import Mapping
import hashlib

from jaxrl.data.examples import present
from jaxrl.data.sources import BadRow
from jaxrl.data.sources import Source
from jaxrl.data.transforms.derived import Selected


def hold_out(source: Source, *, split: str, by: str, up_to: str = "", validation: float = 0.0,
             test: float = 0.0) -> Source:
  """The rows of one split, where rows with equal text in a field are all in the same.

    u = (first 8 bytes of the SHA-256 of the text) / 2^64
    test: u < test,     validation: test <= u < test + validation,     train: the rest

  So which split a row is in depends neither on the other rows nor on a seed. All splits name the same
  file: `config.data.train`, `validation` and `test`.

  Args:
    source: all rows; each is read once.
    split: "train", "validation" or "test".
    by: field with the text that must not leak, such as a question; of a conversation, its first
      message.
    up_to: the text counts up to this only, if it is there: "\\n\\nAssistant:" is the first turn of a
      transcript.
    validation, test: their shares.

  Returns:
    Those rows. Rows without such a text are in `train`, to be refused there.

  Raises:
    ValueError: impossible shares, or no row in this split.
  """
  if min(validation, test) < 0 or validation + test >= 1:
    raise ValueError(f"hold_out: validation={validation} and test={test} have to be shares that leave "
                     "something to train on")
  found = [i for i in range(len(source)) if _split(source, i, by, up_to, validation, test) == split]
  if not found:
    raise ValueError(f"hold_out: none of {len(source)} rows is in the split {split!r} by "
                     f"{by!r}, with validation={validation} and test={test}")
  return Selected(source, found)


def position(text: str) -> float:
  """Where a text stands in [0, 1), by its hash."""
  return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]) / 2 ** 64


def _split(source, index, by, up_to, validation, test):
  try:
    value = present(source[index], by, "transforms", source.where(index))
  except BadRow:
    return "train"
  if isinstance(value, list) and value and isinstance(value[0], Mapping):
    value = value[0].get("content")
  if not isinstance(value, str):
    return "train"
  u = position(value.split(up_to, 1)[0] if up_to else value)
  return "test" if u < test else "validation" if u < test + validation else "train"
