"""The device side of sampling: prefill, and decoding in chunks.

A prompt's keys and values are computed and stored once for all its samples. Each sample is a row,
with a suffix cache of `capacity` tokens. Between chunks the host makes the suffix caches longer
(`grow`) and drops rows that have ended (`shrink`).
"""

import collections
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl import chips
from jaxrl import programs
from jaxrl import sharding
from jaxrl.models import decoder as decoder_lib
from jaxrl.models import token_logits
from jaxrl.models.cached_attention import KeyValues, LayerCache, Rows
from jaxrl.sampling import draw as draw_lib
from jaxrl.sampling import precision

compilations = collections.Counter()  # programs by the name of their function
_jit = functools.partial(programs.jit, count=compilations)


class Settings(NamedTuple):
  """How each row is sampled.

  Attributes:
    how: temperature and truncation.
    max_tokens: length at which the sample is cut.
    stop_ids: filled up with -1.
  """

  how: draw_lib.Distribution
  max_tokens: Int[Array, "rows"]
  stop_ids: Int[Array, "rows ids"]


class Prompts(NamedTuple):
  """What `prefill` reads.

  Attributes:
    tokens: padded at the end.
    lengths: tokens of each prompt.
  """

  tokens: Int[Array, "prompts length"]
  lengths: Int[Array, "prompts"]


class Identity(NamedTuple):
  """What makes the randomness of each prompt's samples.

  Attributes:
    folds, depth: `folds[p, :depth[p]]` is the key of the request.
    first: index of the first sample of each prompt within its request.
  """

  folds: Int[Array, "prompts depth"]
  depth: Int[Array, "prompts"]
  first: Int[Array, "prompts"]


@flax.struct.dataclass
class State:
  """Samples under way.

  Attributes:
    suffix: per layer (or stacked), keys [rows, kv_heads, width, capacity] and values [rows,
      kv_heads, capacity, width] of the tokens read so far, but for the latest.
    pending: of the latest token read. [rows, kv_heads, width]
    last: newest token, not read yet.
    done: ended, or padding.
    step: tokens read of every sample.
  """

  suffix: list[KeyValues] | KeyValues
  pending: list[KeyValues] | KeyValues
  last: Int[Array, "rows"]
  done: Bool[Array, "rows"]
  step: Int[Array, ""]


def uniforms(base_key: Array, identity: Identity, start: Int[Array, ""], *, samples: int,
             length: int) -> Float[Array, "length rows"]:
  """Numbers in [0, 1) for the tokens `start .. start + length` of every sample.

  Each is a function of the base key, the key of the request, the index of the sample in it and the
  index of the token, folded in that order. A program of its own, which all lengths of prompts and
  caches share.
  """
  return _drawing(chips.platform())(base_key, identity, start, samples=samples, length=length)


@functools.cache
def _drawing(platform):
  """Integers, but for the last step: with less optimisation a CPU compiles it in 0.26 instead of 0.44 s, and
  the program is as fast, with the same bits."""
  options = {"xla_backend_optimization_level": 1} if platform == "cpu" else None
  return _jit(_draw_uniforms, static_argnames=("samples", "length"), compiler_options=options)


def _draw_uniforms(base_key, identity, start, *, samples, length):
  def request_key(fold, depth):
    def step(i, key):
      return jnp.where(i < depth, jax.random.fold_in(key, fold[i]), key)
    return jax.lax.fori_loop(0, fold.shape[0], step, base_key)

  def number(key, index):
    return jax.random.uniform(jax.random.fold_in(key, index), dtype=jnp.float32)

  keys = jax.vmap(request_key)(identity.folds, identity.depth)
  indices = identity.first[:, None] + jnp.arange(samples)
  keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, indices).reshape(-1)
  numbers = jax.vmap(jax.vmap(number, (0, None)), (None, 0))(keys, start + jnp.arange(length))
  return _replicate(numbers.reshape(length, -1))


@functools.partial(_jit, static_argnames=("config", "capacity", "cache_dtype"))
def prefill(variables, prompts: Prompts, settings: Settings, padding: Bool[Array, "rows"],
            uniform: Float[Array, "length rows"], *, config: decoder_lib.DecoderConfig,
            capacity: int, cache_dtype: str = ""):
  """Reads the prompts and draws the first token of every sample.

  Args:
    variables: of `Decoder(config)`, made by `precision.reduced`.
    prompts: each has as many rows, one after the other.
    settings: of each row.
    padding: rows that nobody asked for.
    uniform: the first draws the first token.
    capacity: initial length of the suffix cache.
    cache_dtype: of keys and values, one of `precision.DTYPES`.

  Returns:
    The prompts' keys [prompts, kv_heads, width, prefix] and values [prompts, kv_heads, prefix,
    width], the state, and for the host the first tokens and log-probabilities [1, rows],
    `state.done` and `state.step`.
  """
  model = decoder_lib.Decoder(config)
  shape, rows = prompts.tokens.shape, len(padding)
  index = jnp.arange(shape[1])
  valid = index < prompts.lengths[:, None]
  hidden, prefix = model.apply(
      variables, prompts.tokens, jnp.broadcast_to(index, shape), valid.astype(jnp.int32))
  prefix = _each(functools.partial(precision.stored, dtype=cache_dtype), prefix)
  prefix = _distribute(_each(lambda kv: kv.replace(keys=kv.keys.swapaxes(-1, -2)), prefix))
  last = jnp.take_along_axis(hidden, prompts.lengths[:, None, None] - 1, axis=1)[:, 0]
  logits = jnp.repeat(_logits(config, variables, last), rows // shape[0], axis=0)

  def empty(layer, *, length):
    *layers, _, kv_heads, _, width = layer.values.shape
    def zeros(like, *shape):
      return None if like is None else jnp.zeros((*layers, rows, kv_heads, *shape), like.dtype)
    scales = (zeros(scale, *length) for scale in (layer.key_scales, layer.value_scales))
    return KeyValues(zeros(layer.keys, width, *length), zeros(layer.values, *length, width),
                     *scales)
  suffix, pending = (_distribute(_each(functools.partial(empty, length=length), prefix))
                     for length in ((capacity,), ()))
  state = State(suffix=suffix, pending=pending, last=jnp.zeros(rows, jnp.int32), done=padding,
                step=jnp.int32(0))
  state, tokens, logprobs = _extend(state, logits, uniform[0], settings)
  return prefix, state, _replicate((tokens[None], logprobs[None], state.done, state.step))


@functools.partial(_jit, static_argnames=("config",), donate_argnums=2)
def decode(variables, prefix, state: State, rows: Rows, settings: Settings,
           uniform: Float[Array, "length rows"], first: Int[Array, ""], least: Int[Array, ""], *,
           config: decoder_lib.DecoderConfig):
  """Draws the tokens up to `first + length` of every sample; stops when few samples are left.

  Args:
    variables: of `Decoder(config)`, made by `precision.reduced`.
    prefix: the prompts' cache.
    state: as returned by `prefill` or `decode`; its buffers are reused. The suffix cache must have
      room for all but the last of the tokens.
    rows: the prompts that they continue.
    settings: of each row.
    uniform: numbers that draw the tokens `first .. first + length`.
    first: index of a token.
    least: decoding stops when no more samples than this are under way.

  Returns:
    The state, and for the host the tokens and log-probabilities [length, rows], of which those from
    the old `state.step + 1 - first` up to the new are valid (but not after a sample's end),
    `state.done` and `state.step`.
  """
  model = decoder_lib.Decoder(config)

  def place(index):
    return model.apply(variables, rows, index, len(state.last), method="decode_step")

  def unfinished(carry):
    state, *_ = carry
    return (state.step + 1 < first + len(uniform)) & (jnp.sum(~state.done) > least)

  def step(carry):
    state, at, tokens, logprobs = carry
    suffix = _distribute(_store(state))
    hidden, pending = model.apply(variables, state.last, rows, at,
                                  _each(LayerCache, prefix, suffix), method="decode")
    pending = _each(_as_stored, state.pending, pending)
    state = state.replace(suffix=suffix, pending=pending, step=state.step + 1)
    i = state.step - first
    state, token, logprob = _extend(state, _logits(config, variables, hidden), uniform[i], settings)
    return state, place(state.step), tokens.at[i].set(token), logprobs.at[i].set(logprob)

  nothing = jnp.zeros(uniform.shape, jnp.int32), jnp.zeros(uniform.shape)
  state, _, tokens, logprobs = jax.lax.while_loop(
      unfinished, step, (state, place(state.step), *nothing))
  return state, _replicate((tokens, logprobs, state.done, state.step))


@functools.partial(_jit, static_argnames=("capacity",))
def grow(state: State, *, capacity: int) -> State:
  """Makes the suffix cache longer."""
  def pad(x, axis):
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, capacity - x.shape[axis]
    return jnp.pad(x, widths)
  return state.replace(suffix=_distribute(_each(functools.partial(_by_length, pad), state.suffix)))


@_jit
def shrink(state: State, keep: Int[Array, "fewer"]) -> State:
  """Some of the rows."""
  layered = isinstance(state.suffix, KeyValues)
  take = functools.partial(jnp.take, indices=keep, axis=1 if layered else 0)
  return state.replace(
      suffix=jax.tree.map(take, state.suffix), pending=jax.tree.map(take, state.pending),
      last=state.last[keep], done=state.done[keep])


@_jit
def select_prompts(prefix, keep: Int[Array, "rows"]):
  """The prompts' cache once for each of some rows.

  Args:
    prefix: as returned by `prefill`.
    keep: the prompt of each row.
  """
  axis = 1 if isinstance(prefix, KeyValues) else 0
  return jax.tree.map(lambda x: jnp.take(x, keep, axis=axis), prefix)


def _extend(state, logits, uniform, settings):
  """Draws the next token of every sample. Returns the state, tokens and log-probabilities."""
  tokens, logprobs = draw_lib.draw_tokens(logits, uniform, settings.how)
  stopped = jnp.any(tokens[:, None] == settings.stop_ids, axis=-1)
  done = state.done | stopped | (state.step + 1 >= settings.max_tokens)
  return state.replace(last=tokens, done=done), tokens, logprobs


def _logits(config, variables, hidden):
  """Soft-capped logits in float32."""
  vocabulary = decoder_lib.Decoder(config).apply(variables, method="vocabulary")
  vocabulary = sharding.constrain(vocabulary.astype(hidden.dtype), "vocab", None)
  logits = token_logits(hidden, vocabulary, soft_cap=config.logit_soft_cap)
  return sharding.constrain(logits, "rows", None)


def _store(state):
  """The suffix cache with the newest keys and values in it.

  They are stored before the cache is read for the next token, not after it was read for their own:
  a buffer that is only written to is updated in place, else XLA copies the whole cache every step.
  """
  index = jnp.maximum(state.step - 1, 0)  # at step 0 there are none yet, and index 0 is not visible

  def put(cache, axis, new):
    return jax.lax.dynamic_update_index_in_dim(cache, new, index, cache.ndim + axis)

  return _each(functools.partial(_by_length, put), state.suffix, state.pending)


def _by_length(function, cache, *others):
  """`function(array, axis of the tokens, array of others...)` of each array of a cache."""
  scales = None if cache.key_scales is None else -1
  axes = KeyValues(keys=-1, values=-2, key_scales=scales, value_scales=scales)
  return jax.tree.map(function, cache, axes, *others)


def _as_stored(old, new):
  """New keys and values in the precision of old ones."""
  return precision.stored(new, old.keys.dtype.name if old.keys.dtype != new.keys.dtype else "")


def _each(function, *layers):
  """`function` of every layer, or of all at once where they are stacked."""
  if isinstance(layers[0], KeyValues):
    return function(*layers)
  return [function(*layer) for layer in zip(*layers, strict=True)]


def _distribute(key_values):
  """Spreads caches over the mesh in context, rows and heads as in training."""
  layers = ("layers",) if isinstance(key_values, KeyValues) else ()
  names = (*layers, "rows", "kv_heads")
  return jax.tree.map(
      lambda x: sharding.constrain(x, *names, *[None] * (x.ndim - len(names))), key_values)


def _replicate(tree):
  """Results that every process reads."""
  return jax.tree.map(lambda x: sharding.constrain(x, *[None] * x.ndim), tree)
