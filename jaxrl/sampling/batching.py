"""How requests become device batches of few shapes."""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from jaxrl.batch import bucket
from jaxrl.sampling import draw, generate
from jaxrl.sampling.requests import Request

MERGE = 16  # padding rows that are cheaper than one more device call
MIN_STREAM_ROWS = 32  # fewer rows at a time use a core badly
MIN_PROMPT = 16  # tokens
MIN_STOP_IDS = 4
MIN_DEPTH = 4  # integers in a key


@dataclasses.dataclass(frozen=True)
class Slot:
  """Samples `first .. first + count` of one request, which share a prompt on the device."""

  request: int
  first: int
  count: int


def fine_bucket(size: int) -> int:
  """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: few shapes, and at most a third is padding."""
  power = 1
  while power < size:
    power *= 2
  return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


def streams_for(widest: int, max_rows: int, streams: int) -> int:
  """Device calls at the same time for requests of at most `widest` samples: one may take the rows of
  several streams, so as not to be read twice."""
  return max(1, min(streams, max_rows // max(widest, MIN_STREAM_ROWS)))


def layout(requests: Sequence[Request], max_rows: int, streams: int = 1, shards: int = 1
           ) -> Iterator[tuple[list[Slot], int]]:
  """Distributes requests over device calls.

  Args:
    requests: in any order.
    max_rows: samples in one device call.
    streams: calls that run at the same time; requests are split into as many if they fill them.
    shards: devices that prompts are distributed over. With fewer requests than these, samples of a
      request are computed on several of them, each of which reads the prompt.

  Yields:
    The slots of a call and the samples per slot (some of which may be padding).
  """
  by_width = {}
  devices = -(-shards // max(len(requests), 1))  # for each request
  for i, request in enumerate(requests):
    most = min(max_rows, -(-request.n // devices))
    for first in range(0, request.n, most):
      slot = Slot(i, first, min(most, request.n - first))
      by_width.setdefault(min(max_rows, fine_bucket(slot.count)), []).append(slot)
  widths = sorted(by_width)
  for narrow, wide in zip(widths, widths[1:]):
    if len(by_width[narrow]) * (wide - narrow) <= MERGE:
      by_width[wide] = by_width.pop(narrow) + by_width[wide]
  for width, slots in sorted(by_width.items()):
    # Neighbours in prompt length share a call, so that few prompts are padded much.
    slots = sorted(slots, key=lambda s: len(requests[s.request].prompt))
    parts = max(1, min(streams, len(slots) * width // MIN_STREAM_ROWS))
    prompts = min(max_rows // width, -(-len(slots) // parts))
    for start in range(0, len(slots), prompts):
      yield slots[start:start + prompts], width


class Packed(NamedTuple):
  """One device call, in host arrays.

  Attributes:
    prompts, identity: of each slot, and padding.
    settings: of each row; every slot has as many.
    padding: rows that nobody asked for.
  """

  prompts: generate.Prompts
  identity: generate.Identity
  settings: generate.Settings
  padding: np.ndarray


def pack(requests: Sequence[Request], slots: Sequence[Slot], width: int, shards: int) -> Packed:
  """Pads the prompts and settings of a call to its bucketed shape.

  Args:
    requests: all of them; slots point into them.
    slots: one per prompt of the call.
    width: rows per slot.
    shards: the number of prompts becomes a multiple of this.
  """
  served = [requests[slot.request] for slot in slots]
  count = -(-fine_bucket(len(slots)) // shards) * shards

  def column(values, padding, dtype):
    return np.array([*values, *[padding] * (count - len(slots))], dtype)

  def table(rows, padding, width, dtype):
    out = np.full((count, width), padding, dtype)
    for row, values in zip(out, rows):
      row[:len(values)] = values
    return out

  params = [request.params for request in served]
  how = draw.Distribution(
      temperature=column((p.temperature for p in params), 1.0, np.float32),
      top_k=column((p.top_k for p in params), 0, np.int32),
      top_p=column((p.top_p for p in params), 1.0, np.float32),
      min_p=column((p.min_p for p in params), 0.0, np.float32))
  stops = bucket(max(len(p.stop_ids) for p in params), MIN_STOP_IDS)
  settings = generate.Settings(
      how=how, max_tokens=column((p.max_tokens for p in params), 1, np.int32),
      stop_ids=table((p.stop_ids for p in params), -1, stops, np.int32))
  longest = max(len(r.prompt) for r in served)
  prompts = generate.Prompts(
      tokens=table((r.prompt for r in served), 0, bucket(longest, MIN_PROMPT), np.int32),
      lengths=column((len(r.prompt) for r in served), 1, np.int32))
  depth = bucket(max(len(r.key) for r in served), MIN_DEPTH)
  identity = generate.Identity(
      folds=table((r.key for r in served), 0, depth, np.uint32),
      depth=column((len(r.key) for r in served), 0, np.int32),
      first=column((slot.first for slot in slots), 0, np.int32))
  counts = column((slot.count for slot in slots), 0, np.int32)
  return Packed(prompts, identity, jax.tree.map(lambda x: np.repeat(x, width, axis=0), settings),
                (np.arange(width) >= counts[:, None]).ravel())
