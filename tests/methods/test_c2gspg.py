"""C2GSPG: the loss as loops, its gradient in closed form, signs that agree, and a bandit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose, objectives
from jaxrl import config as configs
from jaxrl.advantages.chain import credit
from jaxrl.batch import to_tokens
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms
from tests.objectives.conftest import packed  # noqa: F401, a fixture


def prepared(packed, seed, rewards):
  """A batch with targets and centred advantages of given rewards."""
  batch, outputs = packed.batch(seed)
  n = batch.num_sequences
  batch = batch.replace(rewards=np.resize(np.asarray(rewards, np.float32), n))
  chain = credit([compose.build("target_confidence", advantages),
                  compose.build("center_by_group", advantages)])
  found = chain(batch, batch.rewards, {})
  batch = batch.with_signals(advantages=found.values, **found.signals)
  return batch, outputs


def run(batch, outputs, **options):
  objective = sum_of_terms([functools.partial(objectives.confident_policy_gradient, **options)])

  def loss(outputs):
    return objective(outputs, batch, loss_weights(batch, "sequence_mean"), mean_weights(batch))
  return jax.value_and_grad(loss, has_aux=True)(outputs)


def by_hand(packed, batch, logprobs, beta, floor):
  """The mean over scored answers, in float64."""
  losses = np.zeros(logprobs.shape)
  for i, rows, columns in packed.sequences(batch):
    if not len(rows):
      continue
    at = (rows, columns)
    log_c, old = logprobs[at].mean(), np.exp(np.mean(batch.behaviour_logprobs[at], dtype=float))
    c, r = np.exp(log_c), float(batch.rewards[i])
    a = float(np.asarray(batch.signals["advantages"])[at].mean())
    doubt = np.log(1 - c) if 1 - c > floor else np.log(floor) + (1 - c - floor) / floor
    calibration = r * log_c + (1 - r) * doubt if a * (r - c) >= 0 else 0.0
    losses[at] = -a / max(1 - old, floor) * log_c - beta * calibration
  return packed.aggregate(batch, losses, "sequence_mean")


@pytest.mark.parametrize("beta, floor", [(0.1, 0.05), (1.0, 0.3), (0.0, 0.05)])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal_the_equation(packed, seed, beta, floor):
  rewards = np.random.default_rng(seed).integers(0, 2, 8)
  batch, outputs = prepared(packed, seed, rewards)
  (value, metrics), gradient = run(batch, outputs, beta=beta, floor=floor)
  logprobs = np.asarray(outputs.logprobs, np.float64)
  loss = functools.partial(by_hand, packed, batch, beta=beta, floor=floor)
  packed.close(value, loss(logprobs), rtol=2e-5)
  expected = packed.finite_differences(loss, logprobs, batch.loss_mask)
  packed.close(gradient.logprobs, expected, rtol=1e-4)
  assert np.isfinite(list(map(float, metrics.values()))).all()


def test_on_policy_the_gradient_is_the_closed_form_and_both_parts_have_one_sign(packed):
  beta, floor = 0.3, 1e-4
  for seed in range(4):
    rewards = np.random.default_rng(seed).integers(0, 2, 8)
    batch, outputs = prepared(packed, seed, rewards)
    outputs = outputs.replace(logprobs=jnp.where(batch.loss_mask, batch.behaviour_logprobs, -1.0))
    gradient = np.asarray(run(batch, outputs, beta=beta, floor=floor)[1].logprobs)
    scored = list(packed.sequences(batch))
    for i, rows, columns in scored:
      if not len(rows):
        continue
      at = (rows, columns)
      c, r = np.exp(np.mean(batch.behaviour_logprobs[at])), float(batch.rewards[i])
      a = float(np.asarray(batch.signals["advantages"])[at].mean())
      agrees = a * (r - c) >= 0
      in_log_c = -(a + beta * (r - c) * agrees) / (1 - c)
      expected = float(batch.weights[i]) * in_log_c / len(scored) / len(rows)
      np.testing.assert_allclose(gradient[at], expected, rtol=2e-3, atol=1e-6)
      assert agrees, "of verdicts they never contradict"


def test_other_rewards_can_contradict_and_then_the_calibration_is_left_out(packed):
  batch, outputs = packed.batch(0)
  mask = batch.loss_mask
  outputs = outputs.replace(logprobs=jnp.where(mask, jnp.log(0.5), -1.0))
  count = np.ones(batch.num_sequences, np.float32)
  batch = batch.with_signals(advantages=to_tokens(batch, 0.2 * count),
                             confidence_target=to_tokens(batch, 0.3 * count))  # below c = 0.5
  batch = batch.replace(behaviour_logprobs=np.where(mask, np.log(0.5), 0).astype(np.float32))
  with_it = np.asarray(run(batch, outputs, beta=1.0)[1].logprobs)
  without = np.asarray(run(batch, outputs, beta=0.0)[1].logprobs)
  np.testing.assert_allclose(with_it, without, atol=1e-8)


def test_certain_answers_stay_finite_and_wrong_ones_are_still_pushed_down(packed):
  batch, outputs = prepared(packed, 1, [0.0, 1.0])
  mask = batch.loss_mask
  outputs = outputs.replace(logprobs=jnp.where(mask, -1e-7, -1.0))
  batch = batch.replace(behaviour_logprobs=np.where(mask, -1e-7, 0).astype(np.float32))
  (value, _), gradient = run(batch, outputs, beta=1.0)
  assert np.isfinite(value) and np.isfinite(gradient.logprobs).all()
  for i, rows, columns in packed.sequences(batch):
    if len(rows) and batch.rewards[i] == 0:
      assert (np.asarray(gradient.logprobs)[rows, columns] > 0).all()


@pytest.mark.parametrize("steepness", [1.0, 4.0])
def test_targets_of_unbounded_rewards(packed, steepness):
  batch, _ = packed.batch(2)
  found = advantages.target_confidence(batch, batch.rewards, steepness=steepness)
  targets = np.asarray(found.signals["confidence_target"])
  for i, rows, columns in packed.sequences(batch):
    group = (np.asarray(batch.group_ids) == batch.group_ids[i]) & np.asarray(batch.sequence_mask)
    mine = np.asarray(batch.rewards, np.float64)[group]
    z = steepness * (batch.rewards[i] - mean) / std if (
        (mean := mine.mean()) is not None and (std := mine.std()) > 0) else 0.0
    if len(rows):
      np.testing.assert_allclose(targets[rows, columns], 1 / (1 + np.exp(-z)), rtol=1e-4)
  np.testing.assert_array_equal(found.values, batch.rewards)


def test_targets_outside_of_0_and_1_are_counted(packed):
  batch, _ = packed.batch(3)
  batch = batch.replace(rewards=np.where(np.arange(batch.num_sequences) == 0, 3.0, 0.5
                                         ).astype(np.float32))
  found = advantages.target_confidence(batch, batch.rewards)
  share = float(batch.sequence_mask[0]) / max(int(np.sum(batch.sequence_mask)), 1)
  assert float(found.metrics["confidence_target_outside"]) == pytest.approx(share)


def test_a_bandit_is_the_better_calibrated_the_larger_beta():
  """One token, three actions right with probability 0.7, 0.5 and 0.1; the exact expected gradient."""
  right, gaps, accuracies = np.array([0.7, 0.5, 0.1]), [], []
  for beta in (0.0, 0.1, 0.3, 1.0):
    z = np.zeros(3)
    for _ in range(6000):
      p = np.exp(z - z.max())
      p /= p.sum()
      a = right - (p * right).sum()  # the mean over verdicts of a large group
      weight = (a + beta * (right - p)) / np.maximum(1 - p, 0.05)
      z += 0.05 * p * (weight - (p * weight).sum())
    gaps.append(p.max() - (p * right).sum())
    accuracies.append((p * right).sum())
  assert gaps == sorted(gaps, reverse=True) and accuracies == sorted(accuracies, reverse=True)
  assert gaps[0] > 0.2 and gaps[-1] < 0.1 and accuracies[-1] > 0.6


def test_the_config_builds_and_advantages_of_tokens_are_refused():
  config = configs.to_dict(configs.load("configs/methods/c2gspg.py"))
  term = compose.build(config["objective"][0], objectives)
  assert compose.is_whole(term) and config["aggregation"]["kind"] == "sequence_mean"
  for floor in (0.0, 1.0):
    with pytest.raises(ValueError, match="floor"):
      objectives.confident_policy_gradient(None, None, floor=floor)
