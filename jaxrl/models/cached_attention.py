"""Attention of newly sampled tokens over a cache: one token per row, many rows per prompt.

The keys and values of a prompt are stored and read once for all the rows that continue it; each row
owns a suffix. Keys lie transposed, so that both products of a row are plain batched products, which
XLA's CPU backend runs several times faster than those with a transposed operand.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl.models import scores
from jaxrl.models.scores import NEGATIVE


@flax.struct.dataclass
class KeyValues:
  """Keys and values of one layer (or of all, stacked in front).

  Attributes:
    keys, values: new ones are [rows, kv_heads, length, width], those of one token [rows, kv_heads,
      width]. In a cache keys are transposed: [rows, kv_heads, width, length].
    key_scales, value_scales: what integers are multiplied with, per token and head, or None.
      [rows, kv_heads, length]
  """

  keys: Float[Array, "..."] | Int[Array, "..."]
  values: Float[Array, "..."] | Int[Array, "..."]
  key_scales: Float[Array, "..."] | None = None
  value_scales: Float[Array, "..."] | None = None


@flax.struct.dataclass
class LayerCache:
  """Keys and values of one layer (or of all, stacked in front) while sampling.

  Attributes:
    prefix: of each prompt.
    suffix: of each row, without its prompt.
  """

  prefix: KeyValues
  suffix: KeyValues


@flax.struct.dataclass
class Rows:
  """Which prompt each row continues.

  Attributes:
    lengths: tokens of each prompt.
    row_of: rows of each prompt, filled up with any row; None where row `r` belongs to prompt
      `r // samples`, all prompts having as many samples.
    cell_of: the place of each row in `row_of`, flattened; None with it.
  """

  lengths: Int[Array, "prompts"]
  row_of: Int[Array, "prompts samples"] | None = None
  cell_of: Int[Array, "rows"] | None = None

  def to_prompts(self, x: Array) -> Array:
    """[rows, ...] -> [prompts, samples, ...]"""
    if self.row_of is None:
      return x.reshape(len(self.lengths), -1, *x.shape[1:])
    return x[self.row_of]

  def to_rows(self, x: Array) -> Array:
    """[prompts, samples, ...] -> [rows, ...]"""
    x = x.reshape(-1, *x.shape[2:])
    return x if self.cell_of is None else x[self.cell_of]

  def prompt_lengths(self, rows: int) -> Int[Array, "rows"]:
    """Tokens of the prompt of each row."""
    prompts = len(self.lengths)
    samples = rows // prompts if self.row_of is None else self.row_of.shape[1]
    return self.to_rows(jnp.broadcast_to(self.lengths[:, None], (prompts, samples)))


@flax.struct.dataclass
class DecodeStep:
  """What every layer needs to know of the token that is read.

  Attributes:
    index: tokens in the suffix of every row so far.
    turns: cosines and sines of its position, as in `rope.turns`, for every base of RoPE.
  """

  index: Int[Array, ""]
  turns: list[tuple[Float[Array, "rows one half"], Float[Array, "rows one half"]]]


def attend(q: Float[Array, "rows kv group width"], k: Float[Array, "rows kv width"],
           v: Float[Array, "rows kv width"], cache: LayerCache, rows: Rows,
           index: Int[Array, ""], *, window: Int[Array, ""] | None, soft_cap: float
           ) -> Float[Array, "rows kv group width"]:
  """Attention of one new token per row over its prompt, its suffix and itself.

  Args:
    q: scaled queries.
    k, v: of the new token, which the cache does not hold yet.
    cache: of this layer.
    rows: which prompt each row continues.
    index: tokens in the suffixes.
    window: tokens visible, the query included; None is all.
    soft_cap: of scores; 0 is off.
  """
  cap = functools.partial(scores.soft_cap, cap=soft_cap)
  from_prefix, prefix_top, prefix_total = _attend_prefix(q, cache.prefix, rows, index, window, cap)
  place = jnp.arange(cache.suffix.keys.shape[-1])
  visible = place < index
  if window is not None:
    visible &= index - place < window
  suffix = jnp.where(visible, cap(_scores(q, cache.suffix)), NEGATIVE)
  itself = cap(jnp.sum(q.astype(jnp.float32) * k[:, :, None], axis=-1, keepdims=True))
  top = jnp.maximum(jnp.maximum(prefix_top, jnp.max(suffix, axis=-1, keepdims=True)), itself)
  suffix, itself, rescale = jnp.exp(suffix - top), jnp.exp(itself - top), jnp.exp(prefix_top - top)
  total = rescale * prefix_total + jnp.sum(suffix, axis=-1, keepdims=True) + itself
  out = _mixture(suffix, cache.suffix, v.dtype)
  return ((rescale * from_prefix + out + itself * v[:, :, None]) / total).astype(v.dtype)


def _attend_prefix(q, prefix, rows, index, window, cap):
  """Weighted sum of the prompt's values, the greatest score and the sum of weights, per row."""
  lengths = rows.lengths
  grid = rows.to_prompts(q)  # [prompts, samples, kv, group, width]
  prompts, samples, kv, group, width = grid.shape
  flat = grid.transpose(0, 2, 1, 3, 4).reshape(prompts, kv, samples * group, width)
  place = jnp.arange(prefix.keys.shape[-1])
  visible = place < lengths[:, None]  # [prompts, prefix]
  if window is not None:
    visible &= lengths[:, None] + index - place < window
  weights = jnp.where(visible[:, None, None], cap(_scores(flat, prefix)), NEGATIVE)
  top = jnp.max(weights, axis=-1, keepdims=True)
  weights = jnp.exp(weights - top)
  # Where a window hides the whole prompt all weights are 1, and `attend` scales them to 0.
  total = jnp.sum(weights, axis=-1, keepdims=True)
  out = _mixture(weights, prefix, q.dtype)

  def per_row(x):
    x = x.reshape(prompts, kv, samples, group, -1).transpose(0, 2, 1, 3, 4)
    return rows.to_rows(x)
  return per_row(out), per_row(top), per_row(total)


def _scores(q, cache):
  """Products of queries with keys. [..., queries, length]"""
  out = scores.product(q, cache.keys.astype(q.dtype))
  return out if cache.key_scales is None else out * cache.key_scales[..., None, :]


def _mixture(weights, cache, dtype):
  """Sums of values with the weights of each query. [..., queries, width]"""
  if cache.value_scales is not None:
    weights = weights * cache.value_scales[..., None, :]
  return scores.product(weights.astype(dtype), cache.values.astype(dtype))
