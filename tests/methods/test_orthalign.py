"""OrthAlign: leakage by place in the chain, spectral bounds, and the search for the width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.training import optimizers
from jaxrl.transforms import null_space
from jaxrl.transforms.start import PhaseStart

D, R = 32, 4
ADAM = dict(name="adamw", learning_rate=1e-2, schedule="constant", warmup_steps=0, final_fraction=0.1,
            b1=0.9, b2=0.99, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0)
SGD = ADAM | dict(name="sgd", b1=0.0, weight_decay=0.0, learning_rate=1.0)
# Shapes as those of the decoder: [inputs, heads, width], [heads, width, outputs], [inputs, outputs].
SHAPES = {("attention", "query"): (D, 4, 8), ("attention", "output"): (4, 8, D), ("mlp", "up"): (D, 48)}


def matrix(name, x):
  """Outputs x inputs, in float64."""
  x = np.asarray(x, np.float64)
  inputs = 2 if name == ("attention", "output") else 1
  return x.reshape(int(np.prod(x.shape[:inputs])), -1).T


def tree(kernels, scale):
  layer = {"norm": {"scale": scale}}
  for (block, name), x in kernels.items():
    layer.setdefault(block, {})[name] = {"kernel": jnp.asarray(x, jnp.float32)}
  return {"params": {"blocks_0": layer}}


def kernels_of(params):
  layer = params["params"]["blocks_0"]
  return {key: layer[key[0]][key[1]]["kernel"] for key in SHAPES}


def drawn(seed, rank=0):
  rng = np.random.default_rng(seed)
  found = {}
  for name, shape in SHAPES.items():
    if rank:
      inputs, outputs = matrix(name, np.zeros(shape)).T.shape
      x = (rng.normal(size=(inputs, rank)) @ rng.normal(size=(rank, outputs))).reshape(shape)
    else:
      x = rng.normal(size=shape)
    found[name] = x
  return tree(found, jnp.asarray(rng.normal(size=D), jnp.float32))


def add(a, b, factor=1.0):
  return jax.tree.map(lambda x, y: x + factor * y, a, b)


def begun(config, measure=None, **arguments):
  """Optimiser, its state, and the parameters after an earlier change of rank R."""
  before = drawn(0)
  after = add(before, drawn(1, rank=R), 0.3)
  config = dict(config, transforms=[dict(name="project_onto_null_space", **arguments)])
  pieces = optimizers.read_transforms(config, None)
  optimizer = optimizers.build(config, 100, pieces)
  state = optimizers.begin(pieces, optimizer.init(after), PhaseStart(after, lambda run: before, measure))
  return optimizer, state, before, after


def trained(optimizer, state, params, steps=6):
  update = jax.jit(optimizer.update)
  for seed in range(steps):
    updates, state = update(drawn(20 + seed), state, params)
    params = jax.tree.map(jnp.add, params, updates)
    yield params, state


def leakage(before, after, end):
  """For each matrix: part of the second change along the first one's leading output directions."""
  found = {}
  for name in SHAPES:
    old, mid, new = (matrix(name, kernels_of(p)[name]) for p in (before, after, end))
    U = np.linalg.svd(mid - old)[0][:, :R]
    found[name] = np.linalg.norm(U.T @ (new - mid)) / np.linalg.norm(new - mid)
  return found


@pytest.mark.parametrize("config, on, low, high", [
    (SGD, "gradient", 0, 1e-5), (ADAM, "gradient", 0.03, 0.3), (ADAM, "update", 0, 1e-5)])
def test_leakage_depends_on_what_is_projected(config, on, low, high):
  """float32 parameters round sums of updates, so an update alone leaks less than their sum."""
  optimizer, state, before, after = begun(config, ratio=1 - R / D, on=on)
  end = list(trained(optimizer, state, after))[-1][0]
  assert all(low <= x <= high for x in leakage(before, after, end).values())
  updates, _ = optimizer.update(drawn(9), state, after)
  single = leakage(before, after, add(after, updates))
  assert on != "update" or all(x < 1e-5 for x in single.values())
  if on == "update":
    for name in SHAPES:
      U = np.linalg.svd(matrix(name, kernels_of(after)[name]) - matrix(name, kernels_of(before)[name]))[0]
      move = matrix(name, kernels_of(updates)[name])
      assert np.linalg.norm(U[:, :R].T @ move) < 1e-6 * np.linalg.norm(move)


def test_every_input_has_the_same_output_along_taken_directions_and_another_elsewhere():
  optimizer, state, before, after = begun(ADAM, ratio=1 - R / D)
  end = list(trained(optimizer, state, after))[-1][0]
  x = np.random.default_rng(3).normal(size=(D, 20))
  for name in SHAPES:
    old, mid, new = (matrix(name, kernels_of(p)[name]) for p in (before, after, end))
    U = np.linalg.svd(mid - old)[0][:, :R]
    change = (new - mid) @ x
    assert np.abs(U.T @ change).max() < 1e-4 * np.abs(change).max()
    assert np.linalg.norm(change) > 0.01
  np.testing.assert_array_equal(end["params"]["blocks_0"]["norm"]["scale"],
                                after["params"]["blocks_0"]["norm"]["scale"])


def test_changes_stay_within_the_spectral_bound_and_add_up_by_pythagoras():
  optimizer, state, before, after = begun(ADAM | {"learning_rate": 1.0}, ratio=1 - R / D, clip=0.5)
  reached = []
  for params, _ in trained(optimizer, state, after):
    for name in SHAPES:
      old, mid, new = (matrix(name, kernels_of(p)[name]) for p in (before, after, params))
      limit = np.linalg.norm(mid - old, 2)
      assert np.linalg.norm(new - mid, 2) <= 0.5 * limit * (1 + 1e-4)
      assert np.linalg.norm(new, 2) <= np.linalg.norm(old, 2) + 1.5 * limit + 1e-4
      np.testing.assert_allclose(np.linalg.norm(new - old) ** 2,
                                 np.linalg.norm(mid - old) ** 2 + np.linalg.norm(new - mid) ** 2, rtol=1e-4)
      reached.append(np.linalg.norm(new - mid, 2) / (0.5 * limit))
  assert max(reached) > 0.999


def test_the_searched_ratio_is_the_widest_within_the_tolerance():
  """R = - |W - W1|^2 of one matrix, whose change when k values become the mean of the others is known."""
  name = ("mlp", "up")
  _, _, before, after = begun(ADAM)
  s = np.linalg.svd(matrix(name, kernels_of(after)[name]) - matrix(name, kernels_of(before)[name]),
                    compute_uv=False)
  asked = []

  def measure(params):
    asked.append(params)
    gap = matrix(name, kernels_of(params)[name]) - matrix(name, kernels_of(after)[name])
    return {"reward": -np.sum(gap ** 2)}

  def expected(ratio):
    c = max(D - int(ratio * D + 1e-6), 1)
    return np.sum((np.where(np.arange(D) < c, s, s[:c].mean()) - s) ** 2)
  tolerance = expected(0.6) * 1.01
  _, state, _, _ = begun(ADAM, measure, metric="reward", tolerance=float(tolerance))
  widest = max(n / 64 for n in range(64) if expected(n / 64) <= tolerance)
  rows = state["0_project_onto_null_space"].taken["params.blocks_0.mlp.up.kernel"]
  assert int((np.linalg.norm(rows, axis=1) > 0.5).sum()) == null_space.protected(D, widest)
  assert len(asked) == 1 + null_space.HALVINGS
  with pytest.raises(ValueError, match="metric='rewards' is not measured.*reward"):
    begun(ADAM, measure, metric="rewards")


def test_layers_of_a_scan_are_matrices_of_their_own():
  rng = np.random.default_rng(5)
  rows = np.linalg.qr(rng.normal(size=(2, 8, 3)))[0].transpose(0, 2, 1)
  update = rng.normal(size=(2, 5, 8))
  found = null_space.off_rows(jnp.asarray(update, jnp.float32), jnp.asarray(rows, jnp.float32))
  for layer in range(2):
    expected = update[layer] @ (np.eye(8) - rows[layer].T @ rows[layer])
    np.testing.assert_allclose(found[layer], expected, atol=2e-6)
  assert null_space.matrix_shape(("params", "blocks", "attention", "output", "kernel"), (2, 4, 8, 32)) == (
      2, 32, 32)


def test_nothing_learnt_before_is_refused():
  config = dict(ADAM, transforms=[dict(name="project_onto_null_space")])
  pieces = optimizers.read_transforms(config, None)
  params = drawn(0)
  state = optimizers.build(config, 10, pieces).init(params)
  with pytest.raises(ValueError, match="no parameter differs"):
    optimizers.begin(pieces, state, PhaseStart(params, lambda run: params, None))


@pytest.mark.parametrize("arguments, message", [
    (dict(ratio=1.5), "ratio=1.5"), (dict(clip=-1.0), "clip=-1.0"), (dict(parameters="("), "parameters="),
    (dict(clip=1.0, on="gradient"), "on='gradient' comes before the optimiser")])
def test_bad_arguments_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    begun(ADAM, **arguments)
