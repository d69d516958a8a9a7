"""KL estimators and entropy, against enumerations of a small vocabulary in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import compose
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives import entropy, kl
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms

ESTIMATORS = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(-d) - 1 + d}
SLOPES = {"k1": lambda d: 1 + 0 * d, "k2": lambda d: d, "k3": lambda d: 1 - np.exp(-d)}
LOGITS = np.array([0.3, -1.2, 0.9, 2.0, -0.4, 0.0])
REFERENCE = np.array([0.1, 0.5, -0.7, 1.0, -2.0, 0.4])


def softmax(x):
  return np.exp(x) / np.exp(x).sum()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_and_its_gradient_equal_the_equation(packed, estimator):
  term = sum_of_terms([functools.partial(kl, beta=0.7, estimator=estimator)])

  def loss(logprobs, batch, outputs):
    return term(outputs.replace(logprobs=logprobs), batch, loss_weights(batch, "sequence_mean"),
                mean_weights(batch))

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  for seed in range(4):
    batch, outputs = packed.batch(seed)
    d = np.asarray(outputs.logprobs, np.float64) - batch.signals["reference_logprobs"]
    (value, metrics), gradient = run(outputs.logprobs, batch, outputs)
    estimates = ESTIMATORS[estimator](d)
    packed.close(value, 0.7 * packed.aggregate(batch, estimates, "sequence_mean"))
    packed.close(metrics["kl"], estimates[batch.loss_mask].mean())
    weights = np.asarray(loss_weights(batch, "sequence_mean"), np.float64)
    slopes = np.where(batch.loss_mask, SLOPES[estimator](d), 0)
    packed.close(gradient, 0.7 * weights * slopes)


def enumerated(estimator):
  """Mean of an estimator, and of its gradient in the logits, over all tokens of a vocabulary."""
  p, size = softmax(LOGITS), len(LOGITS)
  reference = np.log(softmax(REFERENCE))
  batch = pack([Trajectory([0, token], [False, True], weight=p[token],
                           signals={"reference_logprobs": np.array([0, reference[token]])})
                for token in range(size)], row_length=2, min_rows=8)

  def mean(logits):
    logprobs = jax.nn.log_softmax(logits)[batch.tokens]
    values, _ = kl(ModelOutputs(logprobs=logprobs), batch, beta=1.0, estimator=estimator)
    return size * jnp.sum(loss_weights(batch, "sequence_sum") * values)

  return jax.value_and_grad(mean)(jnp.asarray(LOGITS, jnp.float32))


def test_the_full_kl_is_that_of_the_vocabulary_and_so_is_its_gradient():
  reference = np.log(softmax(REFERENCE))
  batch = pack([Trajectory([0, 1, 2], [False, True, True])], row_length=4)

  def read(logits):
    log_p = jax.nn.log_softmax(logits)
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - jnp.float32(reference)))
    return kl(ModelOutputs(logprobs=jnp.zeros(batch.tokens.shape), distribution={
        "reference_kl": jnp.full(batch.tokens.shape, divergence)}), batch, beta=0.7, estimator="full")

  values, metrics = read(jnp.float32(LOGITS))
  p = softmax(LOGITS)
  exact = np.sum(p * (np.log(p) - reference))
  np.testing.assert_allclose(values, np.where(batch.loss_mask, 0.7 * exact, 0), rtol=1e-5)
  np.testing.assert_allclose(metrics["kl"], np.where(batch.loss_mask, exact, 0), rtol=1e-5)
  gradient = jax.grad(lambda z: jnp.sum(read(z)[0]))(jnp.float32(LOGITS))
  np.testing.assert_allclose(gradient, 2 * 0.7 * p * (np.log(p) - reference - exact), rtol=1e-4, atol=1e-6)
  term = functools.partial(kl, beta=1.0, estimator="full", model="teacher")
  with pytest.raises(ValueError, match="estimator='full' is of the reference alone, not of model='teacher'"):
    compose.signals_of(term)


def test_k1_and_k3_have_the_kl_as_their_mean():
  p, q = softmax(LOGITS), softmax(REFERENCE)
  for estimator in ("k1", "k3"):
    np.testing.assert_allclose(enumerated(estimator)[0], np.sum(p * np.log(p / q)), rtol=1e-5)


def test_the_gradient_of_k1_has_mean_zero():
  np.testing.assert_allclose(enumerated("k1")[1], 0, atol=1e-6)


def test_the_gradient_of_k2_has_the_gradient_of_the_kl_as_its_mean():
  p, q = softmax(LOGITS), softmax(REFERENCE)
  expected = p * (np.log(p / q) - np.sum(p * np.log(p / q)))
  np.testing.assert_allclose(enumerated("k2")[1], expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_k3_has_the_gradient_of_the_reverse_direction_as_its_mean():
  expected = softmax(LOGITS) - softmax(REFERENCE)  # of KL(reference || policy)
  np.testing.assert_allclose(enumerated("k3")[1], expected, rtol=1e-5, atol=1e-6)


def one_token(difference):
  """k3 of one loss token with log policy - log reference = difference, per entry."""
  trajectories = [Trajectory([0, 1], [False, True], signals={"reference_logprobs": [0.0, -d]})
                  for d in difference]
  batch = pack(trajectories, row_length=2, min_sequences=len(difference))

  def total(logprobs, estimator="k3"):
    return jnp.sum(kl(ModelOutputs(logprobs=logprobs), batch, beta=1.0, estimator=estimator)[0])

  zeros = jnp.zeros(batch.tokens.shape)
  values = kl(ModelOutputs(logprobs=zeros), batch, beta=1.0)[0]
  at = batch.loss_mask
  return np.asarray(values)[at], np.asarray(jax.grad(total)(zeros))[at]


def test_k3_is_never_negative_and_accurate_near_zero():
  size = np.logspace(-9, 1, 200)
  difference = np.concatenate([-size, size]).astype(np.float32)
  values, gradients = one_token(difference)
  exact = difference.astype(np.float64)
  assert np.all(values >= 0)
  np.testing.assert_allclose(values, np.expm1(-exact) + exact, rtol=1e-5, atol=2e-7)
  np.testing.assert_allclose(gradients, -np.expm1(-exact), rtol=1e-5, atol=2e-7)


def test_hostile_differences_give_finite_losses_and_gradients():
  values, gradients = one_token(np.array([100.0, -100.0, 1e30, -1e30]))
  assert np.all(np.isfinite(values)) and np.all(np.isfinite(gradients))


def test_the_entropy_bonus_has_the_gradient_of_the_entropy():
  p = softmax(LOGITS)
  surprise = -np.log(p)
  batch = pack([Trajectory([0, 1, 2], [False, True, True])], row_length=4)

  def loss(logits):
    logprobs = jax.nn.log_softmax(logits)
    entropies = jnp.full(batch.tokens.shape, -jnp.sum(jnp.exp(logprobs) * logprobs))
    return sum_of_terms([functools.partial(entropy, coefficient=0.3)])(
        ModelOutputs(entropy=entropies), batch, loss_weights(batch, "token_mean"),
        mean_weights(batch))

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
      jnp.asarray(LOGITS, jnp.float32))
  exact = np.sum(p * surprise)
  np.testing.assert_allclose(metrics["entropy"], exact, rtol=1e-5)
  np.testing.assert_allclose(value, -0.3 * exact, rtol=1e-5)
  np.testing.assert_allclose(gradient, -0.3 * p * (surprise - exact), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("term, field", [
    (functools.partial(kl, beta=1.0, estimator="k1"), "logprobs"),
    (functools.partial(kl, beta=1.0, estimator="k2"), "logprobs"),
    (functools.partial(kl, beta=1.0, estimator="k3"), "logprobs"),
    (functools.partial(entropy, coefficient=1.0), "entropy")])
def test_off_the_loss_mask_nothing_is_read(packed, term, field):
  batch, outputs = packed.batch(0)
  for garbage in (np.nan, np.inf, -np.inf):
    spoiled = np.where(batch.loss_mask, getattr(outputs, field), np.float32(garbage))
    gradient = jax.grad(lambda x: jnp.sum(term(outputs.replace(**{field: x}), batch)[0]))(spoiled)
    values, metrics = term(outputs.replace(**{field: spoiled}), batch)
    assert np.all(np.isfinite(gradient)) and not np.asarray(gradient)[~batch.loss_mask].any()
    for x in (values, *metrics.values()):
      assert np.all(np.isfinite(x))


def test_an_unknown_estimator_is_refused(packed):
  batch, outputs = packed.batch(0)
  with pytest.raises(ValueError, match="estimator='k4'; valid are 'k1', 'k2' and 'k3'"):
    kl(outputs, batch, beta=0.1, estimator="k4")
