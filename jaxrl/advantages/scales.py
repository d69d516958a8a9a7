"""Scales: how large an advantage may be.

Each divides by the standard deviation of the values it is given. Behind `center_by_group` that is
the deviation of the rewards within a group, for a shift does not change it. Over the batch the
order matters: `scale_by_batch_std -> center_by_group` divides by the deviation of the raw rewards
(TRL's `scale_rewards="batch"`), `center_by_group -> scale_by_batch_std` by that of the centred ones
(REINFORCE++ with a group baseline).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.batch import TokenBatch, as_one_group, column_of, std_by_group, to_tokens


def scale_by_group_std(batch: TokenBatch, values: Float[Array, "sequences"], *, ddof: int = 1,
                       epsilon: float = 1e-4, weight: str | None = None
                       ) -> Float[Array, "sequences"]:
  """Divides by the standard deviation of the group (GRPO, arXiv:2402.03300).

    advantage_i = v_i / (std_j(v_j) + epsilon)

  Args:
    batch: supplies `group_ids` and `sequence_mask`.
    values: one per sequence; masked sequences are ignored and get 0.
    ddof: 1 divides the squares by n - 1, as TRL and verl do; 0 by n. The paper does not say.
    epsilon: keeps groups of nearly equal values bounded; TRL's default.
    weight: as in `center_by_group`; n is then the sum of the weights.

  Returns:
    Exactly 0 in groups without any variance, centred or not: they carry no comparison.
  """
  std = std_by_group(batch, values, column_of(batch, weight, "scale_by_group_std"), ddof=ddof)
  return jnp.where(std > 0, values / jnp.where(std > 0, std + epsilon, 1), 0)


def whiten_tokens(batch: TokenBatch, values: Float[Array, "rows length"], *,
                  epsilon: float = 1e-8) -> Float[Array, "rows length"]:
  """Mean 0 and variance 1 over all loss tokens of the batch (PPO, arXiv:1909.08593).

    advantage_t = (v_t - mean(v)) / sqrt(var(v) + epsilon),     var with division by n - 1

  As in TRL. Tokens of unscored sequences do not count and get 0.
  """
  mask = batch.loss_mask & to_tokens(batch, batch.sequence_mask).astype(bool)
  count = jnp.sum(mask)
  mean = jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(count, 1)
  centred = jnp.where(mask, values - mean, 0)
  variance = jnp.sum(centred ** 2) / jnp.maximum(count - 1, 1)
  return centred * jax.lax.rsqrt(variance + epsilon)


def scale_by_batch_std(batch: TokenBatch, values: Float[Array, "sequences"], *, ddof: int = 1,
                       epsilon: float = 1e-4) -> Float[Array, "sequences"]:
  """Divides by the standard deviation over all scored sequences (REINFORCE++, arXiv:2501.03262).

  Arguments as in `scale_by_group_std`, with the batch as the one group. Groups keep their relative
  size: an easy group with little variance is not blown up.
  """
  return scale_by_group_std(as_one_group(batch), values, ddof=ddof, epsilon=epsilon)
