"""What attention and logits share: batched products, soft caps, and the score of what is hidden."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NEGATIVE = -1e30  # a score that softmax turns into exactly 0, without the NaN of -inf minus -inf


def product(a: Float[Array, "... m k"], b: Float[Array, "... k n"]) -> Float[Array, "... m n"]:
  """Batched `a @ b`, summed in float32."""
  return _products(a, b, b.ndim - 2)


def product_with_rows(a: Float[Array, "... m k"], b: Float[Array, "... n k"]
                      ) -> Float[Array, "... m n"]:
  """Batched products of the rows of `a` with those of `b`, summed in float32."""
  return _products(a, b, b.ndim - 1)


def _products(a, b, axis):
  batch = tuple(range(a.ndim - 2))
  return jax.lax.dot_general(a, b, (((a.ndim - 1,), (axis,)), (batch, batch)),
                             preferred_element_type=jnp.float32)


def soft_cap(x: Array, cap: float) -> Array:
  """`cap * tanh(x / cap)` (Gemma 2, arXiv:2408.00118, section 2); a cap of 0 is off."""
  return cap * jnp.tanh(x / cap) if cap else x
