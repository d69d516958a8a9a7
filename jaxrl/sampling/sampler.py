"""The host side of sampling: requests in, samples out."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import threading
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from jaxrl import sharding
from jaxrl.models.decoder import DecoderConfig
from jaxrl.sampling import generate, precision
from jaxrl.sampling.batching import layout, streams_for
from jaxrl.sampling.device_call import CHUNK, DeviceCall
from jaxrl.sampling.requests import Request, Sample
from jaxrl.sampling.stopping import StopStrings, cut, lengths


@dataclasses.dataclass
class Statistics:
  """What the last call of `Sampler.sample` cost.

  Attributes:
    seconds: from call to return.
    device_seconds: waiting for the device, summed over calls that ran at the same time.
    calls: device batches.
    prompt_tokens: read, without padding.
    tokens: returned.
    slots: tokens that the device computed for all rows, padding and ended rows included.
    compilations: programs compiled.
  """

  seconds: float = 0.0
  device_seconds: float = 0.0
  calls: int = 0
  prompt_tokens: int = 0
  tokens: int = 0
  slots: int = 0
  compilations: int = 0

  def add(self, other: "Statistics") -> None:
    """Adds the figures of another call."""
    for field in dataclasses.fields(self):
      setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

  @property
  def waste(self) -> float:
    """Share of the computed tokens that nobody asked for."""
    return 1.0 - self.tokens / self.slots if self.slots else 0.0


class Sampler:
  """Samples continuations of prompts from a `Decoder`.

  A sample depends on its own request only, never on what it was batched with.
  """

  def __init__(self, config: DecoderConfig, *, mesh: Mesh | None = None, max_rows: int = 1024,
               streams: int | None = None, decode: Callable[[list[int]], str] | None = None,
               weights_dtype: str = "", cache_dtype: str = "", chunk: int = CHUNK):
    """
    Args:
      config: of the model.
      mesh: None, or one of `sharding.make_mesh`; prompts are distributed over `data` and `fsdp`.
      max_rows: samples computed at the same time; more are done one device call after the other.
      streams: device calls under way at the same time, which share `max_rows`. None means one per
        core on a CPU, where the matrix products of a small model keep one core busy each, and one
        elsewhere and on several devices, whose processes must agree on the order of calls.
      decode: token ids to text, for stop strings. Text must only grow with more tokens (an
        incomplete last character aside).
      weights_dtype, cache_dtype: of matrices, and of keys and values; one of `precision.DTYPES`.
      chunk: tokens between two looks of the host, a power of two. Samples do not depend on it.

    Raises:
      ValueError: a value out of range.
    """
    if max_rows < 1:
      raise ValueError(f"sampling.max_rows={max_rows}: at least 1 row is needed")
    for name, dtype in (("weights_dtype", weights_dtype), ("cache_dtype", cache_dtype)):
      if dtype not in precision.DTYPES:
        raise ValueError(f"config.rollout.{name}={dtype!r} is none of {precision.DTYPES}; \"\" is the "
                         "model's own")
    if chunk < 1 or chunk & (chunk - 1):
      raise ValueError(f"sampling.chunk={chunk}: use a power of two, such as {CHUNK}")
    self._weights_dtype, self._cache_dtype, self._chunk = weights_dtype, cache_dtype, chunk
    self._config = config
    self._mesh = mesh
    self._max_rows = max_rows
    alone = mesh is None or mesh.size == 1
    if streams is None:
      streams = sharding.streams(mesh)
    if streams < 1 or (streams > 1 and not alone):
      raise ValueError(f"sampling.streams={streams}: use 1 on a mesh of several devices, at least "
                       "1 elsewhere")
    self._streams = streams
    self._dispatch = threading.Lock()  # so that two threads do not compile the same program
    self._decode = decode
    self.statistics = Statistics()

  def sample(self, params, requests: Sequence[Request], base_key: jax.Array, *,
             on_done: Callable[[int, list[Sample]], None] | None = None,
             on_tokens: Callable[[int, int, np.ndarray], None] | None = None) -> list[list[Sample]]:
    """`n` samples for every request, in their order.

    Args:
      params: of `Decoder(config)`, with whatever sharding they have.
      requests: any mixture of prompts, numbers of samples and settings.
      base_key: a typed threefry key (`jax.random.key(seed)`), the same for a whole run.
      on_done: is given the index of a request and its samples as soon as all of them have ended,
        while others may still be under way; from any thread.
      on_tokens: is given the index of a request, that of one of its samples and the tokens of it so far,
        whenever the host has looked; likewise.

    Raises:
      ValueError: a request that cannot be served.
      FloatingPointError: the model returned NaN or infinite log-probabilities.
    """
    began, compiled = time.perf_counter(), generate.compilations.total()
    self._check(requests, base_key)
    self.statistics = Statistics()
    results = _Results(requests, on_done, on_tokens)
    widest = max((request.n for request in requests), default=1)
    streams = streams_for(widest, self._max_rows, self._streams)
    shards = self._mesh.shape["data"] * self._mesh.shape["fsdp"] if self._mesh else 1
    calls = list(layout(requests, self._max_rows // streams, streams, shards))

    def context():
      return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()

    with context():
      variables = {"params": params}
      if self._weights_dtype:
        variables = precision.reduced(params, dtype=self._weights_dtype)

    def run(call):
      with context():
        return self._run(variables, requests, *call, base_key, results)

    with ThreadPoolExecutor(streams) as pool:
      outcomes = list(map(run, calls) if streams == 1 else pool.map(run, calls))
    for statistics in outcomes:
      self.statistics.add(statistics)
    self.statistics.seconds = time.perf_counter() - began
    self.statistics.compilations = generate.compilations.total() - compiled
    return results.samples

  def _check(self, requests, base_key):
    if not (isinstance(base_key, jax.Array) and jnp.issubdtype(base_key.dtype, jax.dtypes.prng_key)
            and str(jax.random.key_impl(base_key)) == "threefry2x32"):
      raise ValueError("base_key must be a typed threefry key, jax.random.key(seed, "
                       "impl='threefry2x32'): with other generators a sample would depend on its "
                       "neighbours")
    vocab = self._config.vocab_size
    for request in requests:
      worst = max(request.prompt) if min(request.prompt) >= 0 else min(request.prompt)
      if not 0 <= worst < vocab:
        raise ValueError(f"request {request.key}: prompt token {worst} is not in the model's "
                         f"vocabulary of {vocab}")
      if request.params.stop_strings and self._decode is None:
        raise ValueError(f"request {request.key}: stop_strings={request.params.stop_strings} need "
                         "a sampler that can decode: Sampler(..., decode=tokenizer.decode)")

  def _run(self, variables, requests, slots, width, base_key, results):
    """Makes the samples of one device call; returns what it cost."""
    call = DeviceCall(self._config, variables, requests, slots, width, base_key, self._mesh,
                      self._dispatch, self._cache_dtype, self._chunk)
    ids, limits = call.settings.stop_ids, call.settings.max_tokens
    strings = StopStrings(self._decode, requests, slots, width)
    checked, open_slots = 0, dict(enumerate(slots))
    while True:
      if strings.pending:
        strings.search(call.tokens, checked, lengths(call.tokens, ids, limits))
        checked = len(call.tokens)
        call.end(strings.found)
      under_way = call.under_way
      for place, slot in list(open_slots.items()):
        rows = range(place * width, place * width + slot.count)
        results.watch(slot, call.tokens[:, rows], ids[rows], limits[rows])
        if not under_way[rows].any():
          ended = lengths(call.tokens[:, rows], ids[rows], limits[rows])
          samples = cut(call.tokens[:, rows], call.logprobs[:, rows], ended, ids[rows],
                        range(slot.count), {row - rows.start: strings.found[row] for row in rows
                                            if row in strings.found})
          results.add(open_slots.pop(place), samples)
      if not open_slots:
        break
      call.advance()
    return Statistics(
        device_seconds=call.waited, calls=1, slots=call.computed,
        prompt_tokens=sum(len(requests[slot.request].prompt) for slot in slots),
        tokens=sum(results.tokens(slot) for slot in slots))


class _Results:
  """Samples by request, filled by several threads."""

  def __init__(self, requests, on_done, on_tokens):
    self.samples = [[None] * request.n for request in requests]
    self._requests, self._on_done, self._on_tokens = requests, on_done, on_tokens
    self._lock = threading.Lock()
    self._missing = [request.n for request in requests]

  def watch(self, slot, tokens, stop_ids, limits):
    """Hands on what there is of the samples of a slot, if anybody reads along."""
    if self._on_tokens:
      for sample, length in enumerate(lengths(tokens, stop_ids, limits)):
        self._on_tokens(slot.request, slot.first + sample, tokens[:length, sample])

  def add(self, slot, samples):
    """Takes the samples of a slot; hands the request on if they were its last."""
    if not all(np.isfinite(sample.logprobs).all() for sample in samples):
      raise FloatingPointError(
          f"request {self._requests[slot.request].key}: the model returned log-probabilities that "
          "are not finite, so its parameters probably hold NaN or infinite values; go back to an "
          "earlier checkpoint or lower the learning rate")
    with self._lock:
      self.samples[slot.request][slot.first:slot.first + slot.count] = samples
      self._missing[slot.request] -= slot.count
      complete = not self._missing[slot.request]
    if complete and self._on_done:
      self._on_done(slot.request, self.samples[slot.request])

  def tokens(self, slot):
    """Tokens of all samples of a slot."""
    mine = self.samples[slot.request][slot.first:slot.first + slot.count]
    return sum(len(sample.tokens) for sample in mine)
