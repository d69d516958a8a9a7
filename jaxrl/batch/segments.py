"""Sums, means and the like over the sequences of a batch and over their groups, inside jit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.batch.token_batch import PADDING
from jaxrl.batch.token_batch import TokenBatch


def sum_by_sequence(batch: TokenBatch, values: Float[Array, "rows length"]
                    ) -> Float[Array, "sequences"]:
  """Sum of a per-token array over the tokens of each sequence (mask it first); empty gives 0."""
  return jax.ops.segment_sum(values.reshape(-1), batch.sequence_ids.reshape(-1),
                             num_segments=batch.num_sequences)


def mean_by_sequence(batch: TokenBatch, values: Float[Array, "rows length"]
                     ) -> Float[Array, "sequences"]:
  """Mean over the loss tokens of each sequence; a sequence without any gives 0."""
  mask = batch.loss_mask.astype(values.dtype)
  total = sum_by_sequence(batch, jnp.where(batch.loss_mask, values, 0))
  return total / jnp.maximum(sum_by_sequence(batch, mask), 1)


def to_tokens(batch: TokenBatch, values: Float[Array, "sequences"]) -> Float[Array, "rows length"]:
  """The value of each token's sequence, 0 on padding."""
  real = batch.sequence_ids != PADDING
  return jnp.where(real, values[jnp.where(real, batch.sequence_ids, 0)], 0)


def at_last_tokens(batch: TokenBatch, values: Float[Array, "sequences"]
                   ) -> Float[Array, "rows length"]:
  """The value of a sequence at its last loss token, 0 elsewhere."""
  position = jnp.where(batch.loss_mask, batch.positions, -1)
  last = jax.ops.segment_max(position.reshape(-1), batch.sequence_ids.reshape(-1),
                             num_segments=batch.num_sequences)
  is_last = batch.loss_mask & (batch.positions == to_tokens(batch, last))
  return jnp.where(is_last, to_tokens(batch, values), 0)


def _by_group(batch, reduced):
  """Value of its group at each scored sequence, 0 elsewhere. [groups] -> [sequences]"""
  return jnp.where(batch.sequence_mask, reduced[jnp.maximum(batch.group_ids, 0)], 0)


def _scored_groups(batch):
  return jnp.where(batch.sequence_mask, batch.group_ids, PADDING)


def sum_by_group(batch: TokenBatch, values: Float[Array, "sequences"]) -> Float[Array, "sequences"]:
  """At each scored sequence, the sum over the scored sequences of its group; 0 elsewhere."""
  return _by_group(batch, jax.ops.segment_sum(
      jnp.where(batch.sequence_mask, values, 0), _scored_groups(batch),
      num_segments=batch.num_sequences))


def count_by_group(batch: TokenBatch) -> Float[Array, "sequences"]:
  """At each scored sequence, the number of scored sequences in its group; 0 elsewhere."""
  return sum_by_group(batch, jnp.ones_like(batch.rewards))


def mean_by_group(batch: TokenBatch, values: Float[Array, "sequences"],
                  weights: Float[Array, "sequences"] | None = None) -> Float[Array, "sequences"]:
  """At each scored sequence, the mean over the scored sequences of its group; 0 elsewhere.

  A group whose values are all equal has exactly that value as its mean. With `weights`, none below
  0, each sequence counts as so many.
  """
  # Summing differences keeps what rounding would take from small differences of large values.
  origin = jax.lax.stop_gradient(max_by_group(batch, values))
  weights = jnp.ones_like(batch.rewards) if weights is None else weights
  total, count = sum_by_group(batch, weights * (values - origin)), sum_by_group(batch, weights)
  return origin + total / jnp.where(count > 0, count, 1)


def deviation_by_group(batch: TokenBatch, values: Float[Array, "sequences"],
                       weights: Float[Array, "sequences"] | None = None
                       ) -> Float[Array, "sequences"]:
  """At each scored sequence, its value minus the mean of its group; 0 elsewhere.

  Exactly 0 in a group whose values are all equal, singletons included. Weights as in
  `mean_by_group`.
  """
  origin = jax.lax.stop_gradient(max_by_group(batch, values))
  shifted = jnp.where(batch.sequence_mask, values - origin, 0)
  return shifted - mean_by_group(batch, shifted, weights)


def max_by_group(batch: TokenBatch, values: Float[Array, "sequences"]) -> Float[Array, "sequences"]:
  """At each scored sequence, the maximum over the scored sequences of its group; 0 elsewhere."""
  return _by_group(batch, jax.ops.segment_max(
      jnp.where(batch.sequence_mask, values, -jnp.inf), _scored_groups(batch),
      num_segments=batch.num_sequences))


def min_by_group(batch: TokenBatch, values: Float[Array, "sequences"]) -> Float[Array, "sequences"]:
  """At each scored sequence, the minimum over the scored sequences of its group; 0 elsewhere."""
  return -max_by_group(batch, -values)


def std_by_group(batch: TokenBatch, values: Float[Array, "sequences"],
                 weights: Float[Array, "sequences"] | None = None, *, ddof: int = 0
                 ) -> Float[Array, "sequences"]:
  """At each scored sequence, the standard deviation of its group; 0 elsewhere.

  Groups with one value only give exactly 0, singletons with `ddof=1` too. Weights as in
  `mean_by_group`.
  """
  weights = jnp.ones_like(batch.rewards) if weights is None else weights
  squares = sum_by_group(batch, weights * deviation_by_group(batch, values, weights) ** 2)
  variance = squares / jnp.maximum(sum_by_group(batch, weights) - ddof, 1)
  positive = variance > 0  # the square root has no gradient at 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


def column_of(batch: TokenBatch, name: str | None, reader: str) -> Float[Array, "sequences"] | None:
  """A column that a piece was told to read; None if it was told none.

  Raises:
    ValueError: the batch has no such column; `reader` is who was told.
  """
  if name is None:
    return None
  if name not in batch.columns:
    raise ValueError(f"{reader} reads the column {name!r}, and this batch has "
                     f"{sorted(batch.columns) or 'none'}: an episode or edit supplies it "
                     "(`@compose.supplies(columns=...)`)")
  return batch.columns[name]


def as_one_group(batch: TokenBatch) -> TokenBatch:
  """The batch with all its sequences in one group: `*_by_group` become statistics of the batch."""
  return batch.replace(group_ids=jnp.where(batch.group_ids == PADDING, PADDING, 0))
