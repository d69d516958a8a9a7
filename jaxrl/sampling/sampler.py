"""The host side of sampling: requests in, samples out."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import functools
import os
import threading
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from jaxrl import sharding
from jaxrl.batch import bucket
from jaxrl.models.decoder import DecoderConfig
from jaxrl.sampling import generate
from jaxrl.sampling.batching import MIN_STREAM_ROWS, layout, pack
from jaxrl.sampling.requests import Request, Sample
from jaxrl.sampling.stopping import StopStrings, cut, lengths

CHUNK = 32  # tokens between two looks of the host
MIN_CAPACITY = 16


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
    self._shards = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
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
    prompts, identity = pack(requests, slots, self._shards)
    stop_ids, max_tokens = prompts.settings.stop_ids, prompts.settings.max_tokens
    length = capacity = bucket(int(min(max_tokens.max(), CHUNK)), MIN_CAPACITY)
    uniforms = functools.partial(generate.uniforms, base_key, self._put(identity), samples=width,
                                 length=length)
    prompts = self._put(prompts)
    with self._dispatch:
      prefix, state, output = generate.prefill(
          params, prompts, uniforms(np.int32(0)), config=self._config, capacity=capacity)
    tokens, logprobs, done, step, waited = _fetch(output)
    strings = StopStrings(self._decode, requests, slots)
    checked = 0
    while True:
      if strings.pending:
        strings.search(tokens, checked, lengths(tokens, stop_ids, max_tokens))
        checked = len(tokens)
        if strings.found:
          done = done.copy()
          done[tuple(zip(*strings.found))] = True
          state = state.replace(done=self._put(done))
      if done.all():
        break
      with self._dispatch:
        if step + length > capacity:
          capacity = bucket(int(step) + length, MIN_CAPACITY)
          state = generate.grow(state, capacity=capacity)
        state, output = generate.decode(params, prefix, state, prompts.settings,
                                        uniforms(step + 1), config=self._config)
      more_tokens, more_logprobs, done, step, seconds = _fetch(output)
      tokens = np.concatenate([tokens, more_tokens])
      logprobs = np.concatenate([logprobs, more_logprobs])
      waited += seconds
    samples = cut(tokens, logprobs, lengths(tokens, stop_ids, max_tokens), stop_ids, slots,
                  strings.found)
    _check_finite(requests, slots, samples)
    return samples, Statistics(
        device_seconds=waited, calls=1, slots=(int(step) + 1) * done.size,
        prompt_tokens=sum(len(requests[slot.request].prompt) for slot in slots),
        tokens=sum(len(sample.tokens) for row in samples for sample in row))

  def _put(self, tree):
    """Distributes arrays over the mesh by their first axis, the prompts."""
    if self._mesh is None:
      return tree
    by_prompt = NamedSharding(self._mesh, sharding.partition_spec(("rows",)))
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, by_prompt, lambda index: x[index]), tree)


def _fetch(output):
  """Results on the host, and the seconds spent waiting for them."""
  began = time.perf_counter()
  return *jax.device_get(output), time.perf_counter() - began


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
