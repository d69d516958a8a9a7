"""The device side of sampling: prefill, and decoding in chunks.

Samples are laid out `[prompts, samples]`. A prompt's keys and values are computed and stored once;
each sample owns a suffix cache of `capacity` tokens, which the host makes longer between chunks.
"""

import collections
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl import sharding
from jaxrl.models import decoder as decoder_lib
from jaxrl.models import token_logits
from jaxrl.sampling import draw as draw_lib

compilations = collections.Counter()  # jit runs a Python body once for each program it compiles


@flax.struct.dataclass
class Settings:
  """Per prompt, what its samples have in common.

  Attributes:
    how: temperature and truncation.
    max_tokens: length at which samples are cut.
    stop_ids: filled up with -1.
    lengths: tokens of the prompt.
  """

  how: draw_lib.Distribution
  max_tokens: Int[Array, "prompts"]
  stop_ids: Int[Array, "prompts ids"]
  lengths: Int[Array, "prompts"]


class Prompts(NamedTuple):
  """What `prefill` reads.

  Attributes:
    tokens: padded at the end.
    counts: samples wanted of each prompt; 0 for padding.
    settings: of each prompt.
  """

  tokens: Int[Array, "prompts length"]
  counts: Int[Array, "prompts"]
  settings: Settings


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
    suffix: per layer (or stacked), keys and values of the tokens read so far, but for the latest.
      [prompts, kv_heads, samples, capacity, width]
    pending: of the latest token read. [prompts, kv_heads, samples, width]
    last: newest token, not read yet.
    done: ended, or padding.
    step: tokens read of every sample.
  """

  suffix: list[decoder_lib.KeyValues] | decoder_lib.KeyValues
  pending: list[decoder_lib.KeyValues] | decoder_lib.KeyValues
  last: Int[Array, "prompts samples"]
  done: Bool[Array, "prompts samples"]
  step: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("samples", "length"))
def uniforms(base_key: Array, identity: Identity, start: Int[Array, ""], *, samples: int,
             length: int) -> Float[Array, "length prompts samples"]:
  """Numbers in [0, 1) for the tokens `start .. start + length` of every sample.

  Each is a function of the base key, the key of the request, the index of the sample in it and the
  index of the token, folded in that order. A program of its own, which all lengths of prompts and
  caches share.
  """
  compilations["uniforms"] += 1

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
  return numbers.reshape(length, -1, samples)


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def prefill(params, prompts: Prompts, uniform: Float[Array, "length prompts samples"], *,
            config: decoder_lib.DecoderConfig, capacity: int):
  """Reads the prompts and draws the first token of every sample.

  Args:
    params: of `Decoder(config)`.
    prompts: and their settings.
    uniform: the first draws the first token. Samples beyond `prompts.counts` are padding.
    capacity: initial length of the suffix cache.

  Returns:
    The prompts' cache, the state, and for the host the first tokens and log-probabilities
    [1, prompts, samples], `state.done` and `state.step`.
  """
  compilations["prefill"] += 1
  model = decoder_lib.Decoder(config)
  settings, shape, uniform = prompts.settings, prompts.tokens.shape, uniform[0]
  index = jnp.arange(shape[1])
  valid = index < settings.lengths[:, None]
  hidden, prefix = model.apply(
      {"params": params}, prompts.tokens, jnp.broadcast_to(index, shape), valid.astype(jnp.int32))
  prefix = _distribute(prefix)
  last = jnp.take_along_axis(hidden, settings.lengths[:, None, None] - 1, axis=1)
  logits = _logits(config, params, last)  # [prompts, 1, vocab]
  def empty(*shape):
    return _distribute(jax.tree.map(
        lambda x: jnp.zeros(x.shape[:-2] + shape + x.shape[-1:], x.dtype), prefix))
  state = State(suffix=empty(uniform.shape[1], capacity), pending=empty(uniform.shape[1]),
                last=jnp.zeros(uniform.shape, jnp.int32),
                done=jnp.arange(uniform.shape[1]) >= prompts.counts[:, None], step=jnp.int32(0))
  state, tokens, logprobs = _extend(
      state, jnp.broadcast_to(logits, uniform.shape + logits.shape[-1:]), uniform, settings)
  return prefix, state, _replicate((tokens[None], logprobs[None], state.done, state.step))


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("state",))
def decode(params, prefix, state: State, settings: Settings,
           uniform: Float[Array, "length prompts samples"], *, config: decoder_lib.DecoderConfig):
  """Draws up to `length` more tokens of every sample, fewer when all samples end.

  Args:
    params: of `Decoder(config)`.
    prefix: the prompts' cache.
    state: as returned by `prefill` or `decode`; its buffers are reused. The suffix cache must have
      room for `length` more tokens.
    settings: of each prompt.
    uniform: numbers that draw the tokens.

  Returns:
    The state, and for the host the tokens and log-probabilities [length, prompts, samples], which
    mean nothing after a sample's end, `state.done` and `state.step`.
  """
  compilations["decode"] += 1
  model = decoder_lib.Decoder(config)
  start = state.step

  def unfinished(carry):
    state, _, _ = carry
    return (state.step < start + len(uniform)) & ~jnp.all(state.done)

  def step(carry):
    state, tokens, logprobs = carry
    suffix = _distribute(_store(state))
    hidden, pending = model.apply({"params": params}, state.last, settings.lengths, state.step,
                                  _layer_caches(prefix, suffix), method="decode")
    i = state.step - start
    state = state.replace(suffix=suffix, pending=pending, step=state.step + 1)
    state, token, logprob = _extend(state, _logits(config, params, hidden), uniform[i], settings)
    return state, tokens.at[i].set(token), logprobs.at[i].set(logprob)

  nothing = jnp.zeros(uniform.shape, jnp.int32), jnp.zeros(uniform.shape)
  state, tokens, logprobs = jax.lax.while_loop(unfinished, step, (state, *nothing))
  return state, _replicate((tokens, logprobs, state.done, state.step))


@functools.partial(jax.jit, static_argnames="capacity")
def grow(state: State, *, capacity: int) -> State:
  """Makes the suffix cache longer."""
  compilations["grow"] += 1
  def pad(x):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, capacity - x.shape[-2]), (0, 0)])
  return state.replace(suffix=_distribute(jax.tree.map(pad, state.suffix)))


def _extend(state, logits, uniform, settings):
  """Draws the next token of every sample. Returns the state, tokens and log-probabilities."""
  prompts, samples = state.last.shape
  rows = prompts * samples
  how = jax.tree.map(lambda x: jnp.repeat(x, samples, total_repeat_length=rows), settings.how)
  tokens, logprobs = draw_lib.draw_tokens(logits.reshape(rows, -1), uniform.reshape(rows), how)
  tokens, logprobs = tokens.reshape(prompts, samples), logprobs.reshape(prompts, samples)
  stopped = jnp.any(tokens[..., None] == settings.stop_ids[:, None], axis=-1)
  done = state.done | stopped | (state.step + 1 >= settings.max_tokens[:, None])
  return state.replace(last=tokens, done=done), tokens, logprobs


def _logits(config, params, hidden):
  """Soft-capped logits in float32."""
  vocabulary = decoder_lib.Decoder(config).apply({"params": params}, method="vocabulary")
  vocabulary = sharding.constrain(vocabulary.astype(hidden.dtype), "vocab", None)
  logits = token_logits(hidden, vocabulary, soft_cap=config.logit_soft_cap)
  return sharding.constrain(logits, "rows", None, None)


def _store(state):
  """The suffix cache with the newest keys and values in it.

  They are stored before the cache is read for the next token, not after it was read for their own:
  a buffer that is only written to is updated in place, else XLA copies the whole cache every step.
  """
  index = jnp.maximum(state.step - 1, 0)  # at step 0 there are none yet, and index 0 is not visible
  return jax.tree.map(
      lambda cache, new: jax.lax.dynamic_update_index_in_dim(cache, new, index, cache.ndim - 2),
      state.suffix, state.pending)


def _layer_caches(prefix, suffix):
  def join(prefix, suffix):
    return decoder_lib.LayerCache(prefix.keys, prefix.values, suffix.keys, suffix.values)
  if isinstance(prefix, decoder_lib.KeyValues):
    return join(prefix, suffix)
  return [join(p, s) for p, s in zip(prefix, suffix, strict=True)]


def _distribute(key_values):
  """Spreads caches over the mesh in context, prompts and heads as in training."""
  layers = ("layers",) if isinstance(key_values, decoder_lib.KeyValues) else ()
  names = (*layers, "rows", "kv_heads")
  return jax.tree.map(
      lambda x: sharding.constrain(x, *names, *[None] * (x.ndim - len(names))), key_values)


def _replicate(tree):
  """Results that every process reads."""
  return jax.tree.map(lambda x: sharding.constrain(x, *[None] * x.ndim), tree)
