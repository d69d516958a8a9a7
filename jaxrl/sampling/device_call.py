"""One device batch from its prompts to its last token, as the host sees it."""

from collections.abc import Collection, Sequence
import threading
import time

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from jaxrl import sharding
from jaxrl.batch import bucket
from jaxrl.models.cached_attention import Rows
from jaxrl.models.decoder import DecoderConfig
from jaxrl.sampling import compaction, generate
from jaxrl.sampling.batching import Slot, pack
from jaxrl.sampling.requests import Request

CHUNK = 32  # tokens between two looks of the host, unless somebody reads along
MIN_CAPACITY, FIRST_CAPACITY = 16, 64  # of suffix caches; longer ones are made when needed


def capacities(longest: int, chunk: int = CHUNK) -> tuple[int, int, int]:
  """Tokens of a chunk, and capacities of the first and the last suffix cache for responses of a length."""
  chunk = bucket(min(longest, chunk), min(chunk, MIN_CAPACITY))
  first = bucket(min(longest, FIRST_CAPACITY), MIN_CAPACITY)
  return chunk, first, bucket(-(-longest // chunk) * chunk - 1, first)


class DeviceCall:
  """Samples under way on the device.

  Sample `s` of slot `p` is row `p * width + s` of the arrays here, whichever rows the device still
  computes.

  Attributes:
    settings: of each row.
    tokens, logprobs: so far; zeros where nothing was computed after a sample's end. [time, rows]
    computed: tokens computed on the device, padding and ended rows included.
    waited: seconds spent waiting for the device.
  """

  def __init__(self, config: DecoderConfig, variables, requests: Sequence[Request],
               slots: Sequence[Slot], width: int, base_key: jax.Array, mesh: Mesh | None,
               dispatch: threading.Lock, cache_dtype: str = "", chunk: int = CHUNK):
    """Reads the prompts and draws the first tokens.

    Args:
      config, variables: the model, see `precision.reduced`.
      cache_dtype: one of `precision.DTYPES`.
      requests: all of them; slots point into them.
      slots: of this call.
      width: rows per slot.
      base_key: of the run.
      mesh: that prompts are distributed over, or None. On several devices rows stay where they are.
      dispatch: held while programs are started, so that two threads do not compile the same one.
      chunk: tokens between two looks of the host.
    """
    self._config, self._variables, self._base_key = config, variables, base_key
    self._mesh, self._dispatch, self._width = mesh, dispatch, width
    self._movable = mesh is None or mesh.size == 1
    packed = pack(requests, slots, width, mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1)
    self.settings = packed.settings
    self._identity = self._put(packed.identity)
    self._on_device = self._put(packed.settings)
    self._rows = Rows(packed.prompts.lengths)
    self._owners = np.repeat(np.arange(len(packed.prompts.lengths)), width)
    self._places = self._put(self._rows)
    longest = int(self.settings.max_tokens.max())
    self._movable &= longest * len(packed.padding) > compaction.SMALL
    self._chunk, self._capacity, _ = capacities(longest, chunk)
    self._ids = np.arange(len(packed.padding))  # of the rows that the device computes
    self.tokens = np.zeros((0, len(packed.padding)), np.int32)
    self.logprobs = np.zeros((0, len(packed.padding)), np.float32)
    self.computed, self.waited, self._step, self._first = 0, 0.0, -1, 0
    self._draw_numbers(0)
    with self._dispatch:
      self._prefix, self._state, output = generate.prefill(
          variables, self._put(packed.prompts), self._on_device, self._put(packed.padding),
          self._uniform, config=config, capacity=self._capacity, cache_dtype=cache_dtype)
    self._read(output)

  @property
  def under_way(self) -> np.ndarray:
    """Which samples have not ended. [rows]"""
    found = np.zeros(self.tokens.shape[1], bool)
    found[self._ids[~self._done]] = True
    return found

  def end(self, rows: Collection[int]) -> None:
    """Ends samples whatever the device thinks of them."""
    ended = self._done | np.isin(self._ids, list(rows))
    if (ended != self._done).any():
      self._done = ended
      self._state = self._state.replace(done=self._put(ended))

  def advance(self) -> None:
    """Draws more tokens, up to a chunk, after moving rows together if enough have ended."""
    least = self._fewest()
    while least and np.sum(~self._done) <= least:
      self._shrink(least)
      least = self._fewest()
    if self._step + 1 == self._first + self._chunk:
      self._draw_numbers(self._step + 1)
    last = self._first + self._chunk - 1  # tokens that will have been read
    with self._dispatch:
      if last > self._capacity:
        self._capacity = bucket(last, self._capacity)
        self._state = generate.grow(self._state, capacity=self._capacity)
      self._state, output = generate.decode(
          self._variables, self._prefix, self._state, self._places, self._on_device, self._uniform,
          np.int32(self._first), np.int32(least), config=self._config)
    self._read(output)

  def _fewest(self):
    if not self._movable:
      return 0
    limits = self.settings.max_tokens[self._ids][~self._done]
    return compaction.fewest(len(self._ids), int(limits.max()) - self._step - 1)

  def _shrink(self, rows):
    """Goes on with fewer rows: those alive, and as many others as there is room for."""
    keep = np.sort(np.argsort(self._done, kind="stable")[:rows]).astype(np.int32)
    owners, lengths = self._owners[keep], np.asarray(self._rows.lengths)
    with self._dispatch:
      if rows <= len(lengths):  # each row has a copy of its prompt: no more to read than before
        self._prefix = generate.select_prompts(self._prefix, owners)
        self._rows, self._owners = Rows(lengths[owners]), np.arange(rows)
      else:
        self._rows, self._owners = compaction.places(owners, lengths, self._width), owners
      self._state = generate.shrink(self._state, keep)
    self._ids, self._done = self._ids[keep], self._done[keep]
    self._places = self._rows
    self._on_device = jax.tree.map(lambda x: x[self._ids], self.settings)
    self._uniform = np.asarray(self._all_uniform)[:, self._ids]

  def _draw_numbers(self, first):
    """The numbers that draw the tokens of the next chunk."""
    with self._dispatch:
      self._all_uniform = generate.uniforms(self._base_key, self._identity, np.int32(first),
                                            samples=self._width, length=self._chunk)
    self._first = first
    everyone = len(self._ids) == self.tokens.shape[1]
    self._uniform = self._all_uniform if everyone else np.asarray(self._all_uniform)[:, self._ids]

  def _read(self, output):
    """Fetches what `prefill` or `decode` returned for the host."""
    began = time.perf_counter()
    tokens, logprobs, self._done, step = jax.device_get(output)
    self.waited += time.perf_counter() - began
    new = slice(self._step + 1 - self._first, int(step) + 1 - self._first)
    self._step = int(step)
    self.tokens = self._append(self.tokens, tokens[new])
    self.logprobs = self._append(self.logprobs, logprobs[new])
    self.computed += tokens[new].size

  def _append(self, old, new):
    everyone = np.zeros((len(new), old.shape[1]), old.dtype)
    everyone[:, self._ids] = new
    return np.concatenate([old, everyone])

  def _put(self, tree):
    """Distributes arrays over the mesh by their first axis, prompts or rows."""
    if self._mesh is None:
      return tree
    by_row = NamedSharding(self._mesh, sharding.partition_spec(("rows",)))
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, by_row, lambda index: x[index]), tree)
