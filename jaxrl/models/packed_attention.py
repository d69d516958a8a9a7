"""Causal attention over packed rows, several of which may continue one trunk.

A unit is a trunk and the rows that share it, side by side: `[trunk | row | row | ...]`. A token of a
row sees the trunk and, within its own row, the earlier tokens of its segment, so that the work is
that of the visible pairs, not of the whole unit squared.
"""

import functools

from absl import flags
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl import chips
from jaxrl import sharding
from jaxrl.models import scores

BLOCK = 1024  # queries whose scores exist at one time
IN_CACHE, BLOCKS = 64, 8  # on a CPU: queries whose scores stay in its cache, blocks at most
ALIGNED = 16  # where the keys of a block begin
KEY_AXES = (2, 2, 1, 1)  # of keys, values, positions and segments: the axis of tokens
KERNELS = ("xla", "fused")


@flax.struct.dataclass
class PackedRows:
  """How the tokens of units are arranged.

  Attributes:
    positions: of each token in its sequence.
    segment_ids: attention boundary within a row, 0 for padding; in a trunk 1, or 0 for padding.
    trunk_length: tokens of each trunk, padding included; 0 for none.
    rows: that follow a trunk.
    longest: tokens that no segment has more of; 0 if unknown.
    falling: whether segments fill every row from its first token on in falling order of their lengths.
  """

  positions: Int[Array, "units length"]
  segment_ids: Int[Array, "units length"]
  trunk_length: int = flax.struct.field(pytree_node=False, default=0)
  rows: int = flax.struct.field(pytree_node=False, default=1)
  longest: int = flax.struct.field(pytree_node=False, default=0)
  falling: bool = flax.struct.field(pytree_node=False, default=False)

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
           window: Int[Array, ""] | None = None, soft_cap: float = 0.0, kernel: str = "xla"
           ) -> Float[Array, "units length kv group width"]:
  """Attention of every token.

  Args:
    q: scaled queries.
    k, v: keys and values of the same tokens.
    packed: which of them see one another.
    window: tokens visible, the query included; None is all.
    soft_cap: of scores; 0 is off.
    kernel: `xla`, or `fused`: Tokamax's kernel for the device, which writes no scores to memory.
  """
  (trunk_k, k), (trunk_v, v) = packed.split(k), packed.split(v)
  trunk_q, q = packed.split(q)
  (trunk_positions, positions), (trunk_ids, ids) = (
      packed.split(packed.positions), packed.split(packed.segment_ids))
  run = functools.partial(_attend_fused if kernel == "fused" else _attend_rows, window=window,
                          soft_cap=soft_cap)
  if not packed.trunk_length:
    return packed.join(trunk_q, run(q, k, v, positions, ids, 0, longest=packed.longest,
                                    falling=packed.falling))

  def before(trunk, rows):  # every row with its own copy of the trunk's keys or values in front
    trunk = jnp.broadcast_to(trunk[:, None], (*rows.shape[:2], *trunk.shape[1:]))
    return jnp.concatenate([trunk, rows], axis=2)

  out = run(q, before(trunk_k, k), before(trunk_v, v), before(trunk_positions, positions),
            before(trunk_ids, ids), packed.trunk_length)
  of_trunk = run(trunk_q[:, None], trunk_k[:, None], trunk_v[:, None], trunk_positions[:, None],
                 trunk_ids[:, None], 0)
  return packed.join(of_trunk[:, 0], out)


def _attend_rows(q, k, v, positions, ids, trunk, window, soft_cap, longest=0, falling=False):
  """Rows over their keys, of which the first `trunk` are the trunk's. [units, rows, length, ...]"""
  units, rows, length, kv, group, width = q.shape
  batch, size = units * rows, _block_of(length)
  q = q.reshape(batch, length, kv, group, width).transpose(0, 2, 3, 1, 4)
  keys = (*(x.reshape(batch, -1, kv, width).transpose(0, 2, 1, 3) for x in (k, v)),
          *(x.reshape(batch, -1) for x in (positions, ids)))
  block = functools.partial(_attend_block, trunk=trunk, window=window, soft_cap=soft_cap)
  starts = range(0, length, size)
  # A block needs no keys after it, and none of other segments before it.
  spans = [(0 if trunk else _first_key(start, longest, falling) // ALIGNED * ALIGNED,
            trunk + min(start + size, length)) for start in starts]
  blocks = zip(jnp.split(q, list(starts[1:]), axis=3), *(_spans(x, axis, spans) for x, axis in zip(keys, KEY_AXES)))

  def means(*of_block):
    return _means(*block(*of_block), v.dtype)
  if length > BLOCK:  # what the backward pass needs of the scores is computed again, and kept in its own type
    out = jnp.concatenate([jax.checkpoint(means)(*of_block) for of_block in blocks], axis=3)
  else:  # what is divided once is summed up once in the backward pass
    out = _means(*(jnp.concatenate(parts, axis=3) for parts in zip(*(block(*b) for b in blocks))), v.dtype)
  return out.transpose(0, 3, 1, 2, 4).reshape(units, rows, length, kv, group, width)


def _first_key(token, longest, falling):
  """Where the segment of a token begins at the earliest, see `PackedRows`."""
  if not longest:
    return 0
  before = token // longest if falling else 0  # segments before it at least, none shorter than its own
  return max(token + 1 - longest, -(-before * (token + 1) // (before + 1)))


def _means(sums, weights, dtype):
  return (sums / weights).astype(dtype)


def _spans(x, axis, spans):
  """What lies from starts to ends along an axis, which may overlap, each as a list of parts.

  The gradients of a part are added up by themselves; those of slices would each be made as large as `x`.
  """
  cuts = sorted({0, x.shape[axis]}.union(*spans))
  parts = jnp.split(x, cuts[1:-1], axis=axis)
  return [parts[cuts.index(start):cuts.index(end)] for start, end in spans]


def _block_of(length):
  """Queries of a block: blocks save the products with later keys, and cost time to compile."""
  if chips.platform() != "cpu":
    return BLOCK
  if length <= 2 * IN_CACHE:
    return length
  return min(max(1, round(length / BLOCKS / IN_CACHE)) * IN_CACHE, BLOCK)


def _attend_block(q, *keys, trunk, window, soft_cap):
  """Queries of each row over all keys up to the last of them.

  Args:
    q: [rows, kv, group, length, width].
    *keys: parts of keys and values [rows, kv, keys, width], positions and segments [rows, keys].

  Returns:
    Weighted sums of values, and their weights in sum. [rows, kv, group, length, width or 1]
  """
  k, v, positions, ids = (jnp.concatenate(parts, axis) if len(parts) > 1 else parts[0]
                          for parts, axis in zip(keys, KEY_AXES))
  rows, kv, group, length, width = q.shape
  visible = _visible(length, positions, ids, trunk, window)
  # Adding so much that softmax gives exactly 0 is cheaper than to select, in both directions.
  bias = jnp.where(visible, jnp.float32(0), scores.NEGATIVE)[:, None]
  out = scores.product_with_rows(q.reshape(rows, kv, group * length, width), k)
  out = scores.soft_cap(out.reshape(rows, kv * group, length, -1), soft_cap) + bias
  # The result does not depend on what is taken off, so no gradient has to pass through it.
  weights = jnp.exp(out - jax.lax.stop_gradient(jnp.max(out, axis=-1, keepdims=True)))
  total = jnp.sum(weights, axis=-1).reshape(rows, kv, group, length, 1)
  out = scores.product(weights.astype(v.dtype).reshape(rows, kv, group * length, -1), v)
  return out.reshape(rows, kv, group, length, width), total


def _visible(length, positions, ids, trunk, window):
  """Which keys the last `length` of their tokens see. [..., length, keys]"""
  own = positions.shape[-1] - length  # where the queries are among the keys
  # By positions, not by places: what is the same in all micro-batches XLA would move out of the loop over them,
  # once for every layer, and no longer see that all layers compute the same.
  since = positions[..., own:, None] - positions[..., None, :]
  visible = (ids[..., own:, None] == ids[..., None, :]) & (since >= 0)
  if trunk:
    visible = jnp.where(jnp.arange(positions.shape[-1]) < trunk, (ids != 0)[..., None, :], visible)
  if window is not None:
    visible &= since < window
  return visible


def _attend_fused(q, k, v, positions, ids, trunk, window, soft_cap, longest=0, falling=False):
  """`_attend_rows` by a kernel that keeps scores on the chip. [units, rows, length, ...]"""
  del longest, falling
  import tokamax  # it is optional, and takes a second to import
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # else Tokamax would parse a command line that is not its own
  units, rows, length, kv, group, width = q.shape
  visible = _visible(length, positions, ids, trunk, window)

  def kernel(q, k, v, visible):
    return tokamax.dot_product_attention(q, k, v, mask=visible, scale=1.0,
                                         logits_soft_cap=soft_cap or None)

  q = q.reshape(units, rows, length, kv * group, width)
  # XLA cannot split a kernel over devices, so each is given its own units and heads.
  by_head = ("rows", None, None, "kv_heads", None)
  kernel = sharding.on_each_device(kernel, (*[by_head] * 3, ("rows", *[None] * 4)), by_head)
  return kernel(q, k, v, visible[:, :, None]).reshape(units, rows, length, kv, group, width)
