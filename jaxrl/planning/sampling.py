"""What sampling takes: the calls of the sampler that a phase makes, by the sampler's own rules."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxrl import sharding
from jaxrl.models import DecoderConfig
from jaxrl.models.cached_attention import KeyValues, Rows
from jaxrl.planning import programs
from jaxrl.planning.programs import Program
from jaxrl.sampling import Request
from jaxrl.sampling import batching
from jaxrl.sampling import generate
from jaxrl.sampling import precision
from jaxrl.sampling.device_call import capacities
from jaxrl.training import pieces
from jaxrl.training import state as states


@dataclasses.dataclass(frozen=True)
class Call:
  """One call of the sampler.

  Attributes:
    what: it is for: rollouts or an evaluation.
    requests, slots, width: as in `batching.layout`.
    together: calls like it that are under way at the same time.
  """

  what: str
  requests: Sequence[Request]
  slots: Sequence[batching.Slot]
  width: int
  together: int

  @property
  def rows(self) -> int:
    """Samples, without padding."""
    return sum(slot.count for slot in self.slots)


@dataclasses.dataclass(frozen=True)
class Sampling:
  """The calls under way at once that need most, on one device.

  Attributes:
    what: they are for.
    rows, prompt, tokens: samples, and tokens of a prompt and of a response.
    weights, cache: bytes of parameters in another precision, and of keys and values at their longest.
    program: beside these, what reading prompts, decoding and making caches longer take.
  """

  what: str
  rows: int
  prompt: int
  tokens: int
  weights: float
  cache: float
  program: Program

  @property
  def bytes(self) -> float:
    """All of it."""
    return self.weights + self.cache + self.program.added


def calls_of(phase: Any, prompt: int, problems: int, mesh: jax.sharding.Mesh) -> list[Call]:
  """Calls for an update, and for the evaluations around a phase.

  Args:
    phase: a `training.phases.Phase`.
    prompt: tokens of each prompt.
    problems: held out; 0 if there are none.
    mesh: that samples.
  """
  s, params = phase.settings, pieces.sampling(phase.settings.rollout, (0,))
  wanted = []
  if phase.kind == "rl":
    wanted.append(("rollouts", s.rollout.prompts, s.rollout.episode.get("samples", 1)))
  if problems:
    wanted += [("greedy evaluation", problems, 1), ("sampled evaluation", problems, s.evaluate.samples)]
  streams, shards = sharding.streams(mesh), mesh.shape["data"] * mesh.shape["fsdp"]
  found = []
  for what, prompts, samples in wanted:
    if samples:
      requests = [Request([0] * max(prompt, 1), samples, (0, 0, i), params) for i in range(prompts)]
      count = batching.streams_for(samples, s.rollout.max_rows, streams)
      calls = list(batching.layout(requests, s.rollout.max_rows // count, count, shards))
      found += [Call(what, requests, *call, min(count, len(calls))) for call in calls]
  return found


class Planner:
  """Programs of calls; those of the same shape are traced and compiled once."""

  def __init__(self, config: ml_collections.ConfigDict, decoder: DecoderConfig, mesh: jax.sharding.Mesh):
    self._decoder, self._mesh, self._rollout = decoder, mesh, config.rollout
    self._params = states.abstract_parameters(decoder, mesh)["params"]
    self._traced: dict[tuple, _Traced] = {}
    self._measured: dict[int, Sampling] = {}

  def largest(self, calls: Sequence[Call]) -> Sampling | None:
    """What the calls need that need most."""
    if not calls:
      return None
    call = max(calls, key=lambda c: self._trace(c).cache * c.together)
    traced = self._trace(call)
    if id(traced) not in self._measured:
      self._measured[id(traced)] = self._measure(call, traced)
    return self._measured[id(traced)]

  def flops(self, calls: Sequence[Call]) -> float:
    """Of calls whose samples all reach their full length, over all devices."""
    return sum(self._trace(call).flops for call in calls)

  def _measure(self, call, traced):
    with jax.set_mesh(self._mesh):
      prefill, decode = (programs.measure([program], trips=1) for program in (traced.prefill, traced.decode))
    # Caches begin short and are copied into longer ones.
    added = max(decode.added, prefill.added - traced.cache, traced.suffix / 2 if traced.grows else 0.0)
    params = call.requests[0].params
    return Sampling(call.what, call.rows * call.together, len(call.requests[0].prompt), params.max_tokens,
                    traced.weights, traced.cache * call.together,
                    Program(added * call.together, traced.flops, prefill.refused or decode.refused))

  def _trace(self, call):
    packed = batching.pack(call.requests, call.slots, call.width,
                           self._mesh.shape["data"] * self._mesh.shape["fsdp"])
    key = (packed.prompts.tokens.shape, packed.padding.shape, call.requests[0].params.max_tokens)
    if key not in self._traced:
      self._traced[key] = self._trace_packed(packed, call.requests[0].params.max_tokens)
    return self._traced[key]

  def _trace_packed(self, packed, longest):
    by_row = jax.NamedSharding(self._mesh, sharding.partition_spec(("rows",)))
    prompts, settings, padding, places = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=by_row),
        (packed.prompts, packed.settings, packed.padding, Rows(packed.prompts.lengths)))
    everywhere = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.replicated(self._mesh))
    chunk, first, last = capacities(longest)
    uniform, number = everywhere((chunk, len(packed.padding)), jnp.float32), everywhere((), jnp.int32)
    with jax.set_mesh(self._mesh):
      variables, weights = self._variables()
      given = dict(config=self._decoder, cache_dtype=self._rollout.cache_dtype)
      read = functools.partial(generate.prefill.trace, variables, prompts, settings, padding, uniform, **given)
      prefill = read(capacity=first)
      prefix, state, _ = (prefill if first == last else read(capacity=last)).out_info
      place = functools.partial(self._cached, layers=("layers",) * isinstance(prefix, KeyValues))
      prefix, state = (jax.tree.map(place, x, is_leaf=_is_cache) for x in (prefix, state))
      decode = generate.decode.trace(variables, prefix, state, places, settings, uniform, number, number,
                                     config=self._decoder)
    of_token = programs.flops.count(decode)
    suffix = sharding.bytes_of(state.suffix)
    return _Traced(prefill, decode, weights, sharding.bytes_of(prefix) + suffix, suffix, first < last,
                   programs.flops.count(prefill) + (longest - 1) * of_token)

  def _variables(self):
    """What samples, and the bytes that it takes beside the parameters."""
    dtype = self._rollout.weights_dtype
    if not dtype:
      return {"params": self._params}, 0.0
    reduced = jax.eval_shape(functools.partial(precision.reduced, dtype=dtype), self._params)
    shapes = jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding),
                          reduced["params"], self._params)
    scales = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding.replicated(self._mesh)), reduced.get("scales", {}))
    copied = [x for x, p in zip(jax.tree.leaves(shapes), jax.tree.leaves(self._params)) if x.dtype != p.dtype]
    added = sharding.bytes_of((copied, scales))
    return {"params": shapes, **({"scales": scales} if scales else {})}, added

  def _cached(self, leaf, layers):
    """Keys and values spread over rows and heads, as the sampler does; all else everywhere."""
    if not _is_cache(leaf):
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(self._mesh))

    def spread(x):
      names = (*layers, "rows", "kv_heads", *[None] * (x.ndim - len(layers) - 2))
      spec = sharding.partition_spec([
          name if name and size % sharding.axis_size(name) == 0 else None for size, name in zip(x.shape, names)])
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(self._mesh, spec))
    return jax.tree.map(spread, leaf)


@dataclasses.dataclass(frozen=True)
class _Traced:
  """Programs of a call; bytes of weights, of the whole cache and of its suffixes on one device."""

  prefill: jax.stages.Traced
  decode: jax.stages.Traced
  weights: float
  cache: float
  suffix: float
  grows: bool
  flops: float


def _is_cache(leaf):
  return isinstance(leaf, KeyValues)
