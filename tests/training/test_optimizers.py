"""Schedules and first updates against their formulas in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.models import DecoderConfig
from jaxrl.models import init_parameters
from jaxrl.models import unbox
from jaxrl.training import optimizers

CONFIG = dict(name="adamw", learning_rate=1e-2, schedule="constant", warmup_steps=0,
              final_fraction=0.1, b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.0, clip_norm=0.0)


def rates(steps, **changes):
  schedule = optimizers.learning_rate({**CONFIG, **changes}, steps)
  return np.array([float(schedule(i)) for i in range(steps + 3)])


def test_a_constant_rate_after_warm_up():
  np.testing.assert_allclose(rates(6, warmup_steps=3),
                             [0.0025, 0.005, 0.0075] + [0.01] * 6, rtol=1e-6)


def test_a_linear_rate_reaches_its_last_fraction_and_stays():
  expected = [1e-2 * (1 - 0.9 * min(i, 8) / 8) for i in range(11)]
  np.testing.assert_allclose(rates(8, schedule="linear"), expected, rtol=1e-5)


def test_a_cosine_rate_after_warm_up():
  expected = [1e-2 / 3, 2e-2 / 3] + [
      1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * min(i, 8) / 8)) / 2) for i in range(11)]
  np.testing.assert_allclose(rates(10, schedule="cosine", warmup_steps=2), expected, rtol=1e-5)


PARAMS = {"matrix": np.array([[1.0, -2.0], [3.0, 0.5]]), "bias": np.array([1.0, 4.0])}
GRADIENT = {"matrix": np.array([[0.1, -0.2], [0.0, 2.0]]), "bias": np.array([-1.0, 0.5])}


def update(times=1, **changes):
  """The parameters after some equal gradients."""
  optimizer = optimizers.build({**CONFIG, **changes}, 100)
  params = {k: jnp.asarray(v, jnp.float32) for k, v in PARAMS.items()}
  gradient = {k: jnp.asarray(v, jnp.float32) for k, v in GRADIENT.items()}
  state = optimizer.init(params)
  for _ in range(times):
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return params


def assert_moves(params, moves):
  for name in PARAMS:
    np.testing.assert_allclose(params[name], PARAMS[name] + moves[name], rtol=1e-5, atol=1e-6)


def test_adamw_takes_a_step_of_the_rate_and_decays_matrices_only():
  moves = {k: -1e-2 * g / (np.abs(g) + 1e-8) for k, g in GRADIENT.items()}
  assert_moves(update(), moves)
  moves["matrix"] = moves["matrix"] - 1e-2 * 0.3 * PARAMS["matrix"]
  assert_moves(update(weight_decay=0.3), moves)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", optimizers.DECAYING)
def test_biases_and_norms_of_a_model_do_not_decay_however_many_axes_they_have(name, scan_layers):
  config = DecoderConfig(vocab_size=6, layers=2, d_model=8, heads=2, kv_heads=1, d_ff=8,
                         qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True,
                         tie_embeddings=False, scan_layers=scan_layers, heads_on_top=(("value", 1),))
  shapes = unbox(jax.eval_shape(lambda: init_parameters(config, jax.random.key(0))))
  params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  optimizer = optimizers.build({**CONFIG, "name": name, "weight_decay": 0.3}, 10)
  zero = jax.tree.map(np.zeros_like, params)
  moves, _ = optimizer.update(zero, optimizer.init(params), params)
  for path, move in jax.tree_util.tree_leaves_with_path(moves):
    expected = 0.0 if path[-1].key in ("bias", "scale") else -1e-2 * 0.3
    np.testing.assert_allclose(move, expected, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_adamw_over_two_steps_with_its_own_constants():
  g, b1, b2, epsilon = GRADIENT["bias"], 0.5, 0.8, 0.1
  expected, m, v = PARAMS["bias"].copy(), 0.0, 0.0
  for t in (1, 2):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g ** 2
    expected = expected - 1e-2 * (m / (1 - b1 ** t)) / (np.sqrt(v / (1 - b2 ** t)) + epsilon)
  np.testing.assert_allclose(update(2, b1=b1, b2=b2, epsilon=epsilon)["bias"], expected, rtol=1e-6)


def test_lion_steps_by_the_sign():
  assert_moves(update(name="lion"), {k: -1e-2 * np.sign(g) for k, g in GRADIENT.items()})


def test_sgd_follows_the_gradient_with_momentum_b1():
  assert_moves(update(name="sgd", b1=0.0), {k: -1e-2 * g for k, g in GRADIENT.items()})
  assert_moves(update(2, name="sgd", b1=0.5), {k: -1e-2 * 2.5 * g for k, g in GRADIENT.items()})


def test_clipping_is_by_the_norm_of_everything():
  norm = math.sqrt(sum((g ** 2).sum() for g in GRADIENT.values()))
  assert norm > 0.5
  moves = {k: -1e-2 * g * 0.5 / norm for k, g in GRADIENT.items()}
  assert_moves(update(name="sgd", b1=0.0, clip_norm=0.5), moves)
  assert_moves(update(name="sgd", b1=0.0, clip_norm=norm * 2),
               {k: -1e-2 * g for k, g in GRADIENT.items()})


@pytest.mark.parametrize("name", sorted(optimizers.OPTIMIZERS))
def test_every_optimizer_descends(name):
  params = update(20, name=name, b1=0.9)
  for k, g in GRADIENT.items():
    assert (np.sign(g) * (np.asarray(params[k]) - PARAMS[k]) <= 0).all()


@pytest.mark.parametrize("changes, message", [
    (dict(name="adam"), r"config.optimizer.name='adam'; did you mean 'adamw'\?"),
    (dict(schedule="cosin"), r"config.optimizer.schedule='cosin'; did you mean 'cosine'\?"),
    (dict(warmup_steps=100), "warmup_steps=100 must be .* less than the phase's steps=100"),
    (dict(warmup_steps=-1), "warmup_steps=-1 must be 0 or more"),
    (dict(name="sgd", weight_decay=0.1), "weight_decay=0.1, but sgd has none: .* adamw or lion"),
])
def test_bad_settings_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    optimizers.build({**CONFIG, **changes}, 100)
