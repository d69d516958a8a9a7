"""RPO (EM): both orientations of every loss, E- and M-step, reliabilities of annotators, and their limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxrl import compose
from jaxrl import objectives
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives import dpo, rpo
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms
from jaxrl.tasks import preferred_addition
from tests.objectives import compared

log_s, s = scipy.special.log_expit, scipy.special.expit
B = 0.6


def summed(t, own, _):
  return own.sum() - compared.of(t, "reference").sum()


LOSSES = {  # spec, loss of (chosen, rejected) each as (trajectory, its log-probabilities)
    "dpo": (dict(name="dpo", beta=B), lambda a, b: -log_s(B * (summed(*a, 0) - summed(*b, 0)))),
    "ipo": (dict(name="dpo", loss="ipo", beta=B),
            lambda a, b: (summed(*a, 0) - summed(*b, 0) - 1 / (2 * B)) ** 2),
    "cpo": (dict(name="cpo", beta=B), lambda a, b: -log_s(B * (a[1].sum() - b[1].sum()))),
    "simpo": (dict(name="simpo", beta=2.0, gamma=0.7),
              lambda a, b: -log_s(2 * (a[1].mean() - b[1].mean()) - 0.7))}


def probabilities(trajectories, own, loss):
  """p of every pair, by group."""
  found = {}
  for group, (a, b) in compared.in_pairs(trajectories).items():
    both = (trajectories[a], own[a]), (trajectories[b], own[b])
    found[group] = s(loss(*both[::-1]) - loss(*both))
  return found


def weight(p, eta):
  return p * eta / (p * eta + (1 - p) * (1 - eta))


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_the_m_step(name):
  spec, loss = LOSSES[name]
  etas, who = [0.8, 0.65], [0, 1, 1, 0, 1]
  trajectories = compared.pairs(1, count=5, columns={"who": who})
  now = probabilities(trajectories, compared.policy(trajectories), loss)
  w = {g: weight(p, etas[who[i]]) for i, (g, p) in enumerate(now.items())}

  def equation(own):
    p = probabilities(trajectories, own, loss)
    return np.mean([-w[g] * np.log(p[g]) - (1 - w[g]) * np.log(1 - p[g]) for g in p])
  term = functools.partial(rpo, loss=spec, annotator="who", annotators=2)
  memory = {"reliability": jnp.asarray(etas)}
  metrics = compared.equals(term, trajectories, equation, memory=memory, rtol=2e-5)
  np.testing.assert_allclose(metrics["rpo_weight"], np.mean(list(w.values())), rtol=1e-5)
  np.testing.assert_allclose(metrics["rpo_reversed"], np.mean([x < 0.5 for x in w.values()]), atol=1e-6)
  np.testing.assert_allclose([metrics[f"rpo_reliability_{k}"] for k in (0, 1)], etas, rtol=1e-6)


def test_for_dpo_p_is_bradley_terry_and_for_ipo_logistic_in_two_h_over_t():
  trajectories = compared.pairs(2)
  own = compared.policy(trajectories)
  for name, slope in (("dpo", B), ("ipo", 2 / B)):
    term = functools.partial(rpo, loss=LOSSES[name][0], reliability=0.9)
    batch, _ = compared.prepared(term, trajectories)
    for group, (a, b) in compared.in_pairs(trajectories).items():
      h = summed(trajectories[a], own[a], 0) - summed(trajectories[b], own[b], 0)
      for i in (a, b):
        found = np.asarray(batch.signals["rpo_weight"])[np.asarray(batch.sequence_ids) == i]
        np.testing.assert_allclose(found, weight(s(slope * h), 0.9), rtol=1e-4)


def test_full_reliability_is_the_loss_itself_and_none_teaches_nothing():
  trajectories = compared.pairs(3)
  term = functools.partial(rpo, loss=LOSSES["dpo"][0], reliability=1.0)
  found = compared.value_and_gradient(term, compared.prepared(term, trajectories)[0])
  plain = compared.value_and_gradient(functools.partial(dpo, beta=B), compared.prepared(dpo, trajectories)[0])
  np.testing.assert_allclose(found[0], plain[0], rtol=1e-6)
  np.testing.assert_allclose(found[2], plain[2], rtol=1e-5, atol=1e-8)
  batch, _ = compared.prepared(term, trajectories, {"reliability": jnp.asarray([0.5])})
  gradient = compared.value_and_gradient(term, batch)[2]
  assert np.abs(gradient).max() < 1e-7 < np.abs(plain[2]).max()


def test_reliabilities_follow_the_mean_weight_of_their_own_pairs():
  who, rate, start = [0, 2, 2, 0, 7], 0.3, 0.8  # nobody is 1; 7 shares the last
  trajectories = compared.pairs(4, count=5, columns={"who": who})
  term = functools.partial(rpo, loss=LOSSES["cpo"][0], rate=rate, reliability=start, annotator="who",
                           annotators=4)
  memory, expected = None, np.full(4, start)
  p = np.array(list(probabilities(trajectories, compared.policy(trajectories), LOSSES["cpo"][1]).values()))
  for _ in range(3):
    _, memory = compared.prepared(term, trajectories, memory)
    index = np.minimum(who, 3)
    w = weight(p, expected[index])
    for k in (0, 2, 3):
      expected[k] = (1 - rate) * expected[k] + rate * w[index == k].mean()
    np.testing.assert_allclose(memory["reliability"], expected, rtol=1e-5)
  assert expected[1] == start


def test_a_group_that_is_no_pair_teaches_nothing_and_nobody():
  trajectories = compared.pairs(5, count=3)
  trajectories[0].scored = False
  odd = [t.group == trajectories[0].group for t in trajectories]
  term = functools.partial(rpo, loss="dpo")
  batch, memory = compared.prepared(term, trajectories)
  _, _, gradient = compared.value_and_gradient(term, batch)
  _, whole = compared.prepared(term, [t for t, x in zip(trajectories, odd) if not x])
  np.testing.assert_allclose(memory["reliability"], whole["reliability"], rtol=1e-6)
  mine = np.isin(np.asarray(batch.sequence_ids), np.flatnonzero(odd))
  assert not gradient[mine].any() and gradient[np.asarray(batch.loss_mask) & ~mine].all()


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_probabilities_stay_finite(name, scale):
  trajectories = compared.pairs(6)
  for t in trajectories:
    t.signals["old_logprobs"] *= scale
  term = functools.partial(rpo, loss=LOSSES[name][0])
  batch, memory = compared.prepared(term, trajectories)
  value, _, gradient = compared.value_and_gradient(term, batch)
  assert np.isfinite(value) and np.isfinite(gradient).all() and np.isfinite(memory["reliability"]).all()


@pytest.mark.parametrize("arguments, message", [
    (dict(loss="dpoo"), "did you mean 'dpo'"), (dict(loss="logistic"), "no function of the log-prob"),
    (dict(loss=dict(name="dpo", weigh_by_policy=True)), "reads 'collision' of the policy"),
    (dict(loss="jaxrl.objectives.batch_preference:bco"), "no function of the log-prob"),
    (dict(loss=dict(name="dpo", beta=dict(schedule="linear", start=0.1, end=0.2, steps=5))), "schedule")])
def test_losses_that_have_no_other_way_round_are_refused(arguments, message):
  with pytest.raises(ValueError, match=f"rpo.*{message}"):
    compose.signals_of(compose.build(dict(name="rpo", **arguments), objectives))


@pytest.mark.parametrize("arguments", [dict(reliability=0.5), dict(reliability=1.1), dict(rate=2.0),
                                       dict(annotators=0)])
def test_numbers_out_of_range_are_refused(arguments):
  batch, _ = compared.prepared(functools.partial(rpo, loss="dpo"), compared.pairs(0))
  with pytest.raises(ValueError, match="rpo: reliability"):
    rpo(ModelOutputs(logprobs=batch.signals["old_logprobs"]), batch, loss="dpo", **arguments)


# ------------------------------------------------------------------- the logistic simulation of the card


def simulated(flips, seed=0, robust=True, updates=1200, size=256):
  """A linear reward learnt from noisy pairs of one-token answers, by the term itself.

  Log-probabilities are made so that beta h is `x @ theta`. -> reliabilities, accuracy on clean pairs."""
  rng = np.random.default_rng(seed)
  dims, count = 8, 4000
  true = rng.normal(size=dims)
  true *= 3.73 / np.linalg.norm(true)
  x = rng.normal(size=(count, dims))
  who = rng.integers(len(flips), size=count)
  label = rng.random(count) < s(x @ true)
  label ^= rng.random(count) < np.asarray(flips)[who]
  x *= np.where(label, 1.0, -1.0)[:, None]  # as labelled, the first answer is the chosen one
  template = [Trajectory([0, 1], [False, True], group=i // 2, signals={
      "old_logprobs": [0, 0], "reference_logprobs": [0, 0]}, columns={"preference": 1.0 - i % 2, "who": 0.0})
              for i in range(2 * size)]
  batch = jax.tree.map(jnp.asarray, pack(template, row_length=4, together=True))
  term = functools.partial(rpo, loss=dict(name="dpo", beta=1.0), annotator="who", annotators=len(flips),
                           reliability=0.9 if robust else 1.0, rate=0.1 if robust else 0.0)
  weights, means = loss_weights(batch, "sequence_mean"), mean_weights(batch, True)

  def logprobs(theta, rows):
    """Those of the second token of every row, the chosen answer; the rejected one has log 1."""
    return jnp.zeros((size, 4)).at[:, 1].set(rows @ theta)

  @jax.jit
  def step(theta, memory, rows, who):
    columns = {**batch.columns, "who": jnp.repeat(who, 2).astype(jnp.float32)}
    here = batch.replace(columns=columns).with_signals(old_logprobs=logprobs(theta, rows))
    signals, memory = compose.prepared(term, here, memory)

    def loss(theta):
      return sum_of_terms([term])(ModelOutputs(logprobs=logprobs(theta, rows)),
                                  here.with_signals(**signals), weights, means)[0]
    return theta - 0.5 * jax.grad(loss)(theta), memory
  theta, memory = jnp.zeros(dims), compose.initial_of(term)()
  for _ in range(updates):
    some = rng.integers(count, size=size)
    theta, memory = step(theta, memory, jnp.asarray(x[some], jnp.float32), jnp.asarray(who[some]))
  clean = rng.normal(size=(4000, dims))
  accuracy = np.mean((clean @ np.asarray(theta) > 0) == (clean @ true > 0))
  return np.asarray(memory["reliability"]), accuracy, np.linalg.norm(theta)


def test_the_share_of_flips_is_recovered_and_the_reward_learnt_better():
  eta, robust, norm = simulated([0.2])
  _, plain, shrunk = simulated([0.2], robust=False)
  assert abs(eta[0] - 0.8) < 0.05 and robust > plain and norm > 2 * shrunk
  eta, _, _ = simulated([0.05, 0.35])
  assert abs(eta[0] - 0.95) < 0.05 and abs(eta[1] - 0.65) < 0.08


# --------------------------------------------------------------------------------- the toy's annotators


def test_annotators_of_the_toy_err_as_often_as_they_should():
  rng, errors = np.random.default_rng(0), {0: [], 1: []}
  for _ in range(1500):
    row = preferred_addition.sample(rng, digits=2, annotators=(0.1, 0.4))
    errors[row["annotator"]].append(not preferred_addition.check(row, row["chosen"]))
  for who, share in enumerate((0.1, 0.4)):
    assert len(errors[who]) > 600 and abs(np.mean(errors[who]) - share) < 0.06
  with pytest.raises(ValueError, match="annotators"):
    preferred_addition.sample(rng, annotators=(0.1, 1.5))
