"""The products of dense layers and their gradients, in the order in which they are made fastest."""

from collections.abc import Callable
import functools

import jax
from jaxtyping import Array

from jaxrl import chips


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(n: int, x: Array, kernel: Array) -> Array:
  """Sums over the last `n` axes of `x` and the first `n` of `kernel`."""
  return _contract_forward(n, x, kernel)[0]


def _contract_forward(n, x, kernel):
  axes = tuple(range(x.ndim - n, x.ndim))  # a plain product, which `remat="dots"` knows to keep
  return jax.lax.dot_general(x, kernel, ((axes, tuple(range(n))), ((), ()))), (x, kernel)


def _contract_backward(n, saved, to_y):
  x, kernel = saved
  outputs, rows = kernel.ndim - n, x.ndim - n
  to_x = jax.lax.dot_general(to_y, kernel, (
      (tuple(range(to_y.ndim - outputs, to_y.ndim)), tuple(range(n, kernel.ndim))), ((), ())))
  return to_x, over_rows(rows, x, to_y)


contract.defvjp(_contract_forward, _contract_backward)


def over_rows(n: int, x: Array, y: Array, dtype: jax.typing.DTypeLike | None = None) -> Array:
  """Sums over the first `n` axes of both, as in the gradient of a kernel. [*rest of x, *rest of y]

  JAX's own gradient has `x` on the right, and transposes the result; on a CPU, XLA then transposes both `x` and
  `y`. This way it is only what is on the left: `x`, whose transpose serves all kernels that read it, or `y`
  where that is less than half as large.
  """
  def sums(left, right):
    axes = tuple(range(n))
    return jax.lax.dot_general(left, right, ((axes, axes), ((), ())), preferred_element_type=dtype)
  if chips.platform() != "cpu" or x.size <= 2 * y.size:
    return sums(x, y)
  turned, first = jax.lax.optimization_barrier(sums(y, x)), y.ndim - n  # else XLA would turn the product again
  return turned.transpose(*range(first, turned.ndim), *range(first))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(activation: Callable[[Array], Array], gate: Array, up: Array) -> Array:
  """`activation(gate) * up`, of which the backward pass needs the arguments and nothing from in between."""
  return activation(gate) * up


def _gated_forward(activation, gate, up):
  return gated(activation, gate, up), (gate, up)


def _gated_backward(activation, saved, to_hidden):
  gate, up = jax.lax.optimization_barrier(saved)  # else XLA would keep what was computed before
  return jax.vjp(lambda gate, up: activation(gate) * up, gate, up)[1](to_hidden)


gated.defvjp(_gated_forward, _gated_backward)
