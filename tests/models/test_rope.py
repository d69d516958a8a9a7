"""Rotations against complex numbers in float64, also far from the beginning."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models import rope


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "factor": 4.0}])
def test_turns_are_those_of_the_exact_angles_at_any_position(scaling):
  frequency = rope.frequencies(16, 10_000.0, scaling)
  positions = np.array([[0, 1, 7, 1023, 1024], [1025, 4095, 70_001, 500_000, 2 ** 20 - 1]])
  cos, sin = rope.turns(jnp.asarray(positions), frequency)
  assert cos.dtype == sin.dtype == jnp.float32 and cos.shape == (2, 5, 8)
  exact = np.exp(1j * positions[..., None] * frequency.astype(np.float64))
  np.testing.assert_allclose(np.asarray(cos) + 1j * np.asarray(sin), exact, atol=3e-7)


def test_rotating_is_multiplying_pairs_by_complex_numbers():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
  positions = rng.integers(0, 5000, (2, 3))
  frequency = rope.frequencies(8, 500.0, {})
  found = np.asarray(rope.rotate(jnp.asarray(x), rope.turns(jnp.asarray(positions), frequency)))
  turned = ((x[..., :4] + 1j * x[..., 4:])
            * np.exp(1j * positions[..., None] * frequency.astype(np.float64))[:, :, None])
  np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], -1), atol=2e-6)
