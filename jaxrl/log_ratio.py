"""Log-ratios of two policies at loss tokens, their exponentials kept finite, and KL from them."""

from collections.abc import Sequence

import jax
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


def clamped(log_ratio: Float[Array, "rows length"], bounds: Sequence[float] | None
            ) -> tuple[Float[Array, "rows length"], dict[str, Float[Array, "rows length"]]]:
  """Log-ratios of tokens held between two bounds, with no gradient beyond them (Humanline,
  arXiv:2509.24207), and the metric `unclamped_fraction`; without bounds as they are, and none."""
  if bounds is None:
    return log_ratio, {}
  low, high = bounds
  inside = (log_ratio >= low) & (log_ratio <= high)
  held = jnp.clip(jax.lax.stop_gradient(log_ratio), low, high)
  return jnp.where(inside, log_ratio, held), {"unclamped_fraction": inside.astype(log_ratio.dtype)}


def check_clamp(term: str, bounds: Sequence[float] | None) -> None:
  """Refuses bounds of `clamped` that do not hold 0 between them.

  Raises:
    ValueError: naming the term and what it was given.
  """
  if bounds is not None and not (len(bounds) == 2 and bounds[0] < 0 < bounds[1]):
    raise ValueError(f"{term}: clamp={bounds!r} has to be the smallest and the largest log-ratio of a "
                     "token, one below and one above 0, such as (-1.5, 1.5); None is no clamp")


ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(difference: Float[Array, "..."], estimator: str) -> Float[Array, "..."]:
  """KL(policy || other) from d = log policy - log other at a token sampled from the policy.

  `k1` is d, `k2` is d^2 / 2, `k3` is exp(-d) - 1 + d (Schulman, 2020; see `objectives.kl`).
  """
  if estimator not in ESTIMATORS:
    raise ValueError(f"kl: estimator={estimator!r}; valid are 'k1', 'k2' and 'k3', and "
                     "'full' in a loss")
  if estimator == "k1":
    return difference
  if estimator == "k2":
    return jnp.square(difference) / 2
  inverse = cap(-difference)
  return jnp.expm1(inverse) - inverse
