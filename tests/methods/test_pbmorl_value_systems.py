"""Value systems: recovery of weightings and groups, what makes them identifiable, and a grid world."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import compose
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.evaluation import value_systems as measures
from jaxrl.objectives import value_systems
from jaxrl.objectives.aggregate import loss_weights

WEIGHTS = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]])


def society(seed, agents=30, each=40, sharpness=4.0):
  """Differences of values (preferred minus other), who compared, and the true group of everybody."""
  rng = np.random.default_rng(seed)
  group = np.arange(agents) % len(WEIGHTS)
  who = np.repeat(np.arange(agents), each)
  d = rng.normal(size=(len(who), WEIGHTS.shape[1]))
  likely = 1 / (1 + np.exp(-sharpness * np.sum(d * WEIGHTS[group[who]], axis=1)))
  return np.where((rng.random(len(who)) < likely)[:, None], d, -d), who, group


def cosines(found):
  unit = [w / np.linalg.norm(w, axis=1, keepdims=True) for w in (found, WEIGHTS)]
  return (unit[1] @ unit[0].T).max(axis=1)


def test_weights_and_groups_are_recovered_where_values_are_known():
  d, who, group = society(0)
  weights, members, _ = measures.fit_clusters(d, who, 3)
  assert cosines(weights).min() > 0.95
  assert measures.adjusted_rand(members, group) > 0.9
  assert measures.representativeness(d, who, weights, members) > 0.8


def test_the_true_number_of_clusters_is_an_elbow():
  d, who, _ = society(1)
  likelihood = [measures.fit_clusters(d, who, count)[2] for count in (1, 2, 3, 4, 5)]
  gains = np.diff(likelihood)
  assert gains[0] > 0.02 and gains[1] > 0.02 and max(gains[2:]) < 0.3 * gains[1]


def test_overall_comparisons_alone_leave_any_mixture_of_values_open():
  """An invertible mixture M of the values and weights M^-T w explain them just as well."""
  d, who, group = society(2)
  M = np.random.default_rng(0).normal(size=(3, 3)) + 2 * np.eye(3)
  mixed, weights = d @ M.T, WEIGHTS @ np.linalg.inv(M)

  def loss(d, w):
    return np.mean(np.logaddexp(0, -np.sum(d * w[group[who]], axis=1)))
  assert loss(mixed, weights) == pytest.approx(loss(d, WEIGHTS), rel=1e-9)

  def grounding(values):
    """The least loss of value comparisons, which are those of d, over the scale of the values."""
    agree = np.where(d > 0, values, -values)
    return min(np.mean(np.logaddexp(0, -scale * agree)) for scale in np.logspace(-1, 3, 20))
  assert grounding(d) < 0.01 and grounding(mixed) > 0.1


def test_adjusted_rand_is_that_of_hubert_and_arabie():
  assert measures.adjusted_rand([0, 0, 1, 1], [1, 1, 0, 0]) == 1
  # Contingency [[2, 0], [1, 1]]: index 1, expected 3 * 2 / 6 = 1 of at most 2.5.
  assert measures.adjusted_rand([0, 0, 1, 1], [0, 0, 0, 1]) == pytest.approx(0)
  # [[3, 1], [0, 2]]: index 3 + 1 = 4; rows 6 + 1, columns 3 + 3; 15 pairs.
  expected = (4 - 7 * 6 / 15) / ((7 + 6) / 2 - 7 * 6 / 15)
  assert measures.adjusted_rand([0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]) == pytest.approx(expected)
  rng = np.random.default_rng(0)
  chance = [measures.adjusted_rand(rng.integers(3, size=40), rng.integers(3, size=40)) for _ in range(200)]
  assert abs(np.mean(chance)) < 0.02


def test_hypervolume_equals_boxes_and_a_count_of_random_points():
  assert measures.hypervolume(np.array([[2.0, 3.0]]), [0, 0]) == 6
  assert measures.hypervolume(np.array([[2, 1], [1, 2], [0.5, 0.5], [3, -1]]), [0, 0]) == 3
  rng = np.random.default_rng(1)
  points = rng.random((6, 3))
  thrown = rng.random((200_000, 3))
  share = np.mean((thrown[:, None] <= points).all(-1).any(1))
  assert measures.hypervolume(points, [0, 0, 0]) == pytest.approx(share, abs=4e-3)
  assert measures.maximum_utility_loss(points[:1], points[:1], WEIGHTS) == 0
  expected = max(max(p @ w for p in points) - points[0] @ w for w in WEIGHTS)
  assert measures.maximum_utility_loss(points[:1], points, WEIGHTS) == pytest.approx(expected)


def batch_of(chosen, rejected, who, by):
  """Pairs whose tokens number their answers."""
  made = []
  for i in range(len(who)):
    made += [Trajectory([7, 1], [False, True], group=i, columns={
        "preference": p, "agent": float(who[i]), "value": float(by[i])}) for p in (1.0, 0.0)]
  batch = jax.tree.map(jnp.asarray, pack(made, row_length=64, together=True))
  ids, mask = np.asarray(batch.sequence_ids), np.asarray(batch.loss_mask)
  places = np.stack([np.argwhere((ids == i) & mask)[0] for i in range(len(made))])
  return batch, places, np.stack([chosen, rejected], axis=1).reshape(len(made), -1)


def place(batch, places, own):
  scores = jnp.zeros((*batch.tokens.shape, own.shape[1]))
  return scores.at[places[:, 0], places[:, 1]].set(own)


def test_the_loss_is_that_of_each_value_and_of_the_cluster_s_weighting():
  rng = np.random.default_rng(3)
  chosen, rejected = rng.normal(size=(2, 6, 2))
  by = np.array([0, 1, -1, -1, 1, -1])
  batch, places, own = batch_of(chosen, rejected, [0, 0, 0, 1, 1, 1], by)
  term = functools.partial(value_systems, values=2, clusters=2, rate=1e-9)
  memory = compose.initial_of(term)()
  scores = place(batch, places, own)

  @jax.jit
  def run(batch, scores, memory):
    signals, memory = compose.prepared(term, batch.with_signals(old_scores=scores), memory)
    return term(ModelOutputs(scores=scores), batch.with_signals(**signals))[0], memory
  found, memory = run(batch, scores, memory)
  W = np.exp(np.asarray(memory["logits"], float)[:2, :2])
  W /= W.sum(1, keepdims=True)
  np.testing.assert_allclose(W, np.array([[1.05, 0.05], [0.05, 1.05]]) / 1.1, rtol=1e-5)
  d = chosen - rejected
  losses = np.stack([[np.logaddexp(0, -d[i] @ w) for w in W] for i in range(6)])
  cluster = [losses[[2]].sum(0).argmin(), losses[[3, 5]].sum(0).argmin()]
  expected = [np.logaddexp(0, -d[i, v]) if v >= 0 else losses[i, cluster[int(i > 2)]]
              for i, v in enumerate(by)]
  assert float(jnp.sum(loss_weights(batch, "sequence_mean") * found)) == pytest.approx(np.mean(expected),
                                                                                       rel=1e-5)


def test_batches_of_comparisons_recover_groups_heads_and_weights():
  """Linear heads over six features, of which the values are mixtures; everything is learnt at once."""
  rng = np.random.default_rng(5)
  agents, features, pairs, steps = 18, 6, 96, 250
  group = np.arange(agents) % 3
  truth = rng.normal(size=(3, features))
  term = functools.partial(value_systems, values=3, clusters=3, rate=1.0)

  def comparisons():
    x = rng.normal(size=(2, pairs, features))
    who, by = rng.integers(agents, size=pairs), np.where(rng.random(pairs) < 0.5, rng.integers(3, size=pairs),
                                                         -1)
    gap = (x[0] - x[1]) @ truth.T
    h = np.where(by < 0, np.sum(4 * gap * WEIGHTS[group[who]], 1), gap[np.arange(pairs), by] * 2)
    first = rng.random(pairs) < 1 / (1 + np.exp(-h))
    return np.where(first[:, None], x[0], x[1]), np.where(first[:, None], x[1], x[0]), who, by
  drawn = [batch_of(*comparisons()) for _ in range(steps)]

  @jax.jit
  def step(heads, memory, batch, places, own):
    def outputs(heads):
      return place(batch, places, own @ heads.T)
    signals, memory = compose.prepared(term, batch.with_signals(old_scores=outputs(heads)), memory)
    weights = loss_weights(batch, "sequence_mean")

    def loss(heads):
      return jnp.sum(weights * term(ModelOutputs(scores=outputs(heads)), batch.with_signals(**signals))[0])
    return heads - 1.0 * jax.grad(loss)(heads), memory
  heads, memory = jnp.zeros((3, features)), compose.initial_of(term)()
  for batch, places, own in drawn:
    heads, memory = step(heads, memory, batch, places, jnp.asarray(own, jnp.float32))
  found = np.asarray(memory["losses"])[:agents, :3].argmin(axis=1)
  assert measures.adjusted_rand(found, group) > 0.9
  assert cosines(np.asarray(jax.nn.softmax(memory["logits"][:3, :3]))).min() > 0.95
  aligned = np.sum(np.asarray(heads) * truth, 1) / np.linalg.norm(heads, axis=1) / np.linalg.norm(truth, axis=1)
  assert aligned.min() > 0.95


def test_a_cluster_that_is_empty_begins_again_at_who_is_explained_worst():
  """Two clusters of four begin at values that nobody weighs; the society has two other groups."""
  rng = np.random.default_rng(6)
  agents = 12
  group = np.arange(agents) % 2
  tastes = np.array([[0.48, 0.48, 0.02, 0.02], [0.02, 0.02, 0.48, 0.48]])
  term = functools.partial(value_systems, values=4, clusters=2, rate=0.5, decay=0.9)
  memory = compose.initial_of(term)()
  prepare = jax.jit(lambda batch, scores, memory: compose.prepared(
      term, batch.with_signals(old_scores=scores), memory)[1])
  for _ in range(40):
    d = 3 * rng.normal(size=(48, 4))
    who = rng.integers(agents, size=48)
    d = np.where(np.sum(d * tastes[group[who]], 1, keepdims=True) > 0, d, -d)
    batch, places, own = batch_of(d / 2, -d / 2, who, np.full(48, -1))
    scores = place(batch, places, own)
    memory = prepare(batch, scores, memory)
  found = np.asarray(memory["losses"])[:agents, :2].argmin(axis=1)
  assert measures.adjusted_rand(found, group) > 0.9


def test_policies_of_recovered_weights_are_near_the_best_of_a_grid_world():
  """5 x 5 cells with three features each; value iteration for weights from noisy comparisons of walks."""
  rng = np.random.default_rng(7)
  R, gamma, size = rng.random((25, 3)) ** 2, 0.9, 5
  cells = np.arange(25).reshape(size, size)
  moves = np.stack([np.roll(cells, k, axis) for k, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1))],
                   -1).reshape(25, 4)  # a torus

  def policy_of(w):
    V = np.zeros(25)
    for _ in range(200):
      V = R @ w + gamma * V[moves].max(axis=1)
    return V[moves].argmax(axis=1)

  def value_of(policy, w):
    V = np.zeros(25)
    for _ in range(200):
      V = R @ w + gamma * V[moves[np.arange(25), policy]]
    return V.mean()
  walks = np.zeros((1200, 2, 3))
  for walk in walks.reshape(-1, 3):
    at = rng.integers(25)
    for t in range(12):
      walk += gamma ** t * R[at]
      at = moves[at, rng.integers(4)]
  agents = np.repeat(np.arange(30), 40)
  group = np.arange(30) % 3
  d = walks[:, 0] - walks[:, 1]
  first = rng.random(len(d)) < 1 / (1 + np.exp(-6 * np.sum(d * WEIGHTS[group[agents]], 1)))
  weights, members, _ = measures.fit_clusters(np.where(first[:, None], d, -d), agents, 3)
  assert measures.adjusted_rand(members, group) > 0.9
  for k, truth in enumerate(WEIGHTS):
    found = weights[np.bincount(members[group == k]).argmax()]
    assert value_of(policy_of(found), truth) > 0.95 * value_of(policy_of(truth), truth)


@pytest.mark.parametrize("arguments", [dict(values=9, clusters=2), dict(values=2, clusters=0),
                                       dict(values=2, clusters=2, rate=0.0)])
def test_bad_arguments_are_refused(arguments):
  d = np.ones((2, 2))
  batch, places, own = batch_of(d, -d, [0, 1], [-1, -1])
  term = functools.partial(value_systems, **arguments)
  with pytest.raises(ValueError, match="value_systems"):
    compose.prepared(term, batch.with_signals(old_scores=place(batch, places, own)),
                     compose.initial_of(term)())
