"""Chooses one token from each row of logits.

One uniform number per row is looked up in the cumulative distribution, in two levels (blocks of the
vocabulary, then one block), so that a draw reads the logits twice and writes nothing of their size.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class Distribution:
  """How logits become a distribution, per row. Values are traced: changing them compiles nothing.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token (the lowest id among equals).
    top_k: keep the `top_k` most likely tokens, and those equal to the last of them; 0 is off.
    top_p: then keep the fewest tokens, most likely first, that hold this much of the remaining
      probability (nucleus sampling, arXiv:1904.09751); 1 is off.
    min_p: then keep tokens at least this likely relative to the most likely one
      (arXiv:2407.01082); 0 is off.
  """

  temperature: Float[Array, "rows"]
  top_k: Int[Array, "rows"]
  top_p: Float[Array, "rows"]
  min_p: Float[Array, "rows"]


def draw_tokens(logits: Float[Array, "rows vocab"], uniform: Float[Array, "rows"],
                how: Distribution) -> tuple[Int[Array, "rows"], Float[Array, "rows"]]:
  """Tokens, and their log-probabilities before truncation.

  Args:
    logits: in float32, soft-capped if the model does so.
    uniform: one number in [0, 1) per row.
    how: temperature and truncation of each row.

  Returns:
    Token ids, and `log_softmax(logits / temperature)` of each: the distribution that a trainer
    evaluates, so top-k, top-p and min-p do not renormalise it. At temperature 0 it is that of
    temperature 1.
  """
  greedy = how.temperature <= 0
  scaled = logits / jnp.where(greedy, 1.0, how.temperature)[:, None]
  top = jnp.max(scaled, axis=-1)
  log_total = jnp.log(jnp.sum(jnp.exp(scaled - top[:, None]), axis=-1))
  lowest = jnp.where(greedy, top, truncation(scaled, top, how))
  blocks = _blocks(scaled)  # [rows, blocks, block]
  top_, lowest_ = top[:, None, None], lowest[:, None, None]
  sums = jnp.sum(_weights(blocks, top_, lowest_), axis=-1)
  cumulative = _cumsum(sums)
  threshold = jnp.where(greedy, 0.0, uniform) * cumulative[:, -1]
  index = _first_above(cumulative, sums, threshold)
  block = jnp.take_along_axis(blocks, index[:, None, None], axis=1)[:, 0]
  weights = _weights(block, top[:, None], lowest[:, None])
  before = jnp.take_along_axis(cumulative - sums, index[:, None], axis=1)[:, 0]
  within = _first_above(_cumsum(weights), weights, threshold - before)
  chosen = jnp.take_along_axis(block, within[:, None], axis=1)[:, 0]
  return index * blocks.shape[-1] + within, chosen - top - log_total


def truncation(scaled: Float[Array, "rows vocab"], top: Float[Array, "rows"], how: Distribution
               ) -> Float[Array, "rows"]:
  """The lowest value of `scaled` that top-k, top-p and min-p keep; costs nothing where unused.

  Args:
    scaled: logits divided by the temperature.
    top: their maximum.
    how: the truncation of each row.
  """
  lowest = jnp.full_like(top, -jnp.inf)

  def by_count(lowest):
    found = _largest_holding(scaled, jnp.ones_like(scaled), how.top_k.astype(jnp.float32))
    return jnp.where(how.top_k > 0, found, lowest)

  def by_mass(lowest):
    mass = _weights(scaled, top[:, None], lowest[:, None])
    found = _largest_holding(scaled, mass, how.top_p * jnp.sum(mass, axis=-1))
    return jnp.where(how.top_p < 1, jnp.maximum(lowest, found), lowest)

  lowest = jax.lax.cond(jnp.any(how.top_k > 0), by_count, lambda x: x, lowest)
  lowest = jax.lax.cond(jnp.any(how.top_p < 1), by_mass, lambda x: x, lowest)
  return jnp.maximum(lowest, top + jnp.log(how.min_p))


def _largest_holding(values, mass, needed):
  """Per row, the largest v such that the mass of all `values >= v` is at least `needed`.

  Bisects the 32 bits of the ordered floats: exact, and far cheaper than a sort. [rows]
  """
  ordered = _ordered(values)
  needed = jnp.minimum(needed, jnp.sum(mass, axis=-1))

  def step(bit, found):
    # The sign bit is the highest: adding it to the smallest integer gives 0.
    candidate = found + jnp.left_shift(jnp.int32(1), 31 - bit)
    held = jnp.sum(jnp.where(ordered >= candidate[:, None], mass, 0.0), axis=-1)
    return jnp.where(held >= needed, candidate, found)

  smallest = jnp.full(values.shape[:1], jnp.iinfo(jnp.int32).min, jnp.int32)
  return _unordered(jax.lax.fori_loop(0, 32, step, smallest))


def _ordered(x):
  """Integers in the order of the floats."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _unordered(bits):
  return jax.lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits),
                                      jnp.float32)


def _weights(scaled, top, lowest):
  """Probabilities up to a factor, 0 for what is cut off."""
  return jnp.where(scaled >= lowest, jnp.exp(scaled - top), 0.0)


def _blocks(x):
  """Splits the vocabulary into about sqrt(vocab) blocks, padded with impossible tokens."""
  rows, vocab = x.shape
  block = 2 ** math.ceil(math.log2(max(vocab, 4)) / 2)
  x = jnp.pad(x, ((0, 0), (0, -vocab % block)), constant_values=-jnp.inf)
  return x.reshape(rows, -1, block)


def _cumsum(x):
  """Running sums of short rows, as a product with a triangle of ones (faster than a scan)."""
  ones = jnp.triu(jnp.ones((x.shape[-1], x.shape[-1]), x.dtype))
  return jnp.dot(x, ones, precision=jax.lax.Precision.HIGHEST)


def _first_above(cumulative, weights, threshold):
  """First index of positive weight whose running sum exceeds the threshold. [rows]

  Rounding can leave the threshold at or above the last sum; the last positive index is taken then.
  """
  index = jnp.arange(weights.shape[-1])
  positive = weights > 0
  above = positive & (cumulative > threshold[:, None])
  first = jnp.min(jnp.where(above, index, weights.shape[-1]), axis=-1)
  last = jnp.max(jnp.where(positive, index, 0), axis=-1)
  return jnp.minimum(first, last)
