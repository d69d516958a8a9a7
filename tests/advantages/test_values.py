"""Credit with a critic, and penalties and weights inside the reward, against float64 loops."""

import jax
import numpy as np
import pytest

from jaxrl import advantages
from jaxrl.advantages.chain import Credit, credit
from jaxrl.batch import Trajectory, pack


def batch_of(seed, *, unscored=()):
  """Ragged sequences, several to a row, with gaps in the loss mask (turns of an environment)."""
  rng = np.random.default_rng(seed)
  trajectories = []
  for item in range(9):
    length = int(rng.integers(3, 12))
    mask = (np.arange(length) >= rng.integers(1, 3)) & (rng.random(length) < 0.8)
    behaviour = np.where(mask, -rng.exponential(1.0, length), 0)
    trajectories.append(Trajectory(
        tokens=rng.integers(0, 9, length), loss_mask=mask, behaviour_logprobs=behaviour,
        group=item // 3, reward=rng.normal(), scored=item not in unscored, signals={
            "values": rng.normal(size=length), "logprobs": behaviour + 0.5 * rng.normal(size=length),
            "reference_logprobs": behaviour + 0.5 * rng.normal(size=length)}))
  return pack(trajectories, row_length=24)


def places(batch, i):
  """Rows and columns of a sequence's loss tokens, in order."""
  return np.nonzero((batch.sequence_ids == i) & batch.loss_mask)


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.0), (0.8, 1.0)])
@pytest.mark.parametrize("per_token", [False, True])
def test_gae_is_the_sum_of_discounted_temporal_differences(gamma, lam, per_token):
  batch = batch_of(1)
  rng = np.random.default_rng(2)
  rewards = rng.normal(size=batch.tokens.shape).astype(np.float32) if per_token else batch.rewards
  found = advantages.gae(batch, rewards, gamma=gamma, lam=lam)
  expected = np.zeros(batch.tokens.shape)
  for i in range(batch.num_sequences):
    at = places(batch, i)
    n = len(at[0])
    values = np.append(np.asarray(batch.signals["values"], np.float64)[at], 0.0)
    r = np.asarray(rewards, np.float64)[at] if per_token else np.zeros(n)
    if not per_token and n:
      r[-1] = batch.rewards[i]
    deltas = [r[t] + gamma * values[t + 1] - values[t] for t in range(n)]
    expected[at] = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
  np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-5)
  values = np.where(batch.loss_mask, batch.signals["values"], 0)
  np.testing.assert_allclose(found.signals["returns"], np.where(batch.loss_mask, expected + values, 0),
                             rtol=1e-4, atol=1e-5)


def test_a_perfect_critic_leaves_no_advantage_and_explains_everything():
  batch = batch_of(3)
  reward_of = np.asarray(batch.rewards)[np.maximum(batch.sequence_ids, 0)]
  found = advantages.gae(batch.with_signals(values=reward_of), batch.rewards, gamma=1.0, lam=0.7)
  np.testing.assert_allclose(found.values, 0, atol=1e-6)
  assert abs(float(found.metrics["explained_variance"]) - 1) < 1e-5


def test_the_penalty_of_sequences_is_the_sum_of_that_of_tokens():
  batch = batch_of(4, unscored=(2,))
  whole = advantages.penalise_kl(batch, batch.rewards, beta=0.3)
  parts = advantages.penalise_kl(batch, batch.rewards, beta=0.3, level="token")
  for i in np.nonzero(batch.sequence_mask)[0]:
    at = places(batch, i)
    log_ratio = (np.asarray(batch.signals["logprobs"], np.float64)
                 - batch.signals["reference_logprobs"])[at]
    expected = batch.rewards[i] - 0.3 * log_ratio.sum()
    if len(at[0]):
      np.testing.assert_allclose(np.asarray(parts.values)[at].sum(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole.values[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_are_cut_at_the_cap(level):
  batch = batch_of(5)
  found = np.asarray(advantages.truncate_importance(batch, batch.rewards, cap_at=1.2, level=level)
                     .values)
  for i in range(batch.num_sequences):
    at = places(batch, i)
    log_ratio = (np.asarray(batch.signals["logprobs"], np.float64) - batch.behaviour_logprobs)[at]
    log_ratio = np.full(len(log_ratio), log_ratio.sum()) if level == "sequence" else log_ratio
    np.testing.assert_allclose(found[at], np.minimum(np.exp(log_ratio), 1.2) * batch.rewards[i],
                               rtol=1e-4, atol=1e-6)
  assert not found[~np.asarray(batch.loss_mask)].any()


@pytest.mark.parametrize("per_token", [False, True])
def test_tokens_that_trainer_and_sampler_disagree_on_get_no_credit(per_token):
  batch, low, high = batch_of(5, unscored=(1,)), 0.7, 1.6
  noise = np.random.default_rng(1).normal(size=batch.tokens.shape).astype(np.float32)
  values = noise if per_token else batch.rewards
  found = advantages.mask_disagreement(batch, values, low=low, high=high)
  of_tokens = values if per_token else values[np.maximum(batch.sequence_ids, 0)]
  ratios = np.exp(np.float64(batch.signals["logprobs"]) - batch.behaviour_logprobs)
  lost = np.asarray(batch.loss_mask) & ((ratios < low) | (ratios > high))
  assert 0 < (lost & (ratios < low)).sum() and 0 < (lost & (ratios > high)).sum()
  np.testing.assert_array_equal(found.values, np.where(batch.loss_mask & ~lost, of_tokens, 0))
  np.testing.assert_allclose(found.metrics["disagreement"], lost.sum() / np.sum(batch.loss_mask), rtol=1e-6)
  with pytest.raises(ValueError, match="mask_disagreement: low=1.2, high=5.0"):
    advantages.mask_disagreement(batch, values, low=1.2)
  scheduled = jax.jit(lambda batch, values, low: advantages.mask_disagreement(
      batch, values, low=low, high=high).values)  # as a schedule gives it
  np.testing.assert_array_equal(scheduled(batch, values, low), found.values)


@pytest.mark.parametrize("piece, settings, message", [
    ("gae", dict(gamma=1.5), "gae: gamma=1.5 has to be between 0 and 1"),
    ("gae", dict(lam=-0.1), "gae: lam=-0.1 has to be between 0 and 1"),
    ("truncate_importance", dict(cap_at=0.0), "truncate_importance: cap_at=0.0 has to be above 0")])
def test_settings_that_make_no_sense_are_refused(piece, settings, message):
  batch = batch_of(5)
  with pytest.raises(ValueError, match=message):
    getattr(advantages, piece)(batch, batch.rewards, **settings)


def test_whitened_tokens_have_mean_0_and_variance_1_where_they_count():
  batch = batch_of(6, unscored=(1, 5))
  values = np.random.default_rng(7).normal(3.0, 4.0, batch.tokens.shape).astype(np.float32)
  found = np.asarray(advantages.whiten_tokens(batch, values))
  scored = np.asarray(batch.sequence_mask)[np.maximum(batch.sequence_ids, 0)]
  counted = np.asarray(batch.loss_mask) & scored & (np.asarray(batch.sequence_ids) >= 0)
  assert abs(found[counted].mean()) < 1e-5 and abs(found[counted].std(ddof=1) - 1) < 1e-4
  assert not found[~counted].any()


def running_mean(batch, values, carried):
  """A piece that remembers the sum of all rewards it has seen."""
  total = carried + values.sum()
  return Credit(values - total, {"total": batch.loss_mask * total}, total, {"total": total})


running_mean.initial = lambda: np.zeros((), np.float32)


def test_a_piece_remembers_and_hands_on_signals_and_metrics():
  batch = batch_of(8)
  run = credit([running_mean])
  first = run(batch, batch.rewards, {"running_mean": np.zeros((), np.float32)})
  second = run(batch, batch.rewards, first.carried)
  total = float(np.sum(batch.rewards))
  assert float(second.metrics["total"]) == pytest.approx(2 * total, rel=1e-5)
  np.testing.assert_allclose(second.signals["total"], np.asarray(batch.loss_mask) * 2 * total,
                             rtol=1e-5)


def test_memory_that_changes_its_shape_is_refused():
  def grows(batch, values, carried):
    return Credit(values, carried=np.append(carried, 1.0))
  grows.initial = lambda: np.zeros(1, np.float32)
  batch = batch_of(9)
  with pytest.raises(ValueError, match="began with .* and returned"):
    credit([grows])(batch, batch.rewards, {"grows": np.zeros(1, np.float32)})


def test_a_missing_signal_names_the_piece_and_the_signal():
  batch = batch_of(10)
  with pytest.raises(ValueError, match=r"advantage\[0\] \(gae\) needs the signal 'values'"):
    credit([advantages.gae])(batch.replace(signals={}), batch.rewards, {})
