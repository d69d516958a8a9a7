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


class Inputs(NamedTuple):
  """What `prefill` reads.

  Attributes:
    tokens: prompts, padded at the end.
    counts: samples wanted of each prompt; 0 for padding.
    settings: of each prompt.
    folds, depth: `folds[p, :depth[p]]` is the key of the request.
    first: index of the first sample of each prompt within its request.
  """

  tokens: Int[Array, "prompts length"]
  counts: Int[Array, "prompts"]
  settings: Settings
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
    keys: PRNG key of each sample.
    last: newest token, not read yet.
    done: ended, or padding.
    step: tokens read of every sample.
  """

  suffix: list[decoder_lib.KeyValues] | decoder_lib.KeyValues
  pending: list[decoder_lib.KeyValues] | decoder_lib.KeyValues
  keys: Array
  last: Int[Array, "prompts samples"]
  done: Bool[Array, "prompts samples"]
  step: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("config", "samples", "capacity"))
def prefill(params, inputs: Inputs, base_key: Array, *, config: decoder_lib.DecoderConfig,
            samples: int, capacity: int):
  """Reads the prompts and draws the first token of every sample.

  Args:
    params: of `Decoder(config)`.
    inputs: prompts and their settings.
    base_key: folded with the key of the request, then with the index of the sample.
    samples: columns of samples; those beyond `inputs.counts` are padding.
    capacity: initial length of the suffix cache.

  Returns:
    The prompts' cache, the state, and for the host the first tokens and log-probabilities
    [1, prompts, samples], `state.done` and `state.step`.
  """
  compilations["prefill"] += 1
  model = decoder_lib.Decoder(config)
  settings, shape = inputs.settings, inputs.tokens.shape
  index = jnp.arange(shape[1])
  valid = index < settings.lengths[:, None]
  hidden, prefix = model.apply(
      {"params": params}, inputs.tokens, jnp.broadcast_to(index, shape), valid.astype(jnp.int32))
  prefix = _distribute(prefix)
  last = jnp.take_along_axis(hidden, settings.lengths[:, None, None] - 1, axis=1)
  logits = _logits(config, params, last)  # [prompts, 1, vocab]
  keys = _sample_keys(base_key, inputs, samples)
  def empty(*shape):
    return _distribute(jax.tree.map(
        lambda x: jnp.zeros(x.shape[:-2] + shape + x.shape[-1:], x.dtype), prefix))
  state = State(suffix=empty(samples, capacity), pending=empty(samples), keys=keys,
                last=jnp.zeros(keys.shape, jnp.int32),
                done=jnp.arange(samples) >= inputs.counts[:, None], step=jnp.int32(0))
  uniform = _uniforms(keys, jnp.arange(1))[0]
  state, tokens, logprobs = _extend(
      state, jnp.broadcast_to(logits, keys.shape + logits.shape[-1:]), uniform, settings, 0)
  return prefix, state, _replicate((tokens[None], logprobs[None], state.done, state.step))


@functools.partial(jax.jit, static_argnames=("config", "length"), donate_argnames=("state",))
def decode(params, prefix, state: State, settings: Settings, *, config: decoder_lib.DecoderConfig,
           length: int):
  """Draws up to `length` more tokens of every sample, fewer when all samples end.

  Args:
    params: of `Decoder(config)`.
    prefix: the prompts' cache.
    state: as returned by `prefill` or `decode`; its buffers are reused. The suffix cache must have
      room for `length` more tokens.
    settings: of each prompt.

  Returns:
    The state, and for the host the tokens and log-probabilities [length, prompts, samples], which
    mean nothing after a sample's end, `state.done` and `state.step`.
  """
  compilations["decode"] += 1
  model = decoder_lib.Decoder(config)
  start = state.step
  uniforms = _uniforms(state.keys, start + 1 + jnp.arange(length))

  def unfinished(carry):
    state, _, _ = carry
    return (state.step < start + length) & ~jnp.all(state.done)

  def step(carry):
    state, tokens, logprobs = carry
    suffix = _distribute(_store(state))
    hidden, pending = model.apply({"params": params}, state.last, settings.lengths, state.step,
                                  _layer_caches(prefix, suffix), method="decode")
    i = state.step - start
    state = state.replace(suffix=suffix, pending=pending, step=state.step + 1)
    state, token, logprob = _extend(state, _logits(config, params, hidden), uniforms[i], settings,
                                    state.step)
    return state, tokens.at[i].set(token), logprobs.at[i].set(logprob)

  shape = (length,) + state.last.shape
  state, tokens, logprobs = jax.lax.while_loop(
      unfinished, step, (state, jnp.zeros(shape, jnp.int32), jnp.zeros(shape)))
  return state, _replicate((tokens, logprobs, state.done, state.step))


@functools.partial(jax.jit, static_argnames="capacity")
def grow(state: State, *, capacity: int) -> State:
  """Makes the suffix cache longer."""
  compilations["grow"] += 1
  def pad(x):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, capacity - x.shape[-2]), (0, 0)])
  return state.replace(suffix=_distribute(jax.tree.map(pad, state.suffix)))


def _extend(state, logits, uniform, settings, index):
  """Draws token number `index` of every sample. Returns the state, tokens and log-probabilities."""
  prompts, samples = state.last.shape
  def rows(x):
    return jnp.repeat(x, samples, axis=0, total_repeat_length=prompts * samples)
  tokens, logprobs = draw_lib.draw_tokens(logits.reshape(prompts * samples, -1), uniform.reshape(-1),
                                   jax.tree.map(rows, settings.how))
  tokens, logprobs = tokens.reshape(prompts, samples), logprobs.reshape(prompts, samples)
  stopped = jnp.any(tokens[..., None] == settings.stop_ids[:, None], axis=-1)
  done = state.done | stopped | (index + 1 >= settings.max_tokens[:, None])
  return state.replace(last=tokens, done=done), tokens, logprobs


def _logits(config, params, hidden):
  """Soft-capped logits in float32."""
  vocabulary = decoder_lib.Decoder(config).apply({"params": params}, method="vocabulary")
  vocabulary = sharding.constrain(vocabulary.astype(hidden.dtype), "vocab", None)
  logits = jnp.einsum("psd,vd->psv", hidden, vocabulary, preferred_element_type=jnp.float32)
  logits = sharding.constrain(logits, "rows", None, None)
  return decoder_lib.soft_cap(logits, config.logit_soft_cap)


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


def _sample_keys(base_key, inputs, samples):
  """One PRNG key per sample. [prompts, samples]"""
  def request_key(fold, depth):
    def step(i, key):
      return jnp.where(i < depth, jax.random.fold_in(key, fold[i]), key)
    return jax.lax.fori_loop(0, fold.shape[0], step, base_key)
  keys = jax.vmap(request_key)(inputs.folds, inputs.depth)
  indices = inputs.first[:, None] + jnp.arange(samples)
  return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, indices)


def _uniforms(keys, indices):
  """A number in [0, 1) for each token index and sample. [indices, prompts, samples]"""
  def one(index, key):
    return jax.random.uniform(jax.random.fold_in(key, index), dtype=jnp.float32)
  flat = keys.reshape(-1)
  values = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(indices, flat)
  return values.reshape(indices.shape + keys.shape)


def _distribute(key_values):
  """Spreads caches over the mesh in context, prompts and heads as in training."""
  layers = ("layers",) if isinstance(key_values, decoder_lib.KeyValues) else ()
  names = (*layers, "rows", "kv_heads")
  return jax.tree.map(
      lambda x: sharding.constrain(x, *names, *[None] * (x.ndim - len(names))), key_values)


def _replicate(tree):
  """Results that every process reads."""
  return jax.tree.map(lambda x: sharding.constrain(x, *[None] * x.ndim), tree)
