"""OGPSA: quadratics in closed form, bases against NumPy's SVD, and what an optimiser leaves of it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.training import optimizers
from jaxrl.transforms import project_out_references
from jaxrl.transforms.references import orthonormal, project

SHAPES = {"a": (6, 5), "b": (7,)}
SGD = dict(name="sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, final_fraction=0.1, b1=0.0,
           b2=0.95, epsilon=1e-8, weight_decay=0.0, clip_norm=0.0)


def trees(seed, count):
  rng = np.random.default_rng(seed)
  return [{k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
          for _ in range(count)]


def flat(tree, per_tensor):
  """Vectors of float64: of each tensor, or of all as one."""
  own = {k: np.asarray(x, np.float64).ravel() for k, x in tree.items()}
  return own if per_tensor else {"all": np.concatenate([own[k] for k in sorted(own)])}


def built(references, optimizer=None, **arguments):
  """The whole optimiser of a config with the projection in it, and its state."""
  name = "project_out_references"
  config = dict(optimizer or SGD, transforms=[dict(name=name, references=[], **arguments)])
  pieces = optimizers.read_transforms(config, lambda spec, where: references)
  return optimizers.build(config, 10, pieces)


def loss_of(*vectors):
  """A reference whose batches are the gradients themselves."""
  return types.SimpleNamespace(batches=list(vectors))


def step(optimizer, state, gradient, params):
  return optimizer.update(gradient, state, params, gradient_of=lambda loss, batch: batch)


def filled(optimizer, references, params):
  state = optimizer.init(params)
  for key, inner in state.items():
    if key != "optimizer":
      state[key] = inner._replace(batches=tuple(tuple(r.batches) for r in references))
  return state


def test_a_reference_loss_changes_by_the_square_of_the_rate_alone():
  rng = np.random.default_rng(0)
  A, B = (m @ m.T for m in rng.normal(size=(2, 6, 6)))
  a, b, x = rng.normal(size=(3, 6))

  def reference(x):
    return (x - a) @ A @ (x - a) / 2

  def safe(x):
    return (x - b) @ B @ (x - b) / 2
  u, g = A @ (x - a), B @ (x - b)
  references = [loss_of({"x": jnp.asarray(u, jnp.float32)})]
  params, gradient = ({"x": jnp.asarray(v, jnp.float32)} for v in (x, g))
  changes = {"plain": [], "projected": []}
  for rate in (1e-1, 1e-2, 1e-3):
    optimizer = built(references, SGD | {"learning_rate": rate})
    update, _ = step(optimizer, filled(optimizer, references, params), gradient, params)
    moved = np.asarray(update["x"], np.float64)
    changes["projected"].append(reference(x + moved) - reference(x))
    changes["plain"].append(reference(x - rate * g) - reference(x))
    along = g - (g @ u) / (u @ u) * u
    np.testing.assert_allclose(changes["projected"][-1], rate ** 2 / 2 * along @ A @ along, rtol=2e-3)
    if rate < 0.01:
      assert safe(x + moved) < safe(x)
  ratio = {k: v[1] / v[2] for k, v in changes.items()}
  assert ratio["projected"] == pytest.approx(100, rel=5e-3) and ratio["plain"] < 25


@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("count, rank", [(1, 0), (3, 0), (4, 2)])
def test_what_is_left_is_orthogonal_to_the_singular_directions(per_tensor, count, rank):
  vectors, (gradient,) = trees(1, count), trees(2, 1)
  basis = orthonormal(vectors, rank, per_tensor)
  assert len(basis) == (rank or count)
  found = {variant: flat(project(gradient, basis, variant=variant, per_tensor=per_tensor), per_tensor)
           for variant in ("orthogonal", "plane")}
  for name, g in flat(gradient, per_tensor).items():
    U = np.linalg.svd(np.stack([flat(v, per_tensor)[name] for v in vectors], axis=1))[0][:, :rank or count]
    along = U @ (U.T @ g)
    np.testing.assert_allclose(found["orthogonal"][name], g - along, atol=3e-6)
    np.testing.assert_allclose(found["plane"][name], along, atol=3e-6)
    assert np.abs(U.T @ found["orthogonal"][name]).max() < 1e-6 * np.linalg.norm(g)


@pytest.mark.parametrize("per_tensor", [True, False])
def test_a_rank_that_the_gradients_do_not_have_adds_no_direction(per_tensor):
  """Multiples of one gradient: what else an SVD names is rounding, which means nothing."""
  (one,) = trees(1, 1)
  vectors = [jax.tree.map(lambda x, a=a: a * x, one) for a in (1.0, -0.3, 2.0)]
  first, second = orthonormal(vectors, 2, per_tensor)
  alone, = orthonormal([one], 0, per_tensor)
  for found, expected in zip(jax.tree.leaves(first), jax.tree.leaves(alone)):
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-5)
  assert not any(np.any(x) for x in jax.tree.leaves(second))


def test_the_threshold_projects_conflicts_only():
  (u,), (g,) = trees(3, 1), trees(4, 1)
  own, towards = flat(u, True), flat(g, True)
  g = {k: x * (1 if towards[k] @ own[k] < 0 else -1) for k, x in g.items()}
  g["b"] = -g["b"]  # in conflict in one tensor, and not in the other
  found = flat(project(g, orthonormal([u]), variant="threshold", scale=0.5), True)
  e = own["a"] / np.linalg.norm(own["a"])
  want = flat(g, True)
  np.testing.assert_allclose(found["a"], want["a"] - want["a"] @ e * e, atol=2e-6)
  np.testing.assert_allclose(found["b"], 0.5 * want["b"], rtol=1e-6)


def test_directions_that_add_nothing_are_left_out():
  (u, v), (g,) = trees(5, 2), trees(6, 1)
  zero = jax.tree.map(jnp.zeros_like, u)
  broken = jax.tree.map(lambda x: x * jnp.nan, u)
  twice = jax.tree.map(lambda x: 3 * x, u)
  basis = orthonormal([u, twice, zero, broken, v])
  sizes = [float(optax.tree.norm(e)) for e in basis]
  np.testing.assert_allclose(sizes, [2 ** 0.5, 0, 0, 0, 2 ** 0.5], rtol=1e-5)  # of two tensors
  for found, expected in zip(jax.tree.leaves(project(g, basis)),
                             jax.tree.leaves(project(g, orthonormal([u, v])))):
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("every, renewed", [(2, [0, 2, 4]), (0, [0])])
def test_the_basis_is_of_the_parameters_of_the_last_renewal(every, renewed):
  seen = []
  optimizer = built([loss_of(trees(0, 1)[0])], every=every)
  params, state, (g,) = trees(7, 1)[0], None, trees(8, 1)
  state = optimizer.init(params)
  for number in range(5):
    at = jax.tree.map(lambda x: x + number, params)
    _, state = optimizer.update(g, state, at, gradient_of=lambda loss, batch: at)
    seen.append(np.asarray(state["0_project_out_references"].basis[0]["b"]))
    expected = np.asarray(params["b"]) + max(n for n in renewed if n <= number)
    np.testing.assert_allclose(seen[-1], expected / np.linalg.norm(expected), rtol=1e-5)


@pytest.mark.parametrize("name, on, leak", [("sgd", "gradient", 1e-6), ("adamw", "update", 1e-6),
                                            ("adamw", "gradient", None)])
def test_only_projecting_the_update_survives_adam(name, on, leak):
  """The cosine of what parameters do with the reference gradient, after the whole optimiser."""
  references = [loss_of(*trees(9, 1))]
  config = SGD | dict(name=name, b1=0.9 if name == "adamw" else 0.0, clip_norm=1.0, learning_rate=1e-2,
                      weight_decay=0.1 if name == "adamw" else 0.0)
  optimizer = built(references, config, on=on)
  (params,), gradients = trees(10, 1), trees(11, 4)
  state = filled(optimizer, references, params)
  for gradient in gradients:
    update, state = step(optimizer, state, gradient, params)
    u, v = (flat(t, True) for t in (references[0].batches[0], update))
    cosines = [abs(u[k] @ v[k]) / np.linalg.norm(u[k]) / np.linalg.norm(v[k]) for k in u]
    assert max(cosines) < leak if leak else max(cosines) > 1e-2


@pytest.mark.parametrize("arguments, message", [
    (dict(variant="thresh"), "did you mean 'threshold'"), (dict(rank=2), "rank=2 must be 0 to 1"),
    (dict(every=-1), "every=-1"), (dict(on="grad"), r"transforms\[0\].on='grad'.*'gradient'")])
def test_bad_arguments_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    built([loss_of(*trees(0, 1))], **arguments)


def test_no_reference_is_refused():
  with pytest.raises(ValueError, match="references is empty"):
    project_out_references(references=[])
