"""Mixtures of experts against loops in NumPy, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxrl import sharding
from jaxrl.models import experts
from jaxrl.sampling import precision

EXPERTS, COUNT, WIDTH, INNER = 5, 2, 6, 8
SILU = jax.nn.silu


def arrays(seed=0, units=8, length=3):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(units, length, EXPERTS))
  logits[..., 3] -= 50  # nobody goes there
  return (rng.normal(size=(units, length, WIDTH)), logits, *(
      0.4 * rng.normal(size=(EXPERTS, *shape)) for shape in ((WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH))))


def found(x, logits, gate, up, down, normalise=True):
  chosen, weights = experts.route(logits, COUNT, normalise=normalise)
  return experts.mixture(x, chosen, weights, gate, up, down, activation=SILU)


def expected(x, logits, gate, up, down, normalise=True):
  """Token by token, expert by expert, in float64."""
  out = np.zeros_like(x)
  for place in np.ndindex(x.shape[:2]):
    p = special.softmax(logits[place])
    chosen = np.argsort(-p)[:COUNT]
    total = p[chosen].sum() if normalise else 1.0
    for e in chosen:
      z = x[place] @ gate[e]
      out[place] += p[e] / total * (z * special.expit(z) * (x[place] @ up[e])) @ down[e]
  return out


@pytest.mark.parametrize("normalise", [True, False])
def test_no_token_is_dropped_however_uneven_the_load_is(normalise):
  given = arrays()
  np.testing.assert_allclose(found(*map(jnp.float32, given), normalise), expected(*given, normalise),
                             atol=2e-5)


def test_gradients_are_those_of_finite_differences():
  given, rng = arrays(), np.random.default_rng(1)
  target = rng.normal(size=given[0].shape)
  gradients = jax.jit(jax.grad(lambda args: jnp.sum(target * found(*args))))(tuple(map(jnp.float32, given)))
  for place, gradient in enumerate(gradients):
    direction, step = rng.normal(size=given[place].shape), 1e-5

    def moved(by):
      args = [x + by * direction if i == place else x for i, x in enumerate(given)]
      return np.sum(target * expected(*args))
    slope = (moved(step) - moved(-step)) / (2 * step)
    np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=2e-4, atol=2e-4)


def test_devices_that_share_rows_and_widths_find_the_same():
  given = tuple(map(jnp.float32, arrays()))
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)

  def both(args):
    return found(*args), jax.grad(lambda a: jnp.sum(jnp.sin(found(*a))))(args)
  alone = jax.jit(both)(given)
  with jax.set_mesh(mesh):
    spread = jax.jit(both)(given)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), spread, alone)


def test_integers_have_a_scale_for_each_output_of_each_expert():
  kernel = arrays()[2].astype(np.float32) * np.array([1, 10, 100, 1e3, 1e4], np.float32)[:, None, None]
  for name, stacked in (("blocks_0", kernel), ("blocks", kernel[None])):
    variables = precision.reduced({name: {"experts": {"gate": {"kernel": jnp.asarray(stacked)}}}}, dtype="int8")
    integers, scales = (np.asarray(variables[kind][name]["experts"]["gate"]["kernel"])
                        for kind in ("params", "scales"))
    assert integers.dtype == np.int8 and scales.shape == (*stacked.shape[:-2], INNER)
    bound = np.abs(stacked).max(axis=-2) / 127 / 2
    assert (np.abs(integers * scales[..., None, :] - stacked) <= 1.001 * bound[..., None, :]).all()
