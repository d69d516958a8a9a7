"""SIREN: the pull to the anchor against the paper's loss, and what a bonus does to the tail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose, objectives
from jaxrl import config as configs
from jaxrl.advantages.chain import credit, initial_carried
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.models.distributions import nucleus_entropy
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms

P = 0.8
NAME = f"nucleus_entropy@{P}"
VOCABULARY = 7


def ragged(seed, sequences=9):
  """Several sequences to a row with gaps in their masks: singletons, unscored and empty ones."""
  rng = np.random.default_rng(seed)
  trajectories = []
  for i in range(sequences):
    length = 2 if i == 0 else int(rng.integers(2, 12))
    mask = (np.arange(length) > 0) & ((rng.random(length) < 0.8) | (i == 0))
    trajectories.append(Trajectory(np.zeros(length, int), mask & (i != 2), scored=i % 4 != 3))
  return pack(trajectories, row_length=16, min_rows=8, min_sequences=16)


def nucleus(z):
  """Indices of the smallest set of likeliest tokens with a mass of at least P."""
  p = np.exp(z - z.max())
  p /= p.sum()
  order, mass, kept = np.argsort(-p), 0.0, []
  for token in order:
    kept.append(token)
    mass += p[token]
    if mass >= P:
      return kept
  return kept


def entropy_inside(z, kept):
  q = np.exp(z[kept] - z[kept].max())
  q /= q.sum()
  return -np.sum(q * np.log(q))


def tokens_by_sequence(batch):
  for i in np.nonzero(batch.sequence_mask)[0]:
    at = np.argwhere((batch.sequence_ids == i) & batch.loss_mask)
    if len(at):
      yield [tuple(x) for x in at]


class Paper:
  """H_mean of the paper in float64, with nucleus and peaks as they are at given logits."""

  def __init__(self, batch, logits):
    self.sequences, self.kept = [], {}
    for tokens in tokens_by_sequence(batch):
      self.kept |= {at: nucleus(logits[at]) for at in tokens}
      entropies = np.array([entropy_inside(logits[at], self.kept[at]) for at in tokens])
      threshold = np.quantile(entropies, 0.8)
      peaks = [at for at, h in zip(tokens, entropies) if h > threshold]
      self.sequences.append(peaks or [tokens[np.argmax(entropies)]])

  def mean(self, logits):
    return np.mean([np.mean([entropy_inside(logits[at], self.kept[at]) for at in peaks])
                    for peaks in self.sequences])


@jax.jit
def entropies_of(logits):
  return jax.vmap(jax.vmap(functools.partial(nucleus_entropy, p=P)))(jnp.float32(logits))


CREDIT = jax.jit(credit([advantages.anchor_entropy]))


def anchored(batch, logits, anchor):
  """The batch with the signals that the chain gives for an anchor, and the metrics."""
  old = entropies_of(logits)
  carried = {"anchor_entropy": {"anchor": jnp.float32(anchor), "known": jnp.array(True)}}
  found = CREDIT(batch.with_signals(**{NAME: old}), batch.rewards, carried)
  return batch.with_signals(**{"old_" + NAME: old}, **found.signals), found


def penalty_of(batch, coefficient):
  term = sum_of_terms([functools.partial(objectives.anchored_entropy, coefficient=coefficient)])
  weights, means = loss_weights(batch, "sequence_sum"), mean_weights(batch)
  return jax.jit(lambda logits: term(ModelOutputs(distribution={NAME: entropies_of(logits)}), batch,
                                     weights, means)[0])


@pytest.mark.parametrize("seed,anchor", [(0, 0.2), (1, 2.0)])
def test_value_and_gradient_are_those_of_the_papers_penalty(seed, anchor):
  rng = np.random.default_rng(seed)
  batch = ragged(seed)
  logits = 1.5 * rng.normal(size=(*batch.tokens.shape, VOCABULARY))
  paper = Paper(batch, logits)
  prepared, found = anchored(batch, logits, anchor)
  assert float(found.metrics["peak_entropy"]) == pytest.approx(paper.mean(logits), rel=1e-5)

  def square(logits):
    return 0.7 * (paper.mean(logits) - anchor) ** 2
  loss, gradient = jax.value_and_grad(penalty_of(prepared, 0.7))(jnp.float32(logits))
  gradient = np.asarray(gradient)
  assert float(loss) == pytest.approx(square(logits), rel=1e-4)
  peaks = [at for sequence in paper.sequences for at in sequence]
  for at in peaks:
    for token in range(VOCABULARY):
      moved = np.array([logits, logits])
      moved[0][(*at, token)] += 1e-5
      moved[1][(*at, token)] -= 1e-5
      expected = (square(moved[0]) - square(moved[1])) / 2e-5
      assert gradient[(*at, token)] == pytest.approx(expected, rel=2e-3, abs=1e-6)
      if token not in paper.kept[at]:
        assert gradient[(*at, token)] == 0
  elsewhere = np.ones(batch.tokens.shape, bool)
  elsewhere[tuple(np.transpose(peaks))] = False
  assert not gradient[elsewhere].any()


def test_the_full_entropy_would_reach_every_token_and_this_one_the_nucleus_only():
  rng = np.random.default_rng(3)
  z = 2 * rng.normal(size=40)
  log_p = z - np.log(np.exp(z).sum())
  p = np.exp(log_p)
  naive = -p * (log_p - np.sum(p * log_p))  # -p (log p + H)
  gradient = np.asarray(jax.grad(lambda x: nucleus_entropy(x, P))(jnp.float32(z)))
  outside = np.setdiff1d(np.arange(40), nucleus(z))
  assert len(outside) > 10 and not gradient[outside].any() and np.all(naive[outside] != 0)
  assert float(nucleus_entropy(jnp.float32(z), P)) <= np.log(len(nucleus(z)))


def test_ascent_on_the_full_entropy_feeds_the_tail_and_on_that_of_the_nucleus_does_not():
  size, peaks = 50_000, 5
  start = jnp.zeros(size).at[:peaks].set(jnp.array([14.5, 14.0, 13.5, 13.0, 12.5]))

  def tail(z):
    return float(jnp.sum(jax.nn.softmax(z)[peaks:]))

  def full(z):
    log_p = jax.nn.log_softmax(z)
    return -jnp.sum(jnp.exp(log_p) * log_p)

  def after(entropy):
    step = jax.grad(entropy)
    return jax.jit(lambda z: jax.lax.fori_loop(0, 200, lambda _, x: x + 5.0 * step(x), z))(start)
  assert tail(start) < 0.02 and tail(after(full)) > 0.9
  narrow = after(functools.partial(nucleus_entropy, p=P))
  assert not narrow[peaks:].any() and tail(narrow) < 1.1 * tail(start)
  assert full(narrow) > full(start) and nucleus_entropy(narrow, P) <= np.log(peaks) + 1e-5


@pytest.mark.parametrize("start", ["collapsed", "exploded"])
def test_from_collapse_and_from_noise_the_entropy_returns_to_the_anchor(start):
  batch = pack([Trajectory([0] * 6, [False] + [True] * 5) for _ in range(4)], row_length=8)
  batch = jax.tree.map(jnp.asarray, batch)
  logits = 0.1 * np.random.default_rng(4).normal(size=(*batch.tokens.shape, VOCABULARY))
  if start == "collapsed":
    logits += np.array([4.0, 2.7] + [-3.0] * (VOCABULARY - 2))
  anchor, gaps = 0.67, []  # below log 2: entropy in a nucleus of two tokens cannot be more

  @jax.jit
  def step(logits):
    prepared, found = anchored(batch, logits, anchor)
    return logits - 10.0 * jax.grad(penalty_of(prepared, 1.0))(logits), found.metrics["entropy_gap"]
  logits = jnp.float32(logits)
  for _ in range(400):
    logits, gap = step(logits)
    gaps.append(float(gap))
  assert gaps[0] < -0.05 if start == "collapsed" else gaps[0] > 0.5
  assert np.mean(np.abs(gaps[-20:])) < 0.01


def test_at_the_anchor_there_is_no_gradient_and_around_it_opposite_ones():
  batch = ragged(5)
  logits = np.random.default_rng(5).normal(size=(*batch.tokens.shape, VOCABULARY))
  here = Paper(batch, logits).mean(logits)
  slopes = []
  for anchor in (here - 0.1, here, here + 0.1):
    prepared, _ = anchored(batch, logits, anchor)
    slopes.append(np.asarray(jax.grad(penalty_of(prepared, 1.0))(jnp.float32(logits))))
  assert np.abs(slopes[1]).max() < 1e-6 < np.abs(slopes[0]).max()
  np.testing.assert_allclose(slopes[0], -slopes[2], rtol=1e-3, atol=1e-7)


def test_the_first_batch_sets_the_anchor_and_later_ones_keep_it():
  chain = [advantages.anchor_entropy, advantages.center_by_group]
  run, carried = jax.jit(credit(chain)), initial_carried(chain)
  empty = pack([Trajectory([0, 0], [False, True], scored=False)], row_length=16, min_rows=8,
               min_sequences=16)
  empty = empty.with_signals(**{NAME: np.ones(empty.tokens.shape, np.float32)})
  carried = run(empty, empty.rewards, carried).carried
  assert not carried["anchor_entropy"]["known"]
  means, gaps = [], []
  for seed in range(3):
    batch = ragged(seed)
    logits = np.random.default_rng(seed).normal(size=(*batch.tokens.shape, VOCABULARY)) * (1 + seed)
    batch = batch.with_signals(**{NAME: np.asarray(entropies_of(logits))})
    found = run(batch, batch.rewards, carried)
    carried = found.carried
    means.append(Paper(batch, logits).mean(logits))
    gaps.append(float(found.metrics["entropy_gap"]))
    assert float(carried["anchor_entropy"]["anchor"]) == pytest.approx(means[0], rel=1e-5)
  np.testing.assert_allclose(gaps, np.array(means) - means[0], rtol=1e-4, atol=1e-6)
  assert gaps[0] == 0


def test_a_collapsed_sequence_counts_as_zero_and_a_single_token_as_itself():
  batch = pack([Trajectory([0] * 4, [False] + [True] * 3), Trajectory([0, 0], [False, True]),
                Trajectory([0] * 3, [False] * 3)], row_length=4)
  entropies = np.where(batch.sequence_ids == 1, 0.6, 0.0)
  found = CREDIT(batch.with_signals(**{NAME: entropies}), batch.rewards,
                 initial_carried([advantages.anchor_entropy]))
  assert float(found.metrics["peak_entropy"]) == pytest.approx(0.3)
  total = np.sum(loss_weights(batch, "sequence_sum") * found.signals["entropy_peaks"])
  assert float(total) == pytest.approx(1.0)


def test_micro_batches_add_up_and_off_the_mask_nothing_is_read():
  batch = ragged(6)
  logits = np.random.default_rng(6).normal(size=(*batch.tokens.shape, VOCABULARY))
  prepared, _ = anchored(batch, logits, 0.1)
  now = np.asarray(entropies_of(logits + 0.3 * np.random.default_rng(7).normal(size=logits.shape)))
  weights, means = loss_weights(batch, "sequence_sum"), mean_weights(batch)
  term = sum_of_terms([objectives.anchored_entropy])

  def loss(now, at):
    rows = jax.tree.map(lambda x: x[at] if x.shape == batch.tokens.shape else x, prepared)
    return term(ModelOutputs(distribution={NAME: now}), rows, weights[at], means[at])[0]
  whole = float(loss(now, slice(None)))
  parts = sum(float(loss(now[at], at)) for at in (slice(0, 3), slice(3, 4), slice(4, 8)))
  assert parts == pytest.approx(whole, rel=1e-5) and whole != 0
  spoiled = np.where(batch.loss_mask, now, np.nan)
  value, gradient = jax.value_and_grad(loss)(spoiled, slice(None))
  assert float(value) == pytest.approx(whole, rel=1e-6)
  assert np.all(np.isfinite(gradient)) and not np.asarray(gradient)[~batch.loss_mask].any()


def test_a_nucleus_of_one_token_cannot_be_pulled_back():
  """A limit of the method: where one token holds the mass, the entropy inside has no gradient."""
  batch = pack([Trajectory([0] * 4, [False] + [True] * 3)], row_length=4)
  logits = np.zeros((*batch.tokens.shape, VOCABULARY))
  logits[..., 2] = 5.0
  prepared, found = anchored(batch, logits, 1.0)
  assert float(found.metrics["entropy_gap"]) == -1.0
  assert not np.any(jax.grad(penalty_of(prepared, 1.0))(jnp.float32(logits)))


def test_the_quantile_is_checked():
  batch = ragged(0)
  with pytest.raises(ValueError, match=r"quantile=1.2 has to be in \[0, 1\]"):
    advantages.anchor_entropy(batch, batch.rewards, {}, quantile=1.2)


def test_the_config_builds():
  config = configs.load("configs/methods/siren.py")
  pieces = [compose.build(dict(p), advantages) for p in config.advantage]
  assert initial_carried(pieces).keys() == {"anchor_entropy"}
  specs = [dict(p) for p in config.objective]
  assert specs[1].pop("aggregation") == "sequence_sum" and config.aggregation.kind == "constant"
  terms = [compose.build(spec, objectives) for spec in specs]
  assert set(compose.signals_of(pieces[0])) <= set(compose.signals_of(terms[1]))
