"""Log-probabilities and entropy over a large vocabulary, without an array of [tokens, vocab].

The vocabulary is visited in chunks: forward with a running maximum and sum (online softmax,
arXiv:1805.02867), backward by computing the logits of each chunk again. One chunk is in memory.
"""

import functools
import math

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl import sharding
from jaxrl.models import products
from jaxrl.models import scores
from jaxrl.models.scores import NEGATIVE


def token_logits(hidden: Float[Array, "... width"], vocabulary: Float[Array, "vocab width"], *,
                 temperature: float | Array = 1.0, soft_cap: float = 0.0
                 ) -> Float[Array, "... vocab"]:
  """`cap * tanh(hidden . vocabulary / cap) / temperature` in float32.

  The product is made in the dtype of `hidden`. Sampling and training both get their logits here.
  """
  logits = jnp.einsum("...d,vd->...v", hidden, vocabulary.astype(hidden.dtype),
                      preferred_element_type=jnp.float32)
  return scores.soft_cap(logits, soft_cap) / temperature


def token_logprobs(hidden: Float[Array, "... width"], vocabulary: Float[Array, "vocab width"],
                   targets: Int[Array, "..."], *, chunk: int, temperature: float | Array = 1.0,
                   soft_cap: float = 0.0, entropy: bool = False
                   ) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
  """Log-probability of each target, and the entropy of its distribution, in float32 nats.

  With `z = token_logits(hidden, vocabulary)` and `p = softmax(z)`:

    logprob = z[target] - logsumexp(z),     entropy = logsumexp(z) - sum(p * z)

  Gradients reach `hidden` and `vocabulary`, through both outputs; that of the entropy is computed
  only when a loss depends on it. Products are made in the dtype of `hidden` and summed in float32.

  Args:
    hidden: states that predict the targets.
    vocabulary: output embedding, in any dtype; its gradient is not rounded to that of `hidden`.
    targets: token ids in [0, vocab).
    chunk: tokens of the vocabulary whose logits exist at one time; at least `vocab` is one chunk.
    temperature: positive; no gradient.
    soft_cap: `cap * tanh(logit / cap)` before the temperature; 0 is off.
    entropy: whether it is wanted; None is returned in its place otherwise.
  """
  if chunk < 1:
    raise ValueError(f"vocabulary_chunk={chunk} must be positive; the vocabulary's size or more is "
                     "one chunk")
  if isinstance(temperature, (int, float)) and temperature <= 0:
    raise ValueError(f"temperature={temperature} must be positive: greedy sampling has no "
                     "log-probabilities to train on, use those at temperature 1")
  chunks = _chunk_count(vocabulary.shape[0], chunk, sharding.axis_size("vocab"))
  return _logprobs(hidden, vocabulary, targets, jnp.float32(temperature), chunks, soft_cap,
                   entropy)


def _chunk_count(vocab, chunk, parts):
  """Number of chunks, more than needed (up to twice) where that saves padding the vocabulary.

  A chunk is every n-th token, so that a vocabulary which is split into `parts` contiguous pieces
  has the same share of every chunk on each device, if `parts` divides the size of a chunk.
  """
  least = math.ceil(vocab / chunk)
  return next((n for n in range(least, 2 * least) if vocab % (n * parts) == 0), least)


def _as_chunks(vocabulary, chunks):
  """[vocab, width] -> [size, chunks, width], padded; token `i` is in chunk `i % chunks`."""
  vocab, width = vocabulary.shape
  if chunks > 1:
    parts = sharding.axis_size("vocab")
    size = math.ceil(vocab / (chunks * parts)) * parts
    vocabulary = jnp.pad(vocabulary, ((0, size * chunks - vocab), (0, 0)))
  return sharding.constrain(vocabulary.reshape(-1, chunks, width), "vocab", None, "embed")


def _chunk_logits(hidden, table, index, vocab, temperature, cap):
  """Logits of one chunk, its embeddings, and its token ids. [..., size], [size, width], [size]"""
  embeddings = lax.dynamic_index_in_dim(table, index, 1, keepdims=False)
  # What devices gather from one another is of the dtype that is multiplied.
  embeddings = sharding.constrain(embeddings.astype(hidden.dtype), "vocab", None)
  logits = token_logits(hidden, embeddings, temperature=temperature, soft_cap=cap)
  ids = jnp.arange(table.shape[0]) * table.shape[1] + index
  if table.shape[0] * table.shape[1] > vocab:
    logits = jnp.where(ids < vocab, logits, NEGATIVE)
  return logits, embeddings, ids


def _visit(step, carry, chunks):
  """`step(carry, chunk index)` for every chunk."""
  if chunks == 1:
    return step(carry, 0)
  return lax.scan(lambda c, i: (step(c, i), None), carry, jnp.arange(chunks))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _logprobs(hidden, vocabulary, targets, temperature, chunks, cap, entropy):
  return _forward(hidden, vocabulary, targets, temperature, chunks, cap, entropy)[:2]


def _forward(hidden, vocabulary, targets, temperature, chunks, cap, entropy):
  """Returns logprobs, entropy or None, and the log of the partition function."""
  table = _as_chunks(vocabulary, chunks)

  def step(carry, index):
    # max z, sum e^(z - top), sum e^(z - top) (z - top), z[target]
    top, total, moment, chosen = carry
    logits, _, ids = _chunk_logits(hidden, table, index, vocabulary.shape[0], temperature, cap)
    higher = jnp.maximum(top, logits.max(axis=-1))
    shifted = logits - higher[..., None]
    weights, rescale = jnp.exp(shifted), jnp.exp(top - higher)
    if entropy:
      moment = rescale * (moment + total * (top - higher)) + jnp.sum(weights * shifted, axis=-1)
    total = rescale * total + jnp.sum(weights, axis=-1)
    chosen += jnp.sum(jnp.where(ids == targets[..., None], logits, 0), axis=-1)
    return higher, total, moment, chosen

  zero = jnp.zeros(targets.shape, jnp.float32)
  start = (jnp.full_like(zero, NEGATIVE), zero, zero if entropy else None, zero)
  top, total, moment, chosen = _visit(step, start, chunks)
  log_total = jnp.log(total)
  # The maximum is taken off first: it can be large, and what is left is small and precise.
  return chosen - top - log_total, log_total - moment / total if entropy else None, top + log_total


def _forward_rule(hidden, vocabulary, targets, temperature, chunks, cap, entropy):
  hidden, vocabulary, targets, temperature = (
      x.value for x in (hidden, vocabulary, targets, temperature))
  logprobs, entropies, normaliser = _forward(hidden, vocabulary, targets, temperature, chunks, cap,
                                             entropy)
  saved = (hidden, vocabulary, targets, temperature, normaliser, entropies)
  return (logprobs, entropies), saved


def _backward_rule(chunks, cap, entropy, saved, cotangents):
  """d logprob / dz = onehot - p;  d entropy / dz = -p (log p + entropy)."""
  hidden, vocabulary, targets, temperature, normaliser, entropies = saved
  to_logprob, to_entropy = cotangents
  if isinstance(to_logprob, SymbolicZero):
    to_logprob = jnp.zeros(targets.shape, jnp.float32)
  table = _as_chunks(vocabulary, chunks)
  parts = sharding.axis_size("vocab")
  parts = 1 if table.shape[0] % parts else parts

  def step(carry, index):
    to_hidden, to_table = carry
    logits, embeddings, ids = _chunk_logits(hidden, table, index, vocabulary.shape[0], temperature,
                                            cap)
    log_p = logits - normaliser[..., None]
    p = jnp.exp(log_p)
    to_logits = to_logprob[..., None] * ((ids == targets[..., None]) - p)
    if entropy and not isinstance(to_entropy, SymbolicZero):
      to_logits -= to_entropy[..., None] * p * (log_p + entropies[..., None])
    if cap:
      to_logits *= 1 - jnp.clip(logits * temperature / cap, -1, 1) ** 2  # finite on padding
    to_logits = (to_logits / temperature).astype(hidden.dtype)
    to_hidden += _sums_by_device(to_logits, embeddings, parts)
    to_embeddings = products.over_rows(hidden.ndim - 1, to_logits, hidden, jnp.float32)
    return to_hidden, lax.dynamic_update_index_in_dim(to_table, to_embeddings, index, 1)

  start = (jnp.zeros((parts, *hidden.shape), jnp.float32),
           sharding.constrain(jnp.zeros(table.shape, jnp.float32), "vocab", None, "embed"))
  to_hidden, to_table = _visit(step, start, chunks)
  to_hidden = to_hidden[0] if parts == 1 else jnp.sum(to_hidden, axis=0)
  to_vocabulary = to_table.reshape(-1, hidden.shape[-1])[:vocabulary.shape[0]]
  return to_hidden.astype(hidden.dtype), to_vocabulary.astype(vocabulary.dtype), None, None


def _sums_by_device(to_logits, embeddings, parts):
  """`to_logits @ embeddings`, the share of each device that holds a part of the vocabulary.

  The shares are added up once, after all chunks: summed here, every chunk would send an array of
  the size of the hidden states between devices. -> [parts, ..., width]
  """
  if parts == 1:
    return jnp.einsum("...v,vd->...d", to_logits, embeddings,
                      preferred_element_type=jnp.float32)[None]
  shares = jnp.einsum("...pv,pvd->p...d", to_logits.reshape(*to_logits.shape[:-1], parts, -1),
                      embeddings.reshape(parts, -1, embeddings.shape[-1]),
                      preferred_element_type=jnp.float32)
  by_rows = ("rows", *[None] * (shares.ndim - 2)) if shares.ndim > 2 else (None,)
  return sharding.constrain(shares, "vocab", *by_rows)


_logprobs.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)
