"""The host side of sampling: requests in, samples out."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import os
import threading
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from jaxrl.models.decoder import DecoderConfig
from jaxrl.sampling import generate
from jaxrl.sampling.batching import MIN_STREAM_ROWS, layout
from jaxrl.sampling.device_call import DeviceCall
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
               streams: int | None = None, decode: Callable[[list[int]], str] | None = None):
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
    """
    if max_rows < 1:
      raise ValueError(f"sampling.max_rows={max_rows}: at least 1 row is needed")
    self._config = config
    self._mesh = mesh
    self._max_rows = max_rows
    alone = mesh is None or mesh.size == 1
    if streams is None:
      streams = _cores() if alone and jax.default_backend() == "cpu" else 1
    if streams < 1 or (streams > 1 and not alone):
      raise ValueError(f"sampling.streams={streams}: use 1 on a mesh of several devices, at least "
                       "1 elsewhere")
    self._streams = streams
    self._dispatch = threading.Lock()  # so that two threads do not compile the same program
    self._decode = decode
    self.statistics = Statistics()

  def sample(self, params, requests: Sequence[Request], base_key: jax.Array
             ) -> list[list[Sample]]:
    """`n` samples for every request, in their order.

    Args:
      params: of `Decoder(config)`, with whatever sharding they have.
      requests: any mixture of prompts, numbers of samples and settings.
      base_key: a typed threefry key (`jax.random.key(seed)`), the same for a whole run.

    Raises:
      ValueError: a request that cannot be served.
      FloatingPointError: the model returned NaN or infinite log-probabilities.
    """
    began, compiled = time.perf_counter(), generate.compilations.total()
    self._check(requests, base_key)
    self.statistics = Statistics()
    results = [[None] * request.n for request in requests]
    widest = max((request.n for request in requests), default=1)
    # A request with many samples may take the rows of several streams, so as not to be read twice.
    streams = max(1, min(self._streams, self._max_rows // max(widest, MIN_STREAM_ROWS)))
    calls = list(layout(requests, self._max_rows // streams, streams))

    def run(call):
      with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
        return self._run(params, requests, *call, base_key)

    with ThreadPoolExecutor(streams) as pool:
      outcomes = list(map(run, calls) if streams == 1 else pool.map(run, calls))
    for (slots, _), (samples, statistics) in zip(calls, outcomes):
      self.statistics.add(statistics)
      for slot, row in zip(slots, samples):
        results[slot.request][slot.first:slot.first + slot.count] = row
    self.statistics.seconds = time.perf_counter() - began
    self.statistics.compilations = generate.compilations.total() - compiled
    return results

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

  def _run(self, params, requests, slots, width, base_key):
    """Samples of one device call, per slot, and what it cost."""
    call = DeviceCall(self._config, params, requests, slots, width, base_key, self._mesh,
                      self._dispatch)
    ids, limits = call.settings.stop_ids, call.settings.max_tokens
    strings = StopStrings(self._decode, requests, slots, width)
    checked = 0
    while True:
      if strings.pending:
        strings.search(call.tokens, checked, lengths(call.tokens, ids, limits))
        checked = len(call.tokens)
        call.end(strings.found)
      if not call.alive:
        break
      call.advance()
    samples = cut(call.tokens, call.logprobs, lengths(call.tokens, ids, limits), ids, slots, width,
                  strings.found)
    _check_finite(requests, slots, samples)
    return samples, Statistics(
        device_seconds=call.waited, calls=1, slots=call.computed,
        prompt_tokens=sum(len(requests[slot.request].prompt) for slot in slots),
        tokens=sum(len(sample.tokens) for row in samples for sample in row))


def _check_finite(requests, slots, samples):
  for slot, row in zip(slots, samples):
    if not all(np.isfinite(sample.logprobs).all() for sample in row):
      raise FloatingPointError(
          f"request {requests[slot.request].key}: the model returned log-probabilities that are "
          "not finite, so its parameters probably hold NaN or infinite values; go back to an "
          "earlier checkpoint or lower the learning rate")


def _cores():
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
