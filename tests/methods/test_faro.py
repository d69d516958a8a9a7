"""Faro: rates, gradients and multipliers against NumPy, and a linear reward model that learns a bias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxrl import compose
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives import bradley_terry, fairness
from jaxrl.objectives.aggregate import loss_weights, sum_of_terms

s = scipy.special.expit


def pairs_of(groups, labels, extra=None):
  """Pairs of answers of one token each; y1 comes second in every other one."""
  found = []
  for i, (g, z) in enumerate(zip(groups, labels)):
    both = [Trajectory([7, 1], [False, True], group=i, columns={
        "preference": z if first else 1 - z, "first": first, "group": float(g),
        "level": float(0 if extra is None else extra[i])}) for first in (1.0, 0.0)]
    found += both[::-1] if i % 2 else both
  return found


def packed(trajectories):
  return jax.tree.map(jnp.asarray, pack(trajectories, row_length=64, together=True))


def scores_for(batch, trajectories, gaps):
  """Scores at last tokens such that r(y1) - r(y2) are the gaps. -> [rows, length, 1], places"""
  own = np.array([gaps[t.group] / 2 * (1 if t.columns["first"] else -1) for t in trajectories])
  ids, mask = np.asarray(batch.sequence_ids), np.asarray(batch.loss_mask)
  places = np.stack([np.argwhere((ids == i) & mask)[0] for i in range(len(trajectories))])
  scores = jnp.zeros((*ids.shape, 1)).at[places[:, 0], places[:, 1], 0].set(own)
  return scores, places


def run(batch, scores, memory=None, **arguments):
  """Loss, gradient by scores, metrics and memory of one batch."""
  memory = compose.initial_of(fairness)() if memory is None else memory
  value, gradient, metrics, memory = compiled(tuple(sorted(arguments.items())))(batch, scores, memory)
  return float(value), np.asarray(gradient), {k: float(x) for k, x in metrics.items()}, memory


@functools.cache
def compiled(arguments):
  term = functools.partial(fairness, **dict(arguments))

  @jax.jit
  def run(batch, scores, memory):
    signals, memory = compose.prepared(term, batch.with_signals(old_scores=scores), memory)
    whole = batch.with_signals(**signals)

    def loss(x):
      values, metrics = term(ModelOutputs(scores=x), whole)
      return jnp.sum(loss_weights(batch, "sequence_mean") * values), metrics
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(scores)
    return value, gradient, {k: x.max() for k, x in metrics.items()}, memory
  return run


def violations(rates, groups, cells):
  return np.array([[abs(rates[(groups == k) & (cells == c)].mean() - rates[cells == c].mean())
                    for c in np.unique(cells)] for k in np.unique(groups)])


def drawn(seed, count=24):
  rng = np.random.default_rng(seed)
  groups, labels = np.arange(count) % 3, (rng.random(count) < 0.5).astype(float)
  labels[:6] = [0, 0, 0, 1, 1, 1]  # no cell is empty
  level = np.repeat([0, 1], count // 2)
  return groups, labels, level, rng.normal(size=count) + 0.7 * (groups - 1)


CASES = [("parity", {}, lambda z, u: 0 * z), ("odds", {}, lambda z, u: z),
         ("parity", dict(given="level", levels=2), lambda z, u: u)]


@pytest.mark.parametrize("notion, arguments, cell", CASES)
def test_violations_multipliers_and_gradient_are_those_of_the_equations(notion, arguments, cell):
  groups, labels, level, gaps = drawn(0)
  cells = cell(labels, level).astype(int)
  trajectories = pairs_of(groups, labels, level)
  batch = packed(trajectories)
  scores, places = scores_for(batch, trajectories, gaps)
  arguments = dict(arguments, notion=notion, decay=0.0, rate=0.5, tolerance=0.02)
  value, gradient, metrics, memory = run(batch, scores, **arguments)
  soft, hard = violations(s(gaps), groups, cells), violations((gaps > 0).astype(float), groups, cells)
  assert value == 0 and not gradient.any()  # multipliers begin at 0
  assert metrics["violation"] == pytest.approx(hard.max(), rel=1e-4)
  assert metrics["soft_violation"] == pytest.approx(soft.max(), rel=1e-4)
  multipliers = np.clip(0.5 * (hard - 0.02), 0, 10)
  K, C = multipliers.shape
  np.testing.assert_allclose(memory["multipliers"][:K, :C], multipliers, atol=1e-6)
  assert not np.asarray(memory["multipliers"])[K:].any()

  value, gradient, _, _ = run(batch, scores, memory, **arguments)
  assert value == pytest.approx(np.sum(multipliers * soft), rel=1e-4)
  for item, t in enumerate(trajectories):
    def lagrangian(step):
      moved = gaps.copy()
      moved[t.group] += step * (1 if t.columns["first"] else -1)
      return np.sum(multipliers * violations(s(moved), groups, cells))
    expected = (lagrangian(1e-5) - lagrangian(-1e-5)) / 2e-5
    np.testing.assert_allclose(gradient[*places[item], 0], expected, rtol=1e-3, atol=1e-6)


def test_twins_are_pulled_together_by_the_gradient_of_their_mean_difference():
  groups = np.array([0, 1, 2, 0, 1, 5])  # numbers of pairs: two couples, and two without a twin
  labels, gaps = np.ones(6), np.random.default_rng(1).normal(size=6)
  trajectories = pairs_of(groups, labels)
  batch = packed(trajectories)
  scores, places = scores_for(batch, trajectories, gaps)
  arguments = dict(notion="counterfactual", decay=0.0, rate=2.0, tolerance=0.0)

  def violation(x):
    return (abs(x[0] - x[3]) + abs(x[1] - x[4])) / 2
  _, _, metrics, memory = run(batch, scores, **arguments)
  assert metrics["violation"] == pytest.approx(violation((gaps > 0).astype(float)))
  assert metrics["soft_violation"] == pytest.approx(violation(s(gaps)), rel=1e-5)
  memory["multipliers"] = memory["multipliers"].at[0, 0].set(2.0)
  value, gradient, _, _ = run(batch, scores, memory, **arguments)
  assert value == pytest.approx(2 * violation(s(gaps)), rel=1e-5)
  for item, t in enumerate(trajectories):
    def lagrangian(step):
      moved = gaps.copy()
      moved[t.group] += step * (1 if t.columns["first"] else -1)
      return 2 * violation(s(moved))
    expected = (lagrangian(1e-5) - lagrangian(-1e-5)) / 2e-5
    np.testing.assert_allclose(gradient[*places[item], 0], expected, rtol=1e-3, atol=1e-6)


def test_running_means_remember_a_group_that_a_batch_lacks():
  decay, memory, sums = 0.8, None, {k: np.zeros(2) for k in range(3)}
  for seed in range(3):
    groups, labels, _, gaps = drawn(seed, 12)
    keep = groups != (2 if seed else -1)  # group 2 is in the first batch only
    groups, labels, gaps = groups[keep], labels[keep], gaps[keep]
    trajectories = pairs_of(groups, labels)
    batch = packed(trajectories)
    scores, _ = scores_for(batch, trajectories, gaps)
    _, _, metrics, memory = run(batch, scores, memory, decay=decay, rate=0.0)
    for k in sums:
      mine = gaps[groups == k]
      sums[k] = decay * sums[k] + np.array([len(mine), (mine > 0).sum()])
    total = sum(sums.values())
    expected = max(abs(x[1] / x[0] - total[1] / total[0]) for x in sums.values())
    assert metrics["violation"] == pytest.approx(expected, rel=1e-5)


def test_multipliers_stop_at_their_bounds_and_the_plain_lagrangian_sees_s():
  groups, labels, _, gaps = drawn(4)
  trajectories = pairs_of(groups, labels)
  batch = packed(trajectories)
  scores, _ = scores_for(batch, trajectories, gaps)
  soft = violations(s(gaps), groups, 0 * groups)[:, 0]
  _, _, _, memory = run(batch, scores, decay=0.0, rate=1.0, tolerance=0.0, dual="proxy")
  np.testing.assert_allclose(memory["multipliers"][:3, 0], soft, rtol=1e-4)
  _, _, metrics, memory = run(batch, scores, decay=0.0, rate=1e4, most=3.0)
  assert metrics["multiplier"] == 3.0
  _, _, _, memory = run(batch, scores, memory, decay=0.0, rate=1e4, tolerance=1.0)
  assert not np.asarray(memory["multipliers"]).any()


def test_a_linear_reward_model_unlearns_a_bias_that_it_would_learn():
  """r = a q + b g; labels are drawn from s(q1 - q2 + bias (g1 - g2)); parity between two kinds of pairs,
  in which y1 is of the one group or of the other."""
  rng = np.random.default_rng(0)
  count, bias = 400, 2.0
  kind = np.arange(count) % 2  # group of the pair: whether y1 belongs to the favoured group
  q = rng.normal(size=count)
  g = 2.0 * kind - 1
  labels = (rng.random(count) < s(1.5 * q + bias * g)).astype(float)
  trajectories = pairs_of(kind, labels)
  batch = packed(trajectories)
  _, places = scores_for(batch, trajectories, q)
  sign = np.array([1.0 if t.columns["first"] else -1.0 for t in trajectories]) / 2
  features = jnp.asarray(np.stack([q, g])[:, [t.group for t in trajectories]] * sign)

  def scores_of(w):
    return jnp.zeros((*batch.tokens.shape, 1)).at[places[:, 0], places[:, 1], 0].set(w @ features)

  def train(constrained, tolerance=0.02, steps=1500):
    term = functools.partial(fairness, rate=0.1, tolerance=tolerance, decay=0.0)
    terms = [bradley_terry, term] if constrained else [bradley_terry]
    weights = loss_weights(batch, "sequence_mean")

    def step(state, _):
      w, memory = state
      signals, memory = compose.prepared(term, batch.with_signals(old_scores=scores_of(w)), memory)
      whole = batch.with_signals(old_scores=scores_of(w), **signals)
      gradient = jax.grad(lambda w: sum_of_terms(terms)(ModelOutputs(scores=scores_of(w)), whole, weights,
                                                        weights)[0])(w)
      return (w - 0.3 * gradient, memory), w
    (_, _), path = jax.jit(lambda m: jax.lax.scan(step, (jnp.zeros(2), m), None, steps))(
        compose.initial_of(term)())
    w = np.asarray(path[-steps // 3:]).mean(0)  # a game's mean; its last point circles
    d = w @ np.stack([q, g])
    return (abs((d > 0)[kind == 1].mean() - (d > 0).mean()), np.mean((d > 0) == (labels > 0.5)), w)
  unfair, accuracy, biased = train(False)
  fair, kept, w = train(True)
  assert biased[1] / biased[0] == pytest.approx(bias / 1.5, rel=0.25) and unfair > 0.3
  assert fair <= 0.02 + 0.02 and abs(w[1]) < 0.2 * biased[1]
  # The best that is to be had of q alone, on the same labels.
  alone = np.mean((q > 0) == (labels > 0.5))
  assert kept >= alone - 0.03 and kept < accuracy


@pytest.mark.parametrize("arguments, message", [
    (dict(notion="parities"), "did you mean 'parity'"), (dict(dual="hard"), "dual='hard'"),
    (dict(decay=1.0), "decay=1.0"), (dict(levels=17), "levels=17"), (dict(group="gruop"), "'gruop'")])
def test_bad_arguments_are_refused(arguments, message):
  groups, labels, _, gaps = drawn(0)
  trajectories = pairs_of(groups, labels)
  batch = packed(trajectories)
  with pytest.raises(ValueError, match=message):
    run(batch, scores_for(batch, trajectories, gaps)[0], **arguments)
