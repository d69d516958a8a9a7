"""Humanline: the clamp before the reduction, its gradient, the reference that lags, and its limit theorem."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxrl import config as configs
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives import clipped_surrogate, dpo, kto
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms
from tests.objectives import compared

LOW, HIGH = -0.6, 0.9
log_s, s = scipy.special.log_expit, scipy.special.expit


def held(own, t):
  return np.clip(own - compared.of(t, "reference"), LOW, HIGH)


def dpo_equation(trajectories, beta):
  def loss(own):
    total = [-log_s(beta * (held(own[a], trajectories[a]).sum() - held(own[b], trajectories[b]).sum()))
             for a, b in compared.in_pairs(trajectories).values()]
    return np.mean(total)
  return loss


def kto_equation(trajectories, beta):
  def loss(own):
    total = []
    for x, t in zip(own, trajectories):
      r = beta * held(x, t).sum()
      total.append(1 - s(r) if t.columns["preference"] else 1 - s(-r))
    return np.mean(total)
  return loss


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("term, equation", [
    (functools.partial(dpo, beta=0.4, clamp=(LOW, HIGH)), dpo_equation),
    (functools.partial(kto, beta=0.4, clamp=(LOW, HIGH), estimate_kl=False), kto_equation)])
def test_sums_are_of_clamped_log_ratios(seed, term, equation):
  trajectories = compared.pairs(seed, count=6)
  metrics = compared.equals(term, trajectories, equation(trajectories, 0.4))
  ratios = [compared.of(t, "old") - compared.of(t, "reference") for t in trajectories]
  inside = [np.mean((x >= LOW) & (x <= HIGH)) for x in ratios]
  assert 0.2 < np.mean(inside) < 0.95, "both sides of the clamp are in the test"
  np.testing.assert_allclose(metrics["unclamped_fraction"], np.mean(inside), rtol=1e-5)


def test_a_token_beyond_the_bounds_has_no_gradient_and_the_others_do():
  trajectories = compared.pairs(3)
  batch, _ = compared.prepared(dpo, trajectories)
  ratio = np.asarray(batch.signals["old_logprobs"] - batch.signals["reference_logprobs"])
  for term in (dpo, functools.partial(kto, estimate_kl=False)):
    plain = compared.value_and_gradient(functools.partial(term, beta=0.3), batch)[2]
    clamped = compared.value_and_gradient(functools.partial(term, beta=0.3, clamp=(LOW, HIGH)), batch)[2]
    mask, inside = np.asarray(batch.loss_mask), (ratio >= LOW) & (ratio <= HIGH)
    assert plain[mask].all() and (mask & ~inside).any()
    np.testing.assert_array_equal(clamped != 0, mask & inside)


def test_the_kl_of_kto_is_of_clamped_ratios_too():
  trajectories = compared.pairs(4)
  for t in trajectories:
    t.signals["mismatched"] = np.zeros(len(t.tokens))
  for t in compared.pairs(5):
    t.scored, t.group = False, 100 + len(trajectories)
    t.signals["mismatched"] = t.loss_mask.astype(float)
    t.signals["old_logprobs"] = t.signals["old_logprobs"] * 0.2  # above the reference, so z > 0
    trajectories.append(t)
  batch, _ = compared.prepared(functools.partial(kto, clamp=(LOW, HIGH)), trajectories)
  strays = [t for t in trajectories if not t.scored]
  z = np.mean([held(compared.of(t, "old"), t).sum() for t in strays])
  assert z > 0.1
  np.testing.assert_allclose(np.asarray(batch.signals["kto_kl"]).max(), z, rtol=1e-5)


def rollouts(seed, count=6):
  rng = np.random.default_rng(seed)
  found = []
  for item in range(count):
    n = int(rng.integers(3, 8))
    found.append(Trajectory(
        rng.integers(0, 9, n), np.arange(n) >= 1, group=item // 3, behaviour_logprobs=rng.uniform(-2, 0, n), signals={
            "reference_logprobs": rng.uniform(-2, 0, n), "logprobs": rng.uniform(-2, 0, n),
            "advantages": np.full(n, rng.normal())}))
  return found


@pytest.mark.parametrize("seed", range(3))
def test_the_surrogate_divides_by_the_reference_and_clamps_before_it_clips(seed):
  trajectories = rollouts(seed)
  batch = jax.tree.map(jnp.asarray, pack(trajectories, row_length=32))
  term = functools.partial(clipped_surrogate, low=0.2, high=0.3, anchor="reference", clamp=(LOW, 0.2))

  def loss(x):
    return sum_of_terms([term])(ModelOutputs(logprobs=x), batch, loss_weights(batch, "sequence_mean"),
                                mean_weights(batch))
  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(batch.signals["logprobs"])

  def equation(own):
    total = []
    for x, t in zip(own, trajectories):
      l = np.clip(x - compared.of(t, "reference"), LOW, 0.2)  # exp(0.2) < 1.3, so no clip from above
      rho, a = np.exp(l), float(t.signals["advantages"][0])
      total.append(-np.minimum(a * rho, a * np.clip(rho, 0.8, 1.3)).mean())
    return np.mean(total)
  own = [np.float64(t.signals["logprobs"])[t.loss_mask] for t in trajectories]
  np.testing.assert_allclose(value, equation(own), rtol=1e-5)
  inside = []
  for i, t in enumerate(trajectories):
    mine = np.asarray(gradient)[(np.asarray(batch.sequence_ids) == i) & np.asarray(batch.loss_mask)]
    for k in range(len(mine)):
      ends = []
      for sign in (1, -1):
        moved = [x.copy() for x in own]
        moved[i][k] += sign * 1e-6
        ends.append(equation(moved))
      np.testing.assert_allclose(mine[k], (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-7)
    l = own[i] - compared.of(t, "reference")
    inside += list((l >= LOW) & (l <= 0.2))
  np.testing.assert_allclose(metrics["unclamped_fraction"], np.mean(inside), rtol=1e-5)


@pytest.mark.parametrize("term", [dpo, kto, clipped_surrogate])
@pytest.mark.parametrize("clamp", [(0.5, 1.0), (-1.0,), (-1.0, -0.5), (1.0, -1.0)])
def test_bounds_that_do_not_hold_0_are_refused(term, clamp):
  batch, _ = compared.prepared(dpo, compared.pairs(0))
  with pytest.raises(ValueError, match=f"{term.__name__}: clamp="):
    term(ModelOutputs(logprobs=batch.signals["old_logprobs"]), batch, clamp=clamp)


def rejected(rho, gamma_p, gamma_r, m_p, m_r):
  """Probability that Humanline sampling stops the gradient of a token of ratio rho, for Beta(gamma, 1)."""
  def cdf(x, gamma):
    return np.clip(x, 0, 1) ** gamma
  kept = cdf(rho / m_p, gamma_p) * cdf(1 / (rho * m_r), gamma_r)
  return 1 - kept


def test_as_the_sampling_becomes_certain_it_is_the_clip():
  """With M E[B] = 1 - e and 1 / (1 + e) the mask tends to [1 - e, 1 + e] as gamma grows (E[B] -> 1)."""
  e, rho = 0.2, np.linspace(0.5, 1.6, 400)
  clip = (rho < 1 - e) | (rho > 1 + e)
  errors = []
  for gamma in (5, 50, 500, 5000):
    mean = gamma / (gamma + 1)
    found = rejected(rho, gamma, gamma, (1 - e) / mean, 1 / ((1 + e) * mean))
    errors.append(np.mean(np.abs(found - clip)))
  assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 < errors[0]
  rng = np.random.default_rng(0)  # and the closed form is the sampling
  for x in (0.7, 0.85, 1.1):
    draws = rng.beta(5, 1, (2, 200_000))
    stopped = (x < 0.9 * draws[0]) | (1 / x < 0.95 * draws[1])
    np.testing.assert_allclose(rejected(x, 5, 5, 0.9, 0.95), stopped.mean(), atol=0.005)


def test_the_config_synchronises_before_the_step():
  config = configs.load("configs/methods/humanline.py")
  assert (config.reference.every, config.reference.lag) == (1, True)
