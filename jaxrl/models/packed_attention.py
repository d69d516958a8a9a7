"""Causal attention over packed rows, several of which may continue one trunk.

A unit is a trunk and the rows that share it, side by side: `[trunk | row | row | ...]`. A token of a
row sees the trunk and, within its own row, the earlier tokens of its segment, so that the work is
that of the visible pairs, not of the whole unit squared.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl.models.cached_attention import NEGATIVE

BLOCK = 1024  # queries whose scores exist at one time


@flax.struct.dataclass
class PackedRows:
  """How the tokens of units are arranged.

  Attributes:
    positions: of each token in its sequence.
    segment_ids: attention boundary within a row, 0 for padding; in a trunk 1, or 0 for padding.
    trunk_length: tokens of each trunk, padding included; 0 for none.
    rows: that follow a trunk.
  """

  positions: Int[Array, "units length"]
  segment_ids: Int[Array, "units length"]
  trunk_length: int = flax.struct.field(pytree_node=False, default=0)
  rows: int = flax.struct.field(pytree_node=False, default=1)

  def split(self, x: Array) -> tuple[Array, Array]:
    """[units, length, ...] -> the trunk's part, and [units, rows, row length, ...]"""
    return x[:, :self.trunk_length], x[:, self.trunk_length:].reshape(
        x.shape[0], self.rows, -1, *x.shape[2:])

  def join(self, trunk: Array, rows: Array) -> Array:
    """The inverse of `split`."""
    flat = rows.reshape(rows.shape[0], -1, *rows.shape[3:])
    return jnp.concatenate([trunk, flat], axis=1) if self.trunk_length else flat


def attend(q: Float[Array, "units length kv group width"], k: Float[Array, "units length kv width"],
           v: Float[Array, "units length kv width"], packed: PackedRows, *,
           window: Int[Array, ""] | None = None, soft_cap: float = 0.0
           ) -> Float[Array, "units length kv group width"]:
  """Attention of every token.

  Args:
    q: scaled queries.
    k, v: keys and values of the same tokens.
    packed: which of them see one another.
    window: tokens visible, the query included; None is all.
    soft_cap: of scores; 0 is off.
  """
  cap = (lambda x: soft_cap * jnp.tanh(x / soft_cap)) if soft_cap else lambda x: x
  trunk_q, q = packed.split(q)
  (trunk_k, k), (trunk_v, v) = packed.split(k), packed.split(v)
  (trunk_positions, positions), (trunk_ids, ids) = (
      packed.split(packed.positions), packed.split(packed.segment_ids))
  trunk = (trunk_k, trunk_v, trunk_positions, trunk_ids) if packed.trunk_length else None
  out = _attend_rows(q, k, v, positions, ids, trunk, window, cap)
  if trunk is None:
    return packed.join(trunk_q, out)
  from_trunk = _attend_rows(trunk_q[:, None], trunk_k[:, None], trunk_v[:, None],
                            trunk_positions[:, None], trunk_ids[:, None], None, window, cap)
  return packed.join(from_trunk[:, 0], out)


def _attend_rows(q, k, v, positions, ids, trunk, window, cap):
  """Rows over themselves and, unless it is None, their trunk. [units, rows, length, ...]"""
  length = q.shape[2]
  if length <= BLOCK:
    return _attend_block(q, k, v, positions, ids, trunk, window, cap, 0)
  # A block needs no keys after it; what the backward pass needs of its scores is computed again.
  block = jax.checkpoint(_attend_block, static_argnums=(7, 8))
  return jnp.concatenate([
      block(q[:, :, start:start + BLOCK], *(x[:, :, :start + BLOCK] for x in (k, v, positions, ids)),
            trunk, window, cap, start)
      for start in range(0, length, BLOCK)], axis=2)


def _attend_block(q, k, v, positions, ids, trunk, window, cap, start):
  """Queries `start ...` of each row over its keys up to the last of them."""
  units, rows, length, kv, group, width = q.shape
  q = q.transpose(0, 3, 1, 4, 2, 5)  # [units, kv, rows, group, length, width]
  own = q.reshape(units, kv, rows, group * length, width)
  k, v = k.transpose(0, 3, 1, 2, 4), v.transpose(0, 3, 1, 2, 4)  # [units, kv, rows, keys, width]
  own_positions, own_ids = positions[:, :, start:], ids[:, :, start:]
  visible = own_ids[..., None] == ids[:, :, None]
  visible &= jnp.arange(start, start + length)[:, None] >= jnp.arange(ids.shape[2])
  if window is not None:
    visible &= own_positions[..., None] - positions[:, :, None] < window
  scores = cap(_product(own, k, 4)).reshape(units, kv, rows, group, length, -1)
  scores += _bias(visible)[:, None, :, None]
  top = jnp.max(scores, axis=-1, keepdims=True)
  if trunk is not None:
    trunk_k, trunk_v, trunk_positions, trunk_ids = trunk
    trunk_k, trunk_v = trunk_k.transpose(0, 2, 1, 3), trunk_v.transpose(0, 2, 1, 3)
    seen = (trunk_ids != 0)[:, None, None]  # [units, rows, length, trunk]
    if window is not None:
      seen &= own_positions[..., None] - trunk_positions[:, None, None] < window
    flat = q.reshape(units, kv, rows * group * length, width)
    trunk_scores = cap(_product(flat, trunk_k, 3)).reshape(*q.shape[:5], -1)
    trunk_scores += _bias(seen)[:, None, :, None]
    top = jnp.maximum(top, jnp.max(trunk_scores, axis=-1, keepdims=True))
  # The result does not depend on what is taken off, so no gradient has to pass through it.
  top = jax.lax.stop_gradient(top)
  weights = jnp.exp(scores - top)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  out = _product(weights.astype(v.dtype).reshape(*own.shape[:4], -1), v, 3).reshape(q.shape)
  if trunk is not None:
    weights = jnp.exp(trunk_scores - top)
    total += jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype).reshape(*flat.shape[:3], -1)
    out += _product(weights, trunk_v, 2).reshape(q.shape)
  return (out / total).astype(v.dtype).transpose(0, 2, 4, 1, 3, 5)


def _bias(visible):
  """0 where visible, else so much that softmax gives exactly 0: cheaper to add than to select."""
  return jnp.where(visible, jnp.float32(0), NEGATIVE)


def _product(a, b, axis):
  """Batched products of the last axis of `a` and one of `b`, summed in float32."""
  batch = tuple(range(a.ndim - 2))
  return jax.lax.dot_general(a, b, (((a.ndim - 1,), (axis,)), (batch, batch)),
                             preferred_element_type=jnp.float32)
