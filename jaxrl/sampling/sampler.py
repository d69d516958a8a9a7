"""The host side of sampling: requests in, samples out."""

from collections.abc import Callable, Sequence
import dataclasses
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from jaxrl.models.decoder import DecoderConfig
from jaxrl.sampling import generate
from jaxrl.sampling.batching import layout, pack, power_of_two
from jaxrl.sampling.requests import Request, Sample
from jaxrl.sampling.stopping import StopStrings, cut, lengths

CHUNK = 32  # tokens between two looks of the host
MIN_CAPACITY = 16


@dataclasses.dataclass
class Statistics:
  """What the last call of `Sampler.sample` cost.

  Attributes:
    seconds: from call to return.
    device_seconds: thereof waiting for the device, compilation included.
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

  @property
  def waste(self) -> float:
    """Share of the computed tokens that nobody asked for."""
    return 1.0 - self.tokens / self.slots if self.slots else 0.0


class Sampler:
  """Samples continuations of prompts from a `Decoder`.

  A sample depends on its own request only, never on what it was batched with.
  """

  def __init__(self, config: DecoderConfig, *, mesh: Mesh | None = None, max_rows: int = 1024,
               decode: Callable[[list[int]], str] | None = None):
    """
    Args:
      config: of the model.
      mesh: None, or a mesh with axes `data`, `fsdp` and `tensor`; prompts are distributed over
        the first two.
      max_rows: samples computed together; more are done one call after the other.
      decode: token ids to text, for stop strings. Text must only grow with more tokens (an
        incomplete last character aside).
    """
    if max_rows < 1:
      raise ValueError(f"sampling.max_rows={max_rows}: at least 1 row is needed")
    self._config = config
    self._mesh = mesh
    self._max_rows = max_rows
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
    began, compiled = time.perf_counter(), sum(generate.compilations.values())
    self._check(requests, base_key)
    self.statistics = Statistics()
    results = [[None] * request.n for request in requests]
    for slots, width in layout(requests, self._max_rows):
      for slot, samples in zip(slots, self._run(params, requests, slots, width, base_key)):
        results[slot.request][slot.first:slot.first + slot.count] = samples
    self.statistics.seconds = time.perf_counter() - began
    self.statistics.compilations = sum(generate.compilations.values()) - compiled
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

  def _run(self, params, requests, slots, width, base_key) -> list[list[Sample]]:
    """Samples of one device call, per slot."""
    config, mesh = self._config, self._mesh
    inputs = pack(requests, slots, self._shards)
    stop_ids, max_tokens = inputs.settings.stop_ids, inputs.settings.max_tokens
    length = capacity = power_of_two(int(min(max_tokens.max(), CHUNK)), MIN_CAPACITY)
    inputs = self._put(inputs)
    prefix, state, output = generate.prefill(params, inputs, base_key, config=config, samples=width,
                                             capacity=capacity, mesh=mesh)
    tokens, logprobs, done, step = self._fetch(output)
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
      if step + length > capacity:
        capacity = power_of_two(int(step) + length, MIN_CAPACITY)
        state = generate.grow(state, capacity=capacity, config=config, mesh=mesh)
      state, output = generate.decode(params, prefix, state, inputs.settings, config=config,
                                      length=length, mesh=mesh)
      more_tokens, more_logprobs, done, step = self._fetch(output)
      tokens = np.concatenate([tokens, more_tokens])
      logprobs = np.concatenate([logprobs, more_logprobs])
    samples = cut(tokens, logprobs, lengths(tokens, stop_ids, max_tokens), stop_ids, slots,
                  strings.found)
    self._count(requests, slots, samples, (int(step) + 1) * done.size)
    return samples

  def _put(self, tree):
    """Distributes arrays over the mesh by their first axis, the prompts."""
    if self._mesh is None:
      return tree
    sharding = NamedSharding(self._mesh, PartitionSpec(("data", "fsdp")))
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)

  def _fetch(self, output):
    began = time.perf_counter()
    output = jax.device_get(output)
    self.statistics.device_seconds += time.perf_counter() - began
    return output

  def _count(self, requests, slots, samples, slots_computed):
    stats = self.statistics
    stats.calls += 1
    stats.prompt_tokens += sum(len(requests[slot.request].prompt) for slot in slots)
    stats.tokens += sum(len(sample.tokens) for row in samples for sample in row)
    stats.slots += slots_computed
    for slot, row in zip(slots, samples):
      if not all(np.isfinite(sample.logprobs).all() for sample in row):
        raise FloatingPointError(
            f"request {requests[slot.request].key}: the model returned log-probabilities that are "
            "not finite, so its parameters probably hold NaN or infinite values; go back to an "
            "earlier checkpoint or lower the learning rate")
