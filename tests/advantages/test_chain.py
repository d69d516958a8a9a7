"""The chain: order, spreading over tokens, and the mistakes it refuses."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
import pytest

from jaxrl import advantages, compose, objectives
from jaxrl.advantages.chain import baseline, chain, credit
from jaxrl.batch import TokenBatch, Trajectory, pack


@pytest.fixture
def batch():
  """Two groups, (1, 0, 0.5) and (1, 1); sequence 2 is not scored."""
  rng = np.random.default_rng(0)
  rows = [(1.0, 3, True), (0.0, 3, True), (0.5, 3, False), (1.0, 4, True), (1.0, 4, True)]
  return pack([Trajectory(rng.integers(0, 9, length), [False, True] + [True] * (length - 2),
                          reward=reward, group=group, scored=scored)
               for (reward, group, scored), length in zip(rows, [3, 6, 2, 5, 7])], row_length=8)


def grpo():
  return [compose.build("center_by_group", advantages),
          compose.build(dict(name="scale_by_group_std", ddof=0, epsilon=0.5), advantages)]


def halve_first_tokens(batch: TokenBatch, values: Float[Array, "rows length"], *,
                       factor: float = 0.5) -> Float[Array, "rows length"]:
  return jnp.where(batch.positions == 1, factor * values, values)


def spread(batch: TokenBatch, values: Float[Array, "sequences"]) -> Float[Array, "rows length"]:
  return values[jnp.maximum(batch.sequence_ids, 0)]


def mean_of_all(batch: TokenBatch, values: Float[Array, "sequences"]) -> Float[Array, ""]:
  return values.mean()


def negate(batch, values):
  return -values


def test_grpo_gives_each_loss_token_the_advantage_of_its_sequence(batch):
  result = np.asarray(jax.jit(chain(grpo()))(batch, batch.rewards))
  for sequence, advantage in enumerate([0.5, -0.5, 0.0, 0.0, 0.0]):
    tokens = (batch.sequence_ids == sequence) & batch.loss_mask
    np.testing.assert_allclose(result[tokens], advantage / (0.5 + 0.5), rtol=1e-6)
  assert not result[~batch.loss_mask].any()


def test_an_empty_chain_spreads_the_rewards(batch):
  result = np.asarray(chain([])(batch, batch.rewards))
  expected = np.where(batch.loss_mask, batch.rewards[np.maximum(batch.sequence_ids, 0)], 0)
  np.testing.assert_array_equal(result, expected)


def test_pieces_for_tokens_follow_pieces_for_sequences(batch):
  pieces = [negate, spread, functools.partial(halve_first_tokens, factor=0.25), negate]
  result = np.asarray(chain(pieces)(batch, batch.rewards))
  rewards = batch.rewards[np.maximum(batch.sequence_ids, 0)]
  expected = np.where(batch.positions == 1, 0.25 * rewards, rewards)
  np.testing.assert_array_equal(result, np.where(batch.loss_mask, expected, 0))


def test_infinities_off_the_loss_mask_are_cut(batch):
  everywhere = lambda batch, values: jnp.where(batch.loss_mask, 1.0, jnp.nan)
  result = np.asarray(chain([everywhere])(batch, batch.rewards))
  np.testing.assert_array_equal(result, batch.loss_mask.astype(np.float32))


def test_a_piece_for_sequences_behind_one_for_tokens_is_named(batch):
  run = chain([spread, advantages.center_by_group])
  message = r"advantage\[1\] \(center_by_group\) takes values \[sequences\], but " \
            r"those from config.advantage\[0\] \(spread\) are float32\[\d+, 8\]"
  with pytest.raises(ValueError, match=message):
    jax.jit(run)(batch, batch.rewards)


def test_a_piece_for_tokens_on_rewards_is_named(batch):
  message = r"\(halve_first_tokens\) takes values \[rows length\], but those from the rewards are"
  with pytest.raises(ValueError, match=message):
    chain([functools.partial(halve_first_tokens, factor=0.1)])(batch, batch.rewards)


def test_a_result_of_another_shape_is_named(batch):
  with pytest.raises(ValueError, match=r"advantage\[0\] \(mean_of_all\) have shape \[\]"):
    chain([mean_of_all])(batch, batch.rewards)
  with pytest.raises(ValueError, match=r"from the rewards have shape \[3\]"):
    chain([])(batch, np.zeros(3))


def test_two_baselines_are_refused_before_anything_runs():
  pieces = grpo() + [functools.partial(compose.build("leave_one_out", advantages))]
  with pytest.raises(ValueError, match="2 baselines, center_by_group and leave_one_out"):
    chain(pieces)
  with pytest.raises(ValueError, match="2 baselines, mine and leave_one_out"):
    chain([baseline(lambda_named("mine")), advantages.leave_one_out])


@pytest.mark.parametrize("term, refused", [
    (dict(name="clipped_surrogate", level="sequence"), True), ("geometric_mean", True),
    (dict(name="clipped_surrogate", level="sequence_token"), False), ("clipped_surrogate", False),
    ("reinforce", False)])
def test_a_ratio_of_sequences_takes_no_advantages_of_tokens(batch, term, refused):
  terms = [compose.build(dict(name="entropy", coefficient=0.1), objectives), compose.build(term, objectives)]
  per_token = credit([spread], terms)
  credit(grpo(), terms)(batch, batch.rewards, {})  # one per sequence suits all
  if not refused:
    per_token(batch, batch.rewards, {})
    return
  name = term if isinstance(term, str) else term["name"]
  with pytest.raises(ValueError, match=rf"config.objective\[1\] \({name}\) .*advantage\[0\] "
                                       r"\(spread\) gives one per token"):
    jax.eval_shape(lambda: per_token(batch, batch.rewards, {}))


def lambda_named(name):
  piece = lambda batch, values: values
  piece.__name__ = name
  return piece


def test_whitening_over_the_batch_may_follow_a_group_baseline(batch):
  run = chain([advantages.center_by_group, advantages.center_by_batch,
               functools.partial(advantages.scale_by_batch_std, ddof=0, epsilon=0.0)])
  result = np.asarray(run(batch, batch.rewards))
  first = (batch.sequence_ids == 0) & batch.loss_mask
  np.testing.assert_allclose(result[first], 0.5 / np.std([0.5, -0.5, 0, 0]), rtol=1e-5)
