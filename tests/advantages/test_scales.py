"""Scales against the standard library's statistics."""

import statistics

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl import advantages
from jaxrl.batch import Trajectory, pack

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)
DEVIATIONS = {0: statistics.pstdev, 1: statistics.stdev}


def grouped(rewards, groups, mask=None):
  mask = [True] * len(rewards) if mask is None else mask
  return pack([Trajectory([1, 2], [False, True], reward=r, group=int(g), scored=bool(m))
               for r, g, m in zip(rewards, groups, mask)], row_length=2, min_rows=16,
              min_sequences=16)


def ragged(seed):
  rng = np.random.default_rng(seed)
  size = rng.integers(1, 17)
  return grouped(rng.normal(size=size), rng.integers(0, 4, size), rng.random(size) < 0.8)


def divided(batch, groups, ddof, epsilon):
  """v / (std + epsilon) within `groups`, 0 where there is no variance."""
  expected = np.zeros(16)
  for group in set(groups[batch.sequence_mask]):
    inside = np.nonzero(batch.sequence_mask & (groups == group))[0]
    values = [float(batch.rewards[i]) for i in inside]
    if len(set(values)) > 1:
      expected[inside] = np.array(values) / (DEVIATIONS[ddof](values) + epsilon)
  return expected


@pytest.mark.parametrize("ddof, epsilon", [(0, 1e-6), (1, 1e-4), (1, 0.0)])
def test_scales_divide_by_the_standard_deviation(ddof, epsilon):
  @quick
  @given(seeds)
  def check(seed):
    batch = ragged(seed)
    result = advantages.scale_by_group_std(batch, batch.rewards, ddof=ddof, epsilon=epsilon)
    expected = divided(batch, batch.group_ids, ddof, epsilon)
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    result = advantages.scale_by_batch_std(batch, batch.rewards, ddof=ddof, epsilon=epsilon)
    expected = divided(batch, np.zeros(16, int), ddof, epsilon)
    np.testing.assert_allclose(result, expected, rtol=1e-5)

  check()


@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
@pytest.mark.parametrize("scale", [advantages.scale_by_group_std, advantages.scale_by_batch_std])
def test_without_variance_the_result_is_exactly_zero_even_uncentred(scale, epsilon):
  batch = grouped([0.1 * 3] * 5, [0] * 5)
  assert not np.any(scale(batch, batch.rewards, epsilon=epsilon))


def test_a_singleton_and_an_unscored_sequence_get_zero():
  batch = grouped([1.0, 0.0, 3.0, 7.0], [0, 0, 1, 0], [True, True, True, False])
  result = advantages.scale_by_group_std(batch, batch.rewards)
  assert np.all(np.asarray(result[2:]) == 0) and result[0] > 0


def test_the_default_after_centring_is_the_field_s_grpo_advantage():
  rewards = np.array([1.0, 0.0, 0.0, 1.0, 0.0])  # torch.std is unbiased; epsilon = 1e-4
  batch = grouped(rewards, [0] * 5)
  result = advantages.scale_by_group_std(batch, advantages.center_by_group(batch, batch.rewards))
  expected = (rewards - 0.4) / (np.sqrt(1.2 / 4) + 1e-4)
  np.testing.assert_allclose(result[:5], expected, rtol=1e-5)


def test_batch_scale_before_the_group_baseline_divides_by_the_deviation_of_the_rewards():
  rewards = np.array([1.0, 0.0, 5.0, 6.0])
  batch = grouped(rewards, [0, 0, 1, 1])
  scaled = advantages.scale_by_batch_std(batch, batch.rewards)
  result = advantages.center_by_group(batch, scaled)
  expected = np.array([0.5, -0.5, -0.5, 0.5]) / (np.std(rewards, ddof=1) + 1e-4)
  np.testing.assert_allclose(result[:4], expected, rtol=1e-5)


def test_small_differences_of_large_rewards_are_scaled_as_they_are():
  rewards = (1e4 + 0.1 * np.random.default_rng(0).normal(size=16)).astype(np.float32)
  batch = grouped(rewards, [0] * 16)
  result = advantages.scale_by_group_std(batch, advantages.center_by_group(batch, batch.rewards))
  exact = rewards.astype(np.float64)
  expected = (exact - exact.mean()) / (exact.std(ddof=1) + 1e-4)
  np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
