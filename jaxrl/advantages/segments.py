"""Segments: parts of an answer count differently."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.batch import TokenBatch, to_tokens


def weigh_plans(batch: TokenBatch, values: Float[Array, "..."], *, plan: float = 2.0,
                execution: float = 1.0) -> Float[Array, "rows length"]:
  """Weighs the advantages of plans and executions (E2C, arXiv:2509.23946).

    advantage_t = w_t * A_t,    w_t = plan where tag_ids = 1, execution where 2, 1 elsewhere

  A clipped surrogate is linear in positive factors of the advantage, so this weighs its losses.

  Args:
    batch: supplies `tag_ids`, as `rollouts.plan_then_execute` sets them.
    values: one per sequence or per token.
    plan, execution: weights, at least 0.

  Returns:
    One value per token.

  Raises:
    ValueError: a negative weight.
  """
  for name, weight in (("plan", plan), ("execution", execution)):
    if isinstance(weight, int | float) and weight < 0:
      raise ValueError(f"weigh_plans: {name}={weight} would punish what is good; use at least 0")
  per_token = values if values.ndim == 2 else to_tokens(batch, values)
  weights = jnp.where(batch.tag_ids == 1, plan, jnp.where(batch.tag_ids == 2, execution, 1.0))
  return jnp.where(batch.loss_mask, weights * per_token, 0)
