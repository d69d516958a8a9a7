"""MNPO: its loss against float64 and its special cases, and the game whose fixed point needs no history."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives import dpo, mnpo
from tests.objectives import compared

MODELS = ("previous", "before", "start")
KNOWN = ("reference", *MODELS)


def difference(trajectories, pair, own):
  """D of means over tokens, for the values of each trajectory."""
  chosen, rejected = pair
  return own[chosen].mean() - own[rejected].mean()


def equation(trajectories, rho, eta, weights):
  def loss(own):
    total = 0.0
    for pair in compared.in_pairs(trajectories).values():
      def d(model):
        return difference(trajectories, pair, [compared.of(t, model) for t in trajectories])
      target = rho * d("reference") + (1 - rho) * sum(w * d(m) for m, w in weights.items())
      total += (difference(trajectories, pair, own) - target - 1 / (2 * eta)) ** 2
    return total / len(compared.in_pairs(trajectories))
  return loss


@pytest.mark.parametrize("rho, models, weights, shares", [
    (1 / 3, MODELS[:2], (), (0.5, 0.5)), (0.85, MODELS[:2], (0.25, 0.75), (0.25, 0.75)),
    (0.2, MODELS[:1], (), (1.0,)), (0.0, MODELS, (), (1 / 3,) * 3), (1.0, MODELS, (), (1 / 3,) * 3),
    (0.0, (), (), ())])
def test_value_and_gradient_are_the_equation(rho, models, weights, shares):
  trajectories = compared.pairs(1, models=KNOWN)
  term = functools.partial(mnpo, rho=rho, eta=0.7, models=models, weights=weights)
  metrics = compared.equals(term, trajectories,
                            equation(trajectories, rho, 0.7, dict(zip(models, shares))))
  assert 0 <= metrics["preference_accuracy"] <= 1


def test_the_gradient_is_0_at_the_target_and_only_there():
  trajectories = compared.pairs(2, count=1, models=KNOWN)
  term = functools.partial(mnpo, rho=0.4, eta=2.0, models=MODELS[:2])
  (pair,) = compared.in_pairs(trajectories).values()
  anchor = [0.4 * compared.of(t, "reference") + 0.3 * (compared.of(t, "previous")
                                                      + compared.of(t, "before")) for t in trajectories]
  for shift, zero in ((0.25, True), (0.3, False), (0.0, False)):
    own = [x.copy() for x in anchor]
    own[pair[0]] += shift  # 1 / (2 eta) is 0.25
    for t, x in zip(trajectories, own):
      t.signals["old_logprobs"][t.loss_mask] = x
    batch, _ = compared.prepared(term, trajectories)
    gradient = compared.value_and_gradient(term, batch)[2]
    assert (np.abs(gradient).max() < 1e-6) == zero


def test_the_reference_alone_is_ipo_of_means():
  trajectories = compared.pairs(3, models=KNOWN)
  one = functools.partial(mnpo, rho=1.0, eta=0.6)
  other = functools.partial(dpo, loss="ipo", beta=0.6, normalise=True)
  found = [compared.value_and_gradient(term, compared.prepared(term, trajectories)[0])
           for term in (one, other)]
  np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
  np.testing.assert_allclose(found[0][2], found[1][2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("arguments, message", [
    (dict(eta=0.0), "mnpo: eta"), (dict(rho=1.5), "from 0 to 1"),
    (dict(weights=(1.0,)), "one for each"), (dict(weights=(0.9, 0.3)), "add up to 1"),
    (dict(weights=(1.5, -0.5)), "at least 0")])
def test_impossible_arguments_are_refused(arguments, message):
  batch, _ = compared.prepared(mnpo, compared.pairs(0, models=KNOWN))
  with pytest.raises(ValueError, match=message):
    mnpo(ModelOutputs(logprobs=batch.signals["old_logprobs"]), batch, **arguments)


# --------------------------------------------------------------------------------- the matrix game

ROCK = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])  # P(row beats column), a cycle


def play(rho, eta, history, steps):
  """Exact steps against the last policies: log pi = anchor + eta * wins, up to a constant -> all policies."""
  reference = np.log(np.array([0.6, 0.3, 0.1]))
  past = [np.exp(reference)]
  for _ in range(steps):
    recent = past[-history:]
    wins = ROCK @ np.mean(recent, axis=0)  # probability of a response to beat the population
    anchor = rho * reference + (1 - rho) * np.mean(np.log(recent), axis=0)
    past.append(scipy.special.softmax(anchor + eta * wins))
  return reference, past


@pytest.mark.parametrize("history", [1, 2, 4, 8])
def test_with_an_anchor_every_history_ends_in_the_same_policy(history):
  rho, eta = 0.5, 0.3
  reference, past = play(rho, eta, history, 400)
  fixed = scipy.special.softmax(reference + eta / rho * ROCK @ past[-1])
  np.testing.assert_allclose(past[-1], fixed, rtol=1e-8)
  np.testing.assert_allclose(past[-1], play(rho, eta, 1, 400)[1][-1], rtol=1e-8)


def gap(policy):
  """How much more than 1/2 the best response wins against a policy."""
  return (ROCK @ policy).max() - 0.5


@pytest.mark.parametrize("eta", [0.25, 0.5, 1.0])
def test_without_an_anchor_more_history_circles_nearer_to_the_equilibrium(eta):
  """On average over a long play; single iterates circle, and are near or far by chance."""
  gaps = [np.mean([gap(p) for p in play(0.0, eta, history, 1000)[1]]) for history in (1, 2, 4, 8)]
  assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.9 * gaps[0]


def dpo_policy(beta):
  """What DPO makes of all pairs and their odds, to which Bradley-Terry scores are fitted."""
  reference = np.log([0.6, 0.3, 0.1])

  def loss(logits):
    ratio = logits - reference
    return -(ROCK * scipy.special.log_expit(beta * (ratio[:, None] - ratio[None, :]))).sum()
  found = scipy.optimize.minimize(loss, reference, method="BFGS", options=dict(gtol=1e-10))
  return scipy.special.softmax(found.x)


def test_of_a_cycle_dpo_picks_one_response_and_mnpo_goes_on_mixing_as_the_anchor_weakens():
  """The lowest chance to win against any response."""
  plain = [(dpo_policy(beta) @ ROCK).min() for beta in (1.0, 0.3, 0.1, 0.05)]
  assert plain == sorted(plain, reverse=True) and plain[-1] < ROCK.min() + 0.2
  mixed = [(play(1 / 3, eta, 2, 3000)[1][-1] @ ROCK).min() for eta in (0.3, 1.0, 3.0)]
  assert min(mixed) > plain[1] and mixed[-1] > 0.38


def test_gradient_descent_on_the_term_reaches_the_minimiser():
  """A policy over three responses of one token, learnt by the term from all pairs and their odds."""
  rho, eta = 0.5, 0.5
  reference, opponent = np.log([0.6, 0.3, 0.1]), np.log([0.2, 0.5, 0.3])
  found, group = [], 0
  for y in range(3):
    for z in range(3):
      if y != z:
        wins = ROCK[y, z]
        for answer, label in ((y, wins), (z, 1 - wins)):
          found.append(Trajectory(
              [0, answer], [False, True], group=group, columns={"preference": label},
              signals={"reference_logprobs": [0, reference[answer]],
                       "previous_logprobs": [0, opponent[answer]]}))
        group += 1
  batch = jax.tree.map(jnp.asarray, pack(found, row_length=4, together=True))

  def loss(logits):
    logprobs = jax.nn.log_softmax(logits)[batch.tokens]
    values, _ = mnpo(ModelOutputs(logprobs=logprobs), batch, rho=rho, eta=eta, models=("previous",))
    return values.sum()
  logits = jnp.zeros(3)
  step = jax.jit(lambda x: x - 0.02 * jax.grad(loss)(x))
  for _ in range(300):
    logits = step(logits)
  # A pair's label p asks on average for (2 p - 1) / (2 eta), and a response meets both others equally.
  anchor = rho * reference + (1 - rho) * opponent
  wanted = ((2 * ROCK - 1) / (2 * eta)).mean(axis=1)
  np.testing.assert_allclose(jax.nn.softmax(logits), scipy.special.softmax(anchor + wanted), rtol=1e-4)
