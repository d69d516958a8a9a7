"""Products and gated layers against JAX's own gradients, whichever side is the larger."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models import products


def arrays(*shapes, dtype=np.float32):
  rng = np.random.default_rng(sum(map(len, shapes)))
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def close(found, expected, tolerance):
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert one.dtype == other.dtype and one.shape == other.shape
    np.testing.assert_allclose(np.float64(one), np.float64(other), rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("n, x, kernel", [
    (1, (4, 6, 3), (3, 2, 5)),  # wide outputs
    (1, (4, 6, 24), (24, 2)),  # wide inputs: the gradient is made the other way round
    (2, (4, 6, 8, 2), (8, 2, 3)), (1, (24,), (24, 2)), (2, (5, 4, 9), (4, 9, 2, 2))])
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (jnp.bfloat16, 1e-6)])
def test_contract_and_its_gradients_are_those_of_tensordot(n, x, kernel, dtype, tolerance):
  x, kernel = arrays(x, kernel, dtype=dtype)
  out, pull = jax.vjp(lambda x, kernel: products.contract(n, x, kernel), x, kernel)
  expected, plain = jax.vjp(lambda x, kernel: jnp.tensordot(x, kernel, n), x, kernel)
  close(out, expected, tolerance)
  [cotangent] = arrays(out.shape, dtype=dtype)
  close(jax.jit(pull)(cotangent), plain(cotangent), tolerance)


@pytest.mark.parametrize("x, y", [((7, 3), (7, 11)), ((7, 11), (7, 3)), ((2, 7, 11, 2), (2, 7, 3)),
                                  ((2, 7, 3), (2, 7, 5, 6)), ((9, 1), (9, 1))])
def test_sums_over_rows_are_einsums_in_either_order(x, y):
  n = 1 if x[0] != 2 else 2
  x, y = arrays(x, y)
  rows = int(np.prod(x.shape[:n]))
  expected = np.float64(x).reshape(rows, -1).T @ np.float64(y).reshape(rows, -1)
  found = jax.jit(lambda x, y: products.over_rows(n, x, y))(x, y)
  assert found.shape == x.shape[n:] + y.shape[n:]
  np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=1e-5, atol=1e-5)
  assert products.over_rows(n, x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), jnp.float32).dtype == jnp.float32


def test_what_is_on_the_left_of_a_gradient_is_the_smaller_side():
  """A CPU transposes what is on the left: the product is [narrow, wide], and XLA must not turn it back."""
  wide, narrow = arrays((512, 384), (512, 16))

  def results(*of):
    text = jax.jit(lambda x, y: products.over_rows(1, x, y)).lower(*of).compile().as_text()
    return re.findall(r"= (f32\[[\d,]+\])\S* dot\(", text)
  assert results(wide, narrow) == results(narrow, wide) == ["f32[16,384]"]
  assert results(wide, wide[:, :200]) == ["f32[384,200]"]  # about as large


@pytest.mark.parametrize("activation", [nn.silu, nn.gelu])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_gated_layer_has_the_gradients_of_the_plain_one(activation, dtype):
  gate, up, cotangent = arrays((5, 8), (5, 8), (5, 8), dtype=dtype)

  def results(function):
    out, pull = jax.vjp(function, gate, up)
    return out, pull(cotangent)
  close(jax.jit(lambda: results(lambda g, u: products.gated(activation, g, u)))(),
        jax.jit(lambda: results(lambda g, u: activation(g) * u))(), 1e-5 if dtype == np.float32 else 1e-2)


def test_a_gated_layer_keeps_its_arguments_only():
  """Its activation is computed again, also where forward and backward pass are one program."""
  gate, up = arrays((5, 8), (5, 8))
  kept = jax.tree.leaves(jax.vjp(lambda g, u: products.gated(nn.silu, g, u), gate, up)[1])
  assert len(kept) == 2

  def exponentials(function):
    def loss(gate, up):
      return jnp.sum(jnp.sin(function(gate, up) @ jnp.ones((8, 8))))
    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(gate, up).compile().as_text()
    return len(re.findall(r"\S+ exponential\(", text))
  assert exponentials(lambda g, u: products.gated(nn.silu, g, u)) >= 2
