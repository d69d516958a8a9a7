"""Advantages that an edit has already computed."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.advantages.chain import baseline
from jaxrl.batch import TokenBatch


@baseline
def stored_advantages(batch: TokenBatch, rewards: Float[Array, "sequences"]
                      ) -> Float[Array, "sequences"]:
  """The column `advantage`, which an edit such as `rollouts.replay.choose_rollouts` fills, in place of
  the rewards; 0 for sequences that are not scored.

  Raises:
    ValueError: no such column.
  """
  if "advantage" not in batch.columns:
    raise ValueError("stored_advantages needs the column 'advantage' of an edit, such as dict(name="
                     "'jaxrl.rollouts.replay:choose_rollouts') in config.rollout.edits")
  return jnp.where(batch.sequence_mask, batch.columns["advantage"], 0)
