"""What Beta distributions cost, in float32 for parameters from 1e-3 to 1e6.

The textbook formulas subtract log-gammas near 1e7 to find numbers near 1. Here what grows with the
parameters cancels on paper instead: with psi the digamma function and s = a + b,

  h(x) = x psi(x) - log Gamma(x) - x             grows like log(x) / 2
  D(a, b) = psi(a + b) - psi(a)                  is a sum of positive terms

  KL(Beta(a, b) || Beta(a0, b0)) = log B(a0, b0) + h(a) + h(b) - h(s) + a0 D(a, b) + b0 D(b, a)
"""

import jax.numpy as jnp
import jax.scipy.special
from jaxtyping import Array, Float

SHIFT = 8  # from here on, series in 1 / x are exact to float32


def digamma_difference(a: Float[Array, "*shape"], b: Float[Array, "*shape"]
                       ) -> Float[Array, "*shape"]:
  """`psi(a + b) - psi(a)` for positive a and b: under Beta(a, b), the expectation of -log p.

  By the recurrence psi(x) = psi(x + 1) - 1 / x and the asymptotic series of psi (Abramowitz and
  Stegun, 6.3.5 and 6.3.18), whose differences are factored, so that nothing is lost to rounding.
  """
  a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
  steps = sum(b / ((a + i) * (a + b + i)) for i in range(SHIFT))
  a = a + SHIFT
  u, v = 1 / a, 1 / (a + b)
  u2, v2 = u * u, v * v
  # psi(x) = log x - 1 / (2 x) - 1 / (12 x^2) + 1 / (120 x^4) - 1 / (252 x^6) + ...
  slope = (1 / 2 + (u + v) * (1 / 12 - (u2 + v2) / 120 + (u2 * u2 + u2 * v2 + v2 * v2) / 252))
  return steps + jnp.log1p(b / a) + b * u * v * slope


def kl_to_beta(a: Float[Array, "*shape"], b: Float[Array, "*shape"], a0: float, b0: float
               ) -> Float[Array, "*shape"]:
  """`KL(Beta(a, b) || Beta(a0, b0))`, at least 0."""
  a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
  kl = (jax.scipy.special.betaln(jnp.float32(a0), jnp.float32(b0)) + _h(a) + _h(b) - _h(a + b)
        + a0 * digamma_difference(a, b) + b0 * digamma_difference(b, a))
  return kl


def _h(x):
  small = x < SHIFT
  low = jnp.where(small, x, 1.0)
  by_definition = low * jax.scipy.special.digamma(low) - jax.scipy.special.gammaln(low) - low
  high = jnp.where(small, float(SHIFT), x)
  u = 1 / high
  u2 = u * u
  half_log_2_pi = 0.9189385332046727
  series = 0.5 * jnp.log(high) - 0.5 - half_log_2_pi - u * (1 / 6 - u2 * (1 / 90 - u2 / 210))
  return jnp.where(small, by_definition, series)
