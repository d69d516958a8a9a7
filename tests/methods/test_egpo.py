"""EGPO: weights and advantages as loops in float64, bounds, and the groups that are all wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose, objectives
from jaxrl import config as configs
from jaxrl.advantages.chain import chain
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms


def batch_of(rewards, surprises, groups, scored=None):
  """Answers of 1 to 5 tokens whose mean of -log-probability is given."""
  rng = np.random.default_rng(0)
  scored = np.ones(len(rewards), bool) if scored is None else scored
  made = []
  for r, h, g, s in zip(rewards, surprises, groups, scored):
    length = int(rng.integers(1, 6))
    share = rng.uniform(0.5, 1.5, length)
    logprobs = np.concatenate([[0.0], -h * share / share.mean()])
    made.append(Trajectory(rng.integers(0, 9, length + 1), [False] + [True] * length,
                           behaviour_logprobs=logprobs, reward=r, group=int(g), scored=bool(s)))
  return pack(made, row_length=16)


def run(batch, count, **options):
  found = advantages.weigh_by_certainty(batch, batch.rewards, **options)
  return np.asarray(found.values)[:count], found.metrics


def by_hand(rewards, surprises, *, low=0.8, high=2.0, all_wrong=-1.0, renormalise=False):
  rewards, surprises = np.asarray(rewards, float), np.asarray(surprises, float)
  right = rewards >= 0.5
  ratio = np.clip(surprises.mean() / (surprises + 1e-6), low, high)
  w = np.where(right, np.maximum(1, ratio), np.minimum(1, ratio))
  if renormalise:
    w = w / w.mean()
  v = np.where(right, 1.0, -1.0)
  if right.all():
    return np.zeros(len(v))
  base = (v - v.mean()) / v.std() if right.any() else np.full(len(v), all_wrong)
  return w * base


@pytest.mark.parametrize("options", [dict(), dict(low=0.5, high=1.2), dict(renormalise=True),
                                     dict(all_wrong=0.0)])
def test_ragged_groups_against_loops(options):
  rng = np.random.default_rng(1)
  groups = np.repeat(np.arange(6), [7, 4, 1, 1, 5, 6])
  n = len(groups)
  rewards = (rng.random(n) < 0.5).astype(float)
  rewards[groups == 1], rewards[groups == 4] = 0, 1  # all wrong, all right
  rewards[groups == 2], rewards[groups == 3] = 0, 1  # and alone
  surprises, scored = rng.exponential(0.7, n), rng.random(n) < 0.85
  found, _ = run(batch_of(rewards, surprises, groups, scored), n, **options)
  for g in range(6):
    mine = (groups == g) & scored
    if mine.any():
      np.testing.assert_allclose(found[mine], by_hand(rewards[mine], surprises[mine], **options),
                                 rtol=1e-4, atol=1e-6)
  assert not found[~scored].any()
  assert not found[groups == 4].any(), "where all are right there is nothing to learn"


def test_right_answers_gain_with_certainty_and_wrong_ones_lose_with_doubt():
  rewards, surprises = [1, 1, 1, 0, 0, 0], [0.1, 0.5, 3.0, 0.1, 0.5, 3.0]
  found, _ = run(batch_of(rewards, surprises, [0] * 6), 6)
  assert found[0] == pytest.approx(2.0)  # the upper bound: sure and right
  assert found[2] == pytest.approx(1.0)  # unsure and right: not less than GRPO's
  assert found[3] == pytest.approx(-1.0)  # sure and wrong: GRPO's, no more
  assert found[5] == pytest.approx(-0.8)  # unsure and wrong: the lower bound
  assert found.sum() > 0


def test_a_common_scale_of_the_entropies_changes_nothing():
  rng = np.random.default_rng(2)
  rewards, surprises = [1, 0, 1, 0, 0], rng.exponential(1.0, 5)
  a, _ = run(batch_of(rewards, surprises, [0] * 5), 5)
  b, _ = run(batch_of(rewards, 7 * surprises, [0] * 5), 5)
  np.testing.assert_allclose(a, b, rtol=1e-4)


def test_rewards_of_minus_one_and_one_are_verdicts_too():
  surprises = [0.3, 0.9, 0.5]
  a, _ = run(batch_of([1, 0, 0], surprises, [0] * 3), 3)
  b, _ = run(batch_of([1, -1, -1], surprises, [0] * 3), 3, right_from=0.0)
  np.testing.assert_allclose(a, b)


def test_what_is_logged():
  rewards, surprises = [1, 0, 0, 0], [0.2, 0.8, 1.0, 1.2]
  _, metrics = run(batch_of(rewards, surprises, [0, 0, 1, 1]), 4)
  assert float(metrics["entropy_gap_of_wrong"]) == pytest.approx(1.0 - 0.2, abs=1e-5)
  _, metrics = run(batch_of([0, 0], [1, 2], [0, 0]), 2)
  assert float(metrics["entropy_gap_of_wrong"]) == 0.0


def log_softmax(z):
  return z - z.max() - np.log(np.exp(z - z.max()).sum())


@pytest.mark.parametrize("seed", range(3))
def test_where_all_are_wrong_logits_move_by_the_equation(seed):
  """d objective / d logit_v = -w * ratio * (1[v = sampled] - pi_v), and nothing at ratio < 1 - clip."""
  rng = np.random.default_rng(seed)
  answers, vocabulary, low = 4, 5, 0.2
  old = rng.normal(size=(answers, vocabulary)) * np.linspace(0.1, 3, answers)[:, None]
  new = old + 0.5 * rng.normal(size=old.shape)
  tokens = np.array([rng.choice(vocabulary, p=np.exp(log_softmax(z))) for z in old])
  new[0] = old[0] - 0.5 * np.eye(vocabulary)[tokens[0]]  # one answer has become less likely by far
  new[1] = old[1] + 0.5 * np.eye(vocabulary)[tokens[1]]  # and one more
  old_logprobs = np.array([log_softmax(z)[t] for z, t in zip(old, tokens)])
  batch = pack([Trajectory([0, t], [False, True], behaviour_logprobs=[0, h], reward=0.0)
                for t, h in zip(tokens, old_logprobs)], row_length=2, min_rows=answers)
  batch = batch.with_signals(advantages=chain([advantages.weigh_by_certainty])(batch, batch.rewards))
  assert (batch.sequence_ids[:, 0] == np.arange(answers)).all()
  objective = sum_of_terms([objectives.clipped_surrogate])

  def loss(logits):
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)
    outputs = ModelOutputs(logprobs=jnp.pad(logprobs, ((0, 0), (1, 0))))
    return objective(outputs, batch, loss_weights(batch, "sequence_sum"), mean_weights(batch))[0]
  found = -answers * np.asarray(jax.grad(loss)(jnp.float32(new)))
  surprise = -old_logprobs
  weights = np.minimum(1, np.clip(surprise.mean() / (surprise + 1e-6), 0.8, 2.0))
  assert weights.min() < 1 == weights.max()
  for i, t in enumerate(tokens):
    p = np.exp(log_softmax(new[i]))
    ratio = p[t] / np.exp(old_logprobs[i])
    expected = -weights[i] * ratio * (ratio >= 1 - low) * (np.eye(vocabulary)[t] - p)
    np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-6)
  assert not found[0].any() and found[1].any()


def test_where_all_are_right_no_logit_moves():
  batch = batch_of([1, 1, 1], [0.2, 0.9, 2.0], [0] * 3)
  batch = batch.with_signals(advantages=chain([advantages.weigh_by_certainty])(batch, batch.rewards))
  objective = sum_of_terms([objectives.clipped_surrogate])
  gradient = jax.grad(lambda x: objective(ModelOutputs(logprobs=x), batch, loss_weights(
      batch, "sequence_mean"), mean_weights(batch))[0])(jnp.asarray(batch.behaviour_logprobs) + 0.1)
  assert not np.any(gradient)


def test_bounds_that_do_not_enclose_1_are_refused():
  with pytest.raises(ValueError, match="low=1.2"):
    run(batch_of([1], [1], [0]), 1, low=1.2)


def test_the_config_builds():
  config = configs.to_dict(configs.load("configs/methods/egpo.py"))
  assert len(config["advantage"]) == 1
  compose.build(config["advantage"][0], advantages)
