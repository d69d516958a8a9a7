"""Signals of whole next-token distributions, against NumPy on one distribution at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models import distributions

RNG = np.random.default_rng(0)
HIDDEN, VOCABULARY = RNG.normal(size=(3, 5, 8)), RNG.normal(size=(23, 8))


def nucleus(p, mass):
  order = np.argsort(-p)
  kept = order[:np.searchsorted(np.cumsum(p[order]), mass) + 1]
  q = p[kept] / p[kept].sum()
  return -np.sum(q * np.log(q))


EXPECTED = {
    "mean_logprobs": lambda p: np.log(p).mean(),
    "top2_gap": lambda p: np.sort(p)[-1] - np.sort(p)[-2],
    "top_probability": np.max, "collision": lambda p: np.sum(p * p),
    "nucleus_entropy@0.8": lambda p: nucleus(p, 0.8),
    "nucleus_entropy@1.0": lambda p: -np.sum(p * np.log(p))}


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_signals_equal_numpy(block, monkeypatch):
  monkeypatch.setattr(distributions, "BLOCK", block)
  found = distributions.about_tokens(jnp.float32(HIDDEN), jnp.float32(VOCABULARY), list(EXPECTED),
                                     temperature=0.7, soft_cap=0.0)
  p = softmax(HIDDEN @ VOCABULARY.T / 0.7)
  for name, function in EXPECTED.items():
    np.testing.assert_allclose(found[name], np.apply_along_axis(function, -1, p), rtol=2e-4,
                               atol=1e-5, err_msg=name)


def test_tokens_outside_the_nucleus_have_no_gradient():
  logits = jnp.array([4.0, 3.5, 3.0, -1.0, -2.0, -3.0])
  gradient = np.asarray(jax.grad(lambda z: distributions.nucleus_entropy(z, 0.8))(logits))
  assert not gradient[3:].any() and np.abs(gradient[:2]).min() > 0


def test_divergence_is_that_of_the_whole_vocabulary():
  other = HIDDEN + 0.3 * RNG.normal(size=HIDDEN.shape)
  found = distributions.divergence(jnp.float32(HIDDEN), jnp.float32(VOCABULARY), jnp.float32(other),
                                   jnp.float32(VOCABULARY), temperature=1.0, soft_cap=0.0)
  p, q = softmax(HIDDEN @ VOCABULARY.T), softmax(other @ VOCABULARY.T)
  np.testing.assert_allclose(found, np.sum(p * np.log(p / q), -1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["nucleus_entropy", "nucleus_entropy@2", "top2_gap@0.5"])
def test_parameters_are_checked(name):
  with pytest.raises(ValueError, match=name.split("@")[0]):
    distributions.split(name)
