"""Chunked log-probabilities against float64 autograd of torch."""

from hypothesis import given, settings, strategies as st
import jax
from jax.extend.core import jaxprs_in_params
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxrl.models import token_logprobs
from jaxrl.models.logprobs import _chunk_count

ROWS, LENGTH, WIDTH, VOCAB = 2, 11, 6, 37


def inputs(seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32),
          rng.normal(size=(VOCAB, WIDTH)).astype(np.float32),
          rng.integers(0, VOCAB, size=(ROWS, LENGTH)))


def oracle(hidden, vocabulary, targets, temperature, soft_cap, weights):
  """Logprobs, entropies, and the gradients of their weighted sum, in float64."""
  h, w = (torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in (hidden, vocabulary))
  z = h @ w.T
  if soft_cap:
    z = soft_cap * torch.tanh(z / soft_cap)
  log_p = torch.log_softmax(z / temperature, dim=-1)
  logprobs = log_p.gather(-1, torch.tensor(targets)[..., None])[..., 0]
  entropies = -(log_p.exp() * log_p).sum(-1)
  a, b = (torch.tensor(x) for x in weights)
  (a * logprobs + b * entropies).sum().backward()
  return [x.detach().numpy() for x in (logprobs, entropies, h.grad, w.grad)]


def ours(hidden, vocabulary, targets, weights, **kwargs):
  def loss(hidden, vocabulary):
    logprobs, entropies = token_logprobs(hidden, vocabulary, targets, **kwargs)
    if entropies is None:
      return jnp.sum(weights[0] * logprobs), (logprobs,)
    return jnp.sum(weights[0] * logprobs + weights[1] * entropies), (logprobs, entropies)
  (_, values), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
      hidden, vocabulary)
  return (*values, *gradients)


@pytest.mark.parametrize("chunk, temperature, soft_cap", [
    (VOCAB, 1.0, 0.0), (100, 0.7, 2.0), (5, 1.0, 0.0), (8, 1.3, 0.0), (8, 0.6, 2.0), (1, 1.0, 1.5)])
def test_values_and_gradients_equal_float64(chunk, temperature, soft_cap):
  arrays = inputs()
  weights = np.random.default_rng(1).normal(size=(2, ROWS, LENGTH))
  got = ours(*arrays, weights, chunk=chunk, temperature=temperature, soft_cap=soft_cap,
             entropy=True)
  for value, expected in zip(got, oracle(*arrays, temperature, soft_cap, weights)):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


def test_logprobs_do_not_depend_on_entropy_being_wanted():
  arrays = inputs()
  weights = np.stack([np.ones((ROWS, LENGTH)), np.zeros((ROWS, LENGTH))])
  got = ours(*arrays, weights, chunk=8, entropy=False)
  expected = oracle(*arrays, 1.0, 0.0, weights)
  for value, right in zip(got, (expected[0], expected[2], expected[3])):
    np.testing.assert_allclose(value, right, rtol=1e-5, atol=1e-5)


def test_bfloat16_products_are_summed_in_float32():
  hidden, vocabulary, targets = inputs()
  rounded = [np.asarray(jnp.bfloat16(x), np.float32) for x in (hidden, vocabulary)]
  weights = np.random.default_rng(1).normal(size=(2, ROWS, LENGTH))
  got = ours(jnp.bfloat16(hidden), rounded[1], targets, weights, chunk=8, entropy=True)
  expected = oracle(*rounded, targets, 1.0, 0.0, weights)
  np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
  np.testing.assert_allclose(got[1], expected[1], atol=1e-5)
  assert [x.dtype for x in got] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32]
  for gradient, right in zip(got[2:], expected[2:]):  # only logit gradients are rounded to bfloat16
    assert np.abs(np.float32(gradient) - right).max() < 0.02 * np.abs(right).max()


@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
def test_extreme_logits_stay_finite(soft_cap):
  hidden, vocabulary, targets = inputs(scale=1e4)
  weights = np.ones((2, ROWS, LENGTH))
  got = ours(hidden, vocabulary, targets, weights, chunk=8, soft_cap=soft_cap, entropy=True)
  expected = oracle(hidden, vocabulary, targets, 1.0, soft_cap, weights)
  assert all(np.isfinite(x).all() for x in got)
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(got[1], expected[1], atol=1e-4)


def test_uniform_distribution_has_entropy_log_vocab():
  _, vocabulary, targets = inputs()
  logprobs, entropies = token_logprobs(jnp.zeros((ROWS, LENGTH, WIDTH)), vocabulary, targets,
                                       chunk=8, entropy=True)
  np.testing.assert_allclose(entropies, np.log(VOCAB), rtol=1e-6)
  np.testing.assert_allclose(logprobs, -np.log(VOCAB), rtol=1e-6)


def equations(jaxpr):
  """All equations, those of inner jaxprs included."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)


def largest_array(function, *args):
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return max(v.aval.size for e in equations(jaxpr) for v in e.outvars)


@pytest.mark.parametrize("chunk", [8, 5])
def test_no_array_of_tokens_times_vocabulary(chunk):
  hidden, vocabulary, targets = inputs()

  def loss(hidden, vocabulary, chunk):
    logprobs, entropies = token_logprobs(hidden, vocabulary, targets, chunk=chunk, entropy=True,
                                         soft_cap=3.0)
    return logprobs.sum() + entropies.sum()

  def largest(chunk):
    return largest_array(jax.value_and_grad(lambda h, w: loss(h, w, chunk), (0, 1)), hidden,
                         vocabulary)
  assert largest(chunk) <= max(ROWS * LENGTH * chunk, (VOCAB + chunk) * WIDTH)
  assert largest(VOCAB) >= ROWS * LENGTH * VOCAB  # the measure does see such an array


def test_entropy_costs_nothing_where_it_is_not_used():
  hidden, vocabulary, targets = inputs()

  def cost(entropy, weight):
    def loss(hidden):
      logprobs, entropies = token_logprobs(hidden, vocabulary, targets, chunk=8, entropy=entropy)
      return logprobs.sum() + (weight * entropies.sum() if weight else 0.0), entropies
    jaxpr = jax.make_jaxpr(jax.grad(loss, has_aux=True))(hidden).jaxpr
    forward, backward = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    return [len(list(equations(e.params["jaxpr"].jaxpr))) for e in (forward, backward)]

  nothing, metric, term = cost(False, 0), cost(True, 0), cost(True, 1)
  assert nothing[0] < metric[0] == term[0]
  assert nothing[1] == metric[1] < term[1]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 2, 4]))
def test_chunks_cover_the_vocabulary_and_are_no_larger_than_asked(vocab, chunk, parts):
  count = _chunk_count(vocab, chunk, parts)
  assert count * chunk >= vocab
  assert count <= 2 * -(-vocab // chunk)


@pytest.mark.parametrize("kwargs, message", [
    (dict(chunk=0), "vocabulary_chunk=0 must be positive"),
    (dict(chunk=8, temperature=0.0), "temperature=0.0 must be positive")])
def test_impossible_settings_are_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    token_logprobs(*inputs(), **kwargs)
