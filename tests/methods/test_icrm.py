"""ICRM: the belief ends where conjugacy says, and demonstrations carry the preference."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats

from jaxrl import config as configs
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.data import CharacterTokenizer
from jaxrl.objectives import beta as betas
from jaxrl.objectives import beta_preference, bradley_terry
from jaxrl.objectives.aggregate import loss_weights
from jaxrl.training import inputs

GRID = [(p, lam, prior) for p in (0.0, 0.3, 0.5, 1.0) for lam in (0.01, 0.1, 1.0) for prior in (1.0, 2.5)]


def pair(p=1.0, evidence=1.0, swapped=False):
  """Two answers of one token behind a prompt of one."""
  found = [Trajectory([3, 4], [False, True], columns={"preference": x, "evidence": evidence}) for x in (p, 1 - p)]
  return jax.tree.map(jnp.asarray, pack(found[::-1] if swapped else found, row_length=4, together=True))


@functools.cache
def compiled(prior, **kwargs):
  def loss(x, weight, batch):
    scores = jnp.zeros((1, 4, 2)).at[0, 1].set(jnp.array([x[0], x[1]])).at[0, 3].set(jnp.array([0, x[2]]))
    values, _ = beta_preference(ModelOutputs(scores=scores), batch, weight=weight, prior=(prior, prior), **kwargs)
    return jnp.sum(loss_weights(batch, "sequence_mean") * values)
  return jax.jit(jax.value_and_grad(loss))


def loss_of(weight, prior, **kwargs):
  """The loss of a pair, and its gradient, as a function of r1 - r2 and of both sures."""
  return lambda x, batch: compiled(prior, **kwargs)(x, jnp.float32(weight), batch)


def heads(a, b, least=0.01):
  """r1 - r2 and both sures, equal, with the belief Beta(a, b)."""
  half = (a + b - least) / 2
  sure = half + np.log(-np.expm1(-half))  # the inverse of softplus
  return jnp.array([np.log(a / b), sure, sure], jnp.float32)


def card_loss(a, b, z, lam, prior):
  """The card's equation 3 in float64."""
  psi, ln_b = scipy.special.digamma, scipy.special.betaln
  kl = (ln_b(prior, prior) - ln_b(a, b) + (a - prior) * psi(a) + (b - prior) * psi(b)
        + (2 * prior - a - b) * psi(a + b))
  return -(z * psi(a) + (1 - z) * psi(b) - psi(a + b)) + lam * kl


@pytest.mark.parametrize("p, lam, prior", GRID)
def test_the_minimum_is_the_tempered_conjugate_update(p, lam, prior):
  a, b = prior + p / lam, prior + (1 - p) / lam
  end = scipy.optimize.minimize(lambda x: card_loss(*np.exp(x), p, lam, prior), np.log([a + 1, b + 2]),
                                method="BFGS", options=dict(gtol=1e-9))
  np.testing.assert_allclose(np.exp(end.x), [a, b], rtol=1e-4)
  value, gradient = loss_of(lam, prior)(heads(a, b), pair(p))
  np.testing.assert_allclose(value, end.fun, rtol=1e-4, atol=1e-5)
  assert np.abs(gradient).max() < 2e-5
  for moved in ((a * 1.1, b), (a, b / 1.1), (a * 0.9, b * 0.9)):
    assert loss_of(lam, prior)(heads(*moved), pair(p))[0] > value


@pytest.mark.parametrize("p, lam, prior", [(0.3, 0.1, 1.0), (1.0, 0.5, 2.0), (0.5, 1.0, 1.0)])
def test_the_loss_is_a_divergence_from_that_belief(p, lam, prior):
  """E[L] = lam KL(Beta(a, b) || Beta(a*, b*)) + const, with the KL by quadrature."""
  best = scipy.stats.beta(prior + p / lam, prior + (1 - p) / lam)

  def divergence(a, b):
    own = scipy.stats.beta(a, b)
    return scipy.integrate.quad(lambda x: own.pdf(x) * (own.logpdf(x) - best.logpdf(x)), 0, 1, limit=200)[0]
  points = [(2.0, 3.0), (5.0, 1.5), (1.2, 1.1), (20.0, 30.0)]
  losses = np.array([loss_of(lam, prior)(heads(*point), pair(p))[0] for point in points])
  expected = lam * np.array([divergence(*point) for point in points])
  np.testing.assert_allclose(losses - losses[0], expected - expected[0], rtol=1e-4, atol=1e-5)


def test_the_divergence_is_what_samples_say():
  own, prior = scipy.stats.beta(3.0, 5.0), scipy.stats.beta(1.5, 1.5)
  drawn = own.rvs(200_000, random_state=0)
  np.testing.assert_allclose(betas.kl_to_beta(3.0, 5.0, 1.5, 1.5), np.mean(own.logpdf(drawn) - prior.logpdf(drawn)),
                             atol=1e-2)


@pytest.mark.parametrize("lam, margin", [(0.1, 2.398), (0.01, 4.615)])
def test_margins_end_at_the_paper_s_figures_and_those_of_bradley_terry_do_not(lam, margin):
  function = loss_of(lam, 1.0)
  end = scipy.optimize.minimize(lambda x: [np.float64(v) for v in function(jnp.float32(x), pair())],
                                np.zeros(3), jac=True, method="BFGS", options=dict(gtol=1e-6))
  np.testing.assert_allclose(end.x[0], margin, atol=2e-2)
  beyond = function(heads(1 / lam + 1, 1.0).at[0].add(2.0), pair())[1]
  assert beyond[0] > 0  # it pulls back

  def logistic(x):
    scores = jnp.zeros((1, 4, 1)).at[0, 1, 0].set(x)
    return jnp.sum(loss_weights(pair(), "sequence_mean") * bradley_terry(ModelOutputs(scores=scores), pair())[0])
  assert jax.grad(logistic)(margin + 2.0) < 0  # it pushes on


@pytest.mark.parametrize("mu", [0.1, 0.5, 0.9])
def test_without_a_prior_confidence_has_no_end_and_the_loss_becomes_bradley_terry_s(mu):
  tau = np.logspace(-1, 6, 30)
  terms = np.array(betas.digamma_difference(mu * tau, (1 - mu) * tau))
  assert (np.diff(terms) <= 1e-6).all() and terms[0] > -np.log(mu) + 0.1
  np.testing.assert_allclose(terms[-1], -np.log(mu), rtol=1e-5)


def test_a_swapped_pair_has_the_same_loss():
  x = jnp.array([0.7, 1.0, -0.5])
  first = loss_of(0.1, 1.0)(x, pair(0.8))
  second = loss_of(0.1, 1.0)(jnp.array([-0.7, -0.5, 1.0]), pair(0.8, swapped=True))
  np.testing.assert_allclose(first[0], second[0], rtol=1e-6)


@pytest.mark.parametrize("k", [0, 3, 16])
def test_confidence_grows_with_demonstrations_only_if_the_loss_counts_them(k):
  p, lam = 0.75, 0.1
  a, b = 1 + (1 + k) * p / lam, 1 + (1 + k) * (1 - p) / lam
  counted = loss_of(lam, 1.0, evidence="evidence")(heads(a, b), pair(p, 1.0 + k))[1]
  assert np.abs(counted).max() < 1e-4
  plain = loss_of(lam, 1.0)(heads(1 + p / lam, 1 + (1 - p) / lam), pair(p, 1.0 + k))[1]
  assert np.abs(plain).max() < 1e-4


@pytest.mark.parametrize("a, b", [(1e-3, 1e-3), (1e-3, 1e3), (5.0, 1e6), (1e6, 1e6), (0.5, 1e-3)])
def test_the_loss_keeps_to_scipy_from_thousandths_to_millions(a, b):
  values, _ = loss_of(0.1, 1.0, least_confidence=1e-3)(heads(a, b, 1e-3), pair(0.4))
  np.testing.assert_allclose(values, card_loss(a, b, 0.4, 0.1, 1.0), rtol=2e-3)
  gradient = loss_of(0.1, 1.0, least_confidence=1e-3)(heads(a, b, 1e-3), pair(0.4))[1]
  assert np.isfinite(gradient).all()


def consistent(text, items):
  """What an ideal reader says: for each item, how many criteria that fit all demonstrations prefer it."""
  found = [0, 0]
  for place, sign in itertools.product((0, 1), (1, -1)):
    ahead = lambda a, b: sign * (int(a[place]) - int(b[place]))
    shown = re.findall(r"([+=])(\d+)[+=](\d+)", text[1:-1])
    if all((ahead(a, b) if first == "+" else ahead(b, a)) > 0 for first, a, b in shown):
      found[0] += ahead(*items) > 0
      found[1] += ahead(*items) < 0
  return found


def test_demonstrations_say_which_criterion_is_meant():
  """What the model reads tells an ideal reader ever more, and without any it can only guess."""
  config = configs.load("configs/methods/icrm.py")
  config.evaluate.pairs, config.data.task_size = 300, 300
  accuracy, shown = {}, {**config.data.transforms[1], "template": "{sign}{first}{other}{second}"}
  for k in (0, 1, 2, 4, 6):
    config.data.transforms = [{**shown, "k": k, "fewest": k}]
    source = inputs.open_split(config, "test")
    tasks = inputs.builder(config, CharacterTokenizer(config.tokenizer.alphabet))
    right = []
    for index in range(300):
      row = source[index]
      assert row["evidence"] == 1 + k
      text = tasks.tokenizer.decode(tasks.parse(row, "here", False).prompt)
      better, worse = consistent(text, [row["chosen"], row["rejected"]])
      right.append((better > worse) + 0.5 * (better == worse))
    accuracy[k] = np.mean(right)
  assert accuracy[0] == 0.5 and accuracy[6] > 0.95
  assert all(accuracy[b] > accuracy[a] for a, b in zip((0, 1, 2, 4), (1, 2, 4, 6)))
