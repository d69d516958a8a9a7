"""Log-ratios of two policies at loss tokens, and their exponentials kept finite."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.batch import TokenBatch

# A ratio of e^20 comes from a broken sample, not from learning. Above it exponentials stay level,
# so their values are finite in float32 and the gradient of such a sample is 0, never NaN.
MAX_LOG_RATIO = 20.0


def log_ratio(batch: TokenBatch, numerator: Float[Array, "rows length"],
              denominator: Float[Array, "rows length"]) -> Float[Array, "rows length"]:
  """Difference of two log-probabilities at loss tokens; 0, without gradient, elsewhere."""
  return jnp.where(batch.loss_mask, numerator - denominator, 0)


def cap(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
  """The log-ratio, at most `MAX_LOG_RATIO`: safe to exponentiate, forward and backward."""
  return jnp.minimum(log_ratio, MAX_LOG_RATIO)
