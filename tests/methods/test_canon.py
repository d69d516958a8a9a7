"""CANON: the published identities, and the estimator as loops in float64."""

import numpy as np
import pytest

from jaxrl import advantages, compose
from jaxrl import config as configs
from jaxrl.batch import Trajectory, pack


def batch_of(rewards, entropies, groups=None, scored=None, lengths=None):
  """One response for each reward, whose tokens have its entropy on average."""
  rng = np.random.default_rng(0)
  n = len(rewards)
  groups = [0] * n if groups is None else groups
  scored = [True] * n if scored is None else scored
  lengths = rng.integers(1, 6, n) if lengths is None else lengths
  made = []
  for r, h, g, s, length in zip(rewards, entropies, groups, scored, lengths):
    noise = rng.uniform(-0.01, 0.01, length)
    signal = np.concatenate([[99.0], h + noise - noise.mean()])  # the prompt's does not count
    made.append(Trajectory(rng.integers(0, 9, length + 1), [False] + [True] * length, reward=r,
                           group=int(g), scored=bool(s), signals={"entropy": signal}))
  return pack(made, row_length=16)


def contrast(batch, count, **options):
  found = advantages.contrast_halves(batch, batch.rewards, **options)
  return np.asarray(found.values)[:count], found.metrics


def by_hand(rewards, metric, *, mu, alpha=1.0, disfavour="upper"):
  """One group, from the paper's definitions."""
  order = np.argsort(metric, kind="stable")
  lower = set(order[:len(order) // 2])
  upper = set(order) - lower
  m_low, m_up = (np.mean([rewards[i] for i in half]) for half in (lower, upper))
  values = []
  for i, r in enumerate(rewards):
    if disfavour == "upper":
      between = alpha * r - m_low if i in upper else r - alpha * m_up
    else:
      between = r - alpha * m_low if i in upper else alpha * r - m_up
    within = r - (m_up if i in upper else m_low)
    values.append(mu * between + (1 - mu) * within)
  return np.array(values)


@pytest.mark.parametrize("options", [
    dict(mu=1.0), dict(mu=0.0), dict(mu=0.3), dict(mu=1.0, alpha=0.9),
    dict(mu=0.7, alpha=0.8, disfavour="lower")])
def test_ragged_groups_against_loops(options):
  rng = np.random.default_rng(1)
  groups = np.repeat(np.arange(5), [8, 5, 1, 2, 7])
  n = len(groups)
  rewards, entropies = rng.uniform(0, 1, n), rng.exponential(1.0, n)
  scored = rng.random(n) < 0.8
  scored[groups == 2] = True
  found, _ = contrast(batch_of(rewards, entropies, groups, scored), n, **options)
  for g in range(5):
    mine = (groups == g) & scored
    if mine.sum() == 1:
      assert found[mine] == 0
    elif mine.any():
      np.testing.assert_allclose(found[mine], by_hand(rewards[mine], entropies[mine], **options),
                                 atol=1e-5)
  assert not found[~scored].any()


def test_of_equal_halves_the_mean_of_both_comparisons_is_dr_grpo():
  rng = np.random.default_rng(2)
  rewards, entropies = rng.uniform(0, 1, 16), rng.exponential(1.0, 16)
  batch = batch_of(rewards, entropies)
  found, metrics = contrast(batch, 16, mu=0.5)
  np.testing.assert_allclose(found, rewards - rewards.mean(), atol=1e-6)
  upper = np.argsort(entropies)[8:]
  lower = np.argsort(entropies)[:8]
  gap = rewards[upper].mean() - rewards[lower].mean()
  assert float(metrics["half_gap"]) == pytest.approx(gap, abs=1e-6)
  # Between the halves: twice the gap, the gap, nothing; within them nothing changes.
  inside = found[upper] - found[upper].mean()
  for mu in (1.0, 0.5, 0.0):
    values, _ = contrast(batch, 16, mu=mu)
    assert values[upper].mean() - values[lower].mean() == pytest.approx(2 * mu * gap, abs=1e-6)
    np.testing.assert_allclose(values[upper] - values[upper].mean(), inside, atol=1e-6)


@pytest.mark.parametrize("sign", [1, 0, -1])
def test_the_metric_moves_where_it_pays_twice_as_fast_as_under_dr_grpo(sign):
  """First-order drift of E[metric]: the mean of advantage times metric."""
  rng = np.random.default_rng(3)
  drifts = []
  for _ in range(20):
    metric = rng.normal(2.0, 0.3, 64)
    rewards = 0.5 + 0.3 * sign * (metric - 2) + 0.1 * rng.normal(size=64)
    batch = batch_of(rewards, metric, lengths=[3] * 64)
    drifts.append([np.mean(contrast(batch, 64, mu=mu)[0] * (metric - metric.mean()))
                   for mu in (1.0, 0.5)])
  inter, plain = np.mean(drifts, axis=0)
  if sign:
    assert np.sign(inter) == np.sign(plain) == sign and 1.4 < inter / plain < 2.1
  else:
    assert abs(inter) < 0.01


def test_length_and_ties_go_by_the_order_of_sampling():
  rewards = [1.0, 0.0, 0.5, 0.25]
  batch = batch_of(rewards, [1, 1, 1, 1], lengths=[2, 2, 5, 2])
  found, _ = contrast(batch, 4, metric="length", mu=1.0)
  np.testing.assert_allclose(found, by_hand(rewards, [2, 2, 5, 2], mu=1.0), atol=1e-6)
  assert found[0] == pytest.approx(1.0 - 0.375)  # 0 and 1 are the lower half
  shorter, _ = contrast(batch, 4, metric="length", mu=1.0, alpha=0.5)
  assert (shorter[[2, 3]] < found[[2, 3]]).all() and (shorter[[0, 1]] > found[[0, 1]]).all()


def test_mu_may_follow_the_mean_reward():
  rewards, entropies = [1.0, 0.0, 1.0, 1.0], [0.1, 0.2, 0.3, 0.4]
  batch = batch_of(rewards, entropies)
  for mu, number in (("reward", 0.75), ("1 - reward", 0.25)):
    found, metrics = contrast(batch, 4, mu=mu)
    np.testing.assert_allclose(found, by_hand(rewards, entropies, mu=number), atol=1e-6)
    assert float(metrics["contrast_mu"]) == pytest.approx(number)


@pytest.mark.parametrize("options, message", [
    (dict(metric="width"), "metric='width'"), (dict(mu="falling"), "mu='falling'"),
    (dict(disfavour="long"), "disfavour='long'")])
def test_unknown_settings_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    contrast(batch_of([1.0, 0.0], [1, 2]), 2, **options)


def test_the_config_builds_and_only_entropy_needs_a_signal():
  config = configs.to_dict(configs.load("configs/methods/canon.py"))
  piece = compose.build(config["advantage"][0], advantages)
  assert compose.signals_of(piece) == ("entropy",)
  assert config["aggregation"]["kind"] == "constant"
  piece = compose.build(dict(name="contrast_halves", metric="length"), advantages)
  assert compose.signals_of(piece) == ()
