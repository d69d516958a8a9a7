"""Baselines against their equations, written as loops over ragged groups."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from jaxrl import advantages
from jaxrl.batch import Trajectory, pack

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def scored(rewards, groups=None, mask=None):
  """16 sequences of two tokens, [16, 2], with these rewards."""
  groups = [0] * len(rewards) if groups is None else groups
  mask = [True] * len(rewards) if mask is None else mask
  return pack([Trajectory([1, 2], [False, True], reward=r, group=int(g), scored=bool(m))
               for r, g, m in zip(rewards, groups, mask)], row_length=2, min_rows=16,
              min_sequences=16)


def ragged(seed):
  """Interleaved groups of 1 to 10 members, a few of them not scored."""
  rng = np.random.default_rng(seed)
  size = rng.integers(1, 17)
  return scored(rng.normal(size=size), rng.integers(0, 5, size), rng.random(size) < 0.8)


def members(batch, i):
  same = batch.group_ids == batch.group_ids[i]
  return np.nonzero(same & batch.sequence_mask)[0].tolist()


@quick
@given(seeds)
def test_center_by_group_subtracts_the_mean_of_the_group(seed):
  batch = ragged(seed)
  rewards, expected = batch.rewards.astype(np.float64), np.zeros(16)
  for i in np.nonzero(batch.sequence_mask)[0]:
    expected[i] = rewards[i] - np.mean(rewards[members(batch, i)])
  np.testing.assert_allclose(advantages.center_by_group(batch, batch.rewards), expected,
                             rtol=1e-5, atol=1e-6)


@quick
@given(seeds)
def test_leave_one_out_subtracts_the_mean_of_the_others(seed):
  batch = ragged(seed)
  rewards, expected = batch.rewards.astype(np.float64), np.zeros(16)
  for i in np.nonzero(batch.sequence_mask)[0]:
    others = [j for j in members(batch, i) if j != i]
    expected[i] = rewards[i] - np.mean(rewards[others]) if others else 0.0
  np.testing.assert_allclose(advantages.leave_one_out(batch, batch.rewards), expected, rtol=1e-5,
                             atol=1e-6)


@quick
@given(seeds)
def test_center_by_batch_subtracts_the_mean_of_the_batch(seed):
  batch = ragged(seed)
  rewards = batch.rewards.astype(np.float64)
  mean = rewards[batch.sequence_mask].mean() if batch.sequence_mask.any() else 0.0
  np.testing.assert_allclose(advantages.center_by_batch(batch, batch.rewards),
                             np.where(batch.sequence_mask, rewards - mean, 0), rtol=1e-5, atol=1e-6)


BASELINES = [advantages.center_by_group, advantages.leave_one_out, advantages.center_by_batch]


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("rewards", [[0.1 * 3] * 7, [1 / 3] * 11, [0.1]])
def test_equal_rewards_give_exactly_nothing(baseline, rewards):
  batch = scored(rewards)
  assert not np.any(baseline(batch, batch.rewards))


@pytest.mark.parametrize("baseline", BASELINES)
def test_an_unscored_sequence_neither_gets_nor_gives_anything(baseline):
  alone = scored([1.0, 0.0, 0.5])
  mixed = scored([1.0, 9.0, 0.0, 0.5], mask=[True, False, True, True])
  values = np.where(mixed.sequence_mask, mixed.rewards, np.nan)
  values[1] = np.nan
  result = np.asarray(jax.jit(baseline)(mixed, values))
  np.testing.assert_array_equal(result[[0, 2, 3]], baseline(alone, alone.rewards)[:3])
  assert result[1] == 0


@pytest.mark.parametrize("baseline", BASELINES)
def test_nothing_scored_gives_zeros(baseline):
  batch = scored([1.0, 2.0], mask=[False, False])
  assert not np.any(baseline(batch, batch.rewards))
