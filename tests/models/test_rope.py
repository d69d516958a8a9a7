"""Rotations against complex numbers in float64, also far from the beginning."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxrl.models import rope, rope_configs


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


YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=512)
LONG = dict(rope_type="longrope", original_max_position_embeddings=512,
            short_factor=np.linspace(1, 2, 16).tolist(), long_factor=np.linspace(1, 40, 16).tolist())


@pytest.mark.parametrize("theta", [50.0, 10_000.0, 1e6])
@pytest.mark.parametrize("scaling", [
    dict(rope_type="linear", factor=3.0),
    dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
         original_max_position_embeddings=512),
    YARN, dict(YARN, attention_factor=1.7), dict(YARN, mscale=1.3, mscale_all_dim=0.4), dict(YARN, mscale=1.3),
    dict(YARN, beta_fast=20.0, beta_slow=2.0), dict(YARN, truncate=False), dict(YARN, factor=1.0),
    LONG, dict(LONG, factor=3.0), dict(LONG, attention_factor=1.2)])
def test_scalings_are_those_of_transformers(scaling, theta):
  for length in (512, 513):
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=4096,
        rope_parameters=dict(scaling, rope_theta=theta))
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=length)
    ours = dict(rope_configs.read(dict(config.to_dict()), rope_configs.Spelling())["rope_scaling"])
    np.testing.assert_allclose(rope.frequencies(32, theta, ours, length), expected, rtol=2e-6)
    assert rope.attention_factor(ours) == pytest.approx(factor, rel=1e-12)
