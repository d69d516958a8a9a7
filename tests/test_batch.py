"""Packing and segment helpers, against plain loops in float64."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import batch as batch_lib
from jaxrl.batch import PADDING, Trajectory, pack, unpack

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def make_trajectories(seed, *, lengths=None, count=12, max_length=12, reward=None):
  """Ragged sequences in interleaved groups of different sizes, some of them not scored."""
  rng = np.random.default_rng(seed)
  if lengths is None:
    lengths = rng.integers(0, max_length + 1, rng.integers(1, count + 1))
  trajectories = []
  for length in lengths:
    mask = rng.random(length) < 0.6
    mask[:1] = False
    trajectories.append(Trajectory(
        tokens=rng.integers(0, 50, length), loss_mask=mask,
        behaviour_logprobs=-rng.random(length), turn_ids=rng.integers(0, 3, length),
        tag_ids=rng.integers(0, 3, length), group=int(rng.integers(-2, 4)),
        reward=rng.normal() if reward is None else reward, scored=bool(rng.random() < 0.8),
        weight=rng.random(), columns={"length": float(length)},
        signals={"hint": rng.normal(size=length), "entropy": rng.random(length)}))
  return trajectories


def padded(trajectories):
  """Always [16, 16] tokens and 16 sequences, so that each helper compiles once."""
  return pack(trajectories, row_length=16, min_rows=16, min_sequences=16)


def values_of(seed, size=16):
  return np.random.default_rng(seed + 1).normal(size=size).astype(np.float32)


def scored_groups(batch):
  """Indices of the scored sequences of each group."""
  groups = {}
  for i, (group, scored) in enumerate(zip(batch.group_ids, batch.sequence_mask)):
    if scored:
      groups.setdefault(int(group), []).append(i)
  return list(groups.values())


def by_group(batch, values, reduce):
  """float64 reference of a `*_by_group` helper."""
  expected = np.zeros(len(batch.rewards))
  for members in scored_groups(batch):
    expected[members] = reduce(np.asarray(values, np.float64)[members])
  return expected


# ---------------------------------------------------------------------------------------- packing


@quick
@given(seeds, st.lists(st.integers(0, 40), max_size=20), st.integers(0, 40))
def test_unpack_inverts_pack(seed, lengths, row_length):
  before = make_trajectories(seed, lengths=lengths)
  after = unpack(pack(before, row_length=row_length))
  assert len(after) == len(before)
  for t, u in zip(before, after):
    for name in ("tokens", "behaviour_logprobs", "turn_ids", "tag_ids"):
      np.testing.assert_array_equal(getattr(u, name), getattr(t, name))
    np.testing.assert_array_equal(u.loss_mask, t.loss_mask & t.scored)
    for name in ("hint", "entropy"):
      np.testing.assert_array_equal(u.signals[name], t.signals[name])
    assert u.scored == t.scored
    assert u.weight == np.float32(t.weight)
    assert u.reward == (np.float32(t.reward) if t.scored else 0)
    assert u.columns == {"length": len(t.tokens)}
  for t, u in zip(before, after):  # groups are renumbered, and compared with one another as before
    assert [t.group == v.group for v in before] == [u.group == v.group for v in after]


@quick
@given(seeds, st.lists(st.integers(0, 40), max_size=20))
def test_every_sequence_is_whole_in_one_row_and_alone_in_its_segment(seed, lengths):
  batch = pack(make_trajectories(seed, lengths=lengths))
  for i, length in enumerate(lengths):
    rows, columns = np.nonzero(batch.sequence_ids == i)
    assert len(rows) == length and len(set(rows)) <= 1
    np.testing.assert_array_equal(columns, np.arange(length) + (columns[0] if length else 0))
    np.testing.assert_array_equal(batch.positions[rows, columns], np.arange(length))
    assert len(set(batch.segment_ids[rows, columns])) <= 1
  real = batch.sequence_ids != PADDING
  assert real.sum() == sum(lengths)
  np.testing.assert_array_equal(real, batch.segment_ids > 0)
  assert len(set(batch.segment_ids[real])) == sum(length > 0 for length in lengths)
  assert not batch.loss_mask[~real].any()


@quick
@given(st.lists(st.integers(0, 100), max_size=30), st.integers(0, 128), st.integers(1, 6),
       st.integers(1, 9), st.integers(1, 40))
def test_shapes_come_from_few_buckets(lengths, row_length, multiple, min_rows, min_sequences):
  batch = pack(make_trajectories(0, lengths=lengths), row_length=row_length,
               rows_multiple=multiple, min_rows=min_rows, min_sequences=min_sequences)
  rows, length = batch.tokens.shape
  powers = {2**k for k in range(12)}
  assert length >= max(lengths, default=0)
  assert length == row_length or (row_length < max([1] + lengths) and length in powers)
  assert rows >= min_rows and rows % multiple == 0 and rows // multiple in powers
  assert len(batch.rewards) >= max(len(lengths), min_sequences) and len(batch.rewards) in powers


@pytest.mark.parametrize("row_length, longest, expected",
                         [(48, 40, 48), (48, 49, 64), (0, 40, 64), (0, 0, 1), (96, 128, 128)])
def test_row_length_is_kept_when_the_longest_sequence_fits(row_length, longest, expected):
  batch = pack(make_trajectories(0, lengths=[longest]), row_length=row_length)
  assert batch.tokens.shape[1] == expected


@given(st.integers(0, 10**6), st.integers(1, 100))
def test_bucket_is_the_smallest_power_of_two(size, minimum):
  result = batch_lib.bucket(size, minimum)
  assert bin(result).count("1") == 1 and result >= max(size, minimum, 1)
  assert result == 1 or result // 2 < max(size, minimum)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), max_size=60), st.integers(50, 80))
def test_first_fit_decreasing_holds_every_item_once_within_its_bound(lengths, capacity):
  bins = batch_lib.first_fit_decreasing(lengths, capacity)
  assert sorted(sum(bins, [])) == list(range(len(lengths)))
  assert all(sum(lengths[i] for i in items) <= capacity for items in bins)
  # At most 11/9 of the optimum + 6/9 (Dosa 2007), and no two bins could have been one.
  used = sorted(sum(lengths[i] for i in items) for items in bins)
  assert len(used) < 2 or used[0] + used[1] > capacity
  if used and len(lengths) <= 7:
    assert len(bins) <= (11 * fewest_bins(lengths, capacity) + 6) / 9


def fewest_bins(lengths, capacity):
  """Optimum by exhaustive search."""
  def place(rest, room):
    if not rest:
      return len(room)
    options = {left: k for k, left in enumerate(room) if left >= rest[0]}.values()
    used = [place(rest[1:], room[:k] + [room[k] - rest[0]] + room[k + 1:]) for k in options]
    return min(used + [place(rest[1:], room + [capacity - rest[0]])])
  return place(list(lengths), [])


def test_no_trajectories_give_a_batch_of_padding():
  batch = pack([], row_length=8, min_rows=2, min_sequences=4)
  assert batch.tokens.shape == (2, 8) and batch.rewards.shape == (4,)
  assert not batch.sequence_mask.any() and not batch.loss_mask.any()
  assert unpack(batch) == []


def test_an_unscored_reward_never_enters_the_batch():
  first, second = make_trajectories(0, lengths=[3, 4])
  first = dataclasses.replace(first, reward=float("nan"), scored=False)
  batch = pack([first, dataclasses.replace(second, scored=True)])
  assert np.isfinite(batch.rewards).all()
  assert not batch.loss_mask[batch.sequence_ids == 0].any()


def test_trajectories_with_different_keys_are_refused_with_the_tasks_named():
  first, second = make_trajectories(0, lengths=[3, 4])
  first.task_id, second.task_id = "sum-1", "sum-2"
  second.signals = {}
  with pytest.raises(ValueError, match=r"different signals.*'sum-1'.*entropy.*'sum-2'"):
    pack([first, second])


@pytest.mark.parametrize("fields, message", [
    (dict(tokens=[1, 2], loss_mask=[False]), r"'add-7': loss_mask has shape \(1,\).*2 tokens"),
    (dict(tokens=[1, 2], loss_mask=[True, True]), r"'add-7': loss_mask\[0\] is True.*BOS"),
    (dict(tokens=[1], loss_mask=[False], signals={"x": [0, 1]}), r"signals\['x'\] has shape"),
])
def test_a_wrong_trajectory_is_named(fields, message):
  with pytest.raises(ValueError, match=message):
    Trajectory(task_id="add-7", **fields)


def test_with_signals_adds_and_replaces():
  batch = padded(make_trajectories(0))
  ones = np.ones_like(batch.behaviour_logprobs)
  after = batch.with_signals(hint=ones, advantages=2 * ones)
  assert set(after.signals) == {"hint", "entropy", "advantages"}
  assert after.signals["hint"][0, 0] == 1 and set(batch.signals) == {"hint", "entropy"}


# --------------------------------------------------------------------------------- segment helpers


@quick
@given(seeds)
def test_sequence_helpers_equal_loops(seed):
  batch = padded(make_trajectories(seed))
  values = values_of(seed, (16, 16))
  sums, means, spread = np.zeros(16), np.zeros(16), np.zeros((16, 16))
  for i in range(16):
    tokens = batch.sequence_ids == i
    sums[i] = values[tokens].astype(np.float64).sum()
    if (tokens & batch.loss_mask).any():
      means[i] = values[tokens & batch.loss_mask].astype(np.float64).mean()
    spread[tokens] = values[0, i]
  np.testing.assert_allclose(batch_lib.sum_by_sequence(batch, values), sums, atol=1e-5)
  np.testing.assert_allclose(batch_lib.mean_by_sequence(batch, values), means, atol=1e-5)
  np.testing.assert_array_equal(batch_lib.to_tokens(batch, values[0]), spread.astype(np.float32))


def deviation(values):
  return values - values.mean()


GROUP_HELPERS = {
    "sum": (batch_lib.sum_by_group, np.sum), "mean": (batch_lib.mean_by_group, np.mean),
    "max": (batch_lib.max_by_group, np.max), "min": (batch_lib.min_by_group, np.min),
    "deviation": (batch_lib.deviation_by_group, deviation),
    "std": (batch_lib.std_by_group, np.std),
    "std1": (lambda b, v: batch_lib.std_by_group(b, v, ddof=1),
             lambda v: np.std(v, ddof=1) if len(v) > 1 else 0.0),
    "count": (lambda b, v: batch_lib.count_by_group(b), len),
}


@pytest.mark.parametrize("name", GROUP_HELPERS)
def test_group_helpers_equal_loops_eagerly_jitted_and_sharded(name):
  helper, reduce = GROUP_HELPERS[name]
  jitted = jax.jit(helper)
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

  @quick
  @given(seeds)
  def check(seed):
    batch = padded(make_trajectories(seed))
    values = np.where(batch.sequence_mask, values_of(seed), np.nan)  # unscored values are not read
    values[:3] = np.round(values[:3])  # groups with equal values
    expected = by_group(batch, values, reduce)
    for result in (helper(batch, values), jitted(batch, values),
                   jitted(*jax.device_put((batch, values), sharding))):
      np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)

  check()


@quick
@given(seeds)
def test_as_one_group_makes_batch_statistics(seed):
  batch = padded(make_trajectories(seed))
  scored = batch.rewards[batch.sequence_mask].astype(np.float64)
  result = batch_lib.mean_by_group(batch_lib.as_one_group(batch), batch.rewards)
  expected = np.where(batch.sequence_mask, scored.mean() if len(scored) else 0, 0)
  np.testing.assert_allclose(result, expected, atol=1e-6)


def one_group(values, scored=None):
  scored = [True] * len(values) if scored is None else scored
  return padded([Trajectory([1, 2], [False, True], reward=v, scored=s)
                 for v, s in zip(values, scored)])


@pytest.mark.parametrize("value", [0.1 * 3, 0.1, 1 / 3, 1e-30, -7.7e12])
@pytest.mark.parametrize("size", [1, 3, 7, 11])
@pytest.mark.parametrize("ddof", [0, 1])
def test_equal_values_have_exactly_no_variance(value, size, ddof):
  batch = one_group([value] * size)
  assert not np.any(batch_lib.std_by_group(batch, batch.rewards, ddof=ddof))
  assert not np.any(batch_lib.deviation_by_group(batch, batch.rewards))
  np.testing.assert_array_equal(batch_lib.mean_by_group(batch, batch.rewards), batch.rewards)


def test_small_differences_of_large_values_survive_float32():
  rewards = 1e4 + 0.1 * np.random.default_rng(0).normal(size=16)
  batch = one_group(rewards)
  exact = batch.rewards.astype(np.float64)
  result = batch_lib.std_by_group(batch, batch.rewards)
  np.testing.assert_allclose(result, np.full(16, exact.std()), rtol=1e-5)
  result = batch_lib.deviation_by_group(batch, batch.rewards)
  np.testing.assert_allclose(result, exact - exact.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("values", [[0.3] * 4, [0.3], [0.0, 1e-30]])
def test_std_has_a_finite_gradient_without_variance(values):
  batch = one_group(values)
  gradient = jax.grad(lambda v: batch_lib.std_by_group(batch, v).sum())(jnp.asarray(batch.rewards))
  assert not np.any(gradient)


def test_std_and_mean_have_their_analytic_gradients():
  values = np.array([0.5, -1.0, 2.0, 0.25])
  batch = one_group(values)
  std = jax.grad(lambda v: batch_lib.std_by_group(batch, v)[0])(jnp.asarray(batch.rewards))
  np.testing.assert_allclose(std[:4], deviation(values) / (4 * values.std()), rtol=1e-5)
  mean = jax.grad(lambda v: batch_lib.mean_by_group(batch, v)[0])(jnp.asarray(batch.rewards))
  np.testing.assert_allclose(mean[:4], 0.25, rtol=1e-6)


@pytest.mark.parametrize("name", GROUP_HELPERS)
def test_nothing_scored_gives_zeros(name):
  for batch in (one_group([1.0, 2.0, 3.0], [False] * 3), padded([])):
    assert not np.any(GROUP_HELPERS[name][0](batch, np.full(16, 5.0, np.float32)))


def test_a_limit_of_lengths_holds_for_batches_that_keep_to_it():
  short, long = (Trajectory(np.arange(n), np.arange(n) > 0) for n in (5, 6))
  assert pack([short], row_length=16).longest == 0
  assert pack([short, short], row_length=16, longest=5).longest == 5
  assert pack([short, long], row_length=16, longest=5).longest == 0
  assert pack([], row_length=16, longest=5).longest == 5


@pytest.mark.parametrize("together, trunk_length", [(False, 0), (True, 0), (True, 4), (False, 4)])
def test_the_sequences_of_a_row_come_longest_first_and_without_gaps(together, trunk_length):
  rng = np.random.default_rng(4)
  trajectories = make_trajectories(0, lengths=rng.integers(5, 30, 40))
  for i, t in enumerate(trajectories):
    t.group = i // 2
    t.tokens[:4] = 1
  batch = pack(trajectories, row_length=80, together=together, trunk_length=trunk_length)
  several = 0
  for row in np.asarray(batch.segment_ids):
    changes = np.flatnonzero(np.diff(row, prepend=0))
    sizes = np.diff([*changes, len(row)])
    if row[-1] == 0:
      sizes = sizes[:-1]
    if len(sizes):
      assert changes[0] == 0 and 0 not in row[:sum(sizes)]
      assert list(sizes) == sorted(sizes, reverse=True)
      several += len(sizes) > 1
  assert several > 3
