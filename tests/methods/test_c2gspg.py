"""C2GSPG: the loss as loops, its gradient in closed form, signs that agree, and a bandit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose, objectives, rollouts
from jaxrl import config as configs
from jaxrl.advantages.chain import credit
from jaxrl.batch import ModelOutputs, Trajectory, pack, to_tokens
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms
from jaxrl.rollouts import edits
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


RIGHT = np.array([0.7, 0.5, 0.1])  # one token, three actions: how often each is right
OTHERS = 7 / 8  # of a group of 8 the mean holds the answer itself, so advantages expect so much less


@functools.partial(jax.jit, static_argnames=("steps", "rate"))
def bandit(beta, *, steps=1500, rate=0.2):
  """Chances of the actions after each step of the term, both verdicts on every action in its batch."""
  batch = jax.tree.map(jnp.asarray, pack([
      Trajectory([0, 1], [False, True], reward=verdict, columns={"chance": 0.0})
      for _ in RIGHT for verdict in (1.0, 0.0)], row_length=2, min_rows=8))
  verdicts = jnp.stack([jnp.float32(RIGHT), jnp.float32(1 - RIGHT)], axis=1)
  objective = sum_of_terms([functools.partial(objectives.confident_policy_gradient, beta=beta)])

  def spread(logits):
    logprobs = jnp.repeat(jax.nn.log_softmax(logits), 2)
    return jnp.zeros(batch.tokens.shape).at[:6, 1].set(logprobs)

  def step(logits, _):
    p = jax.nn.softmax(logits)
    chance = jnp.zeros(batch.num_sequences).at[:6].set((p[:, None] * verdicts).ravel())
    now = batch.replace(weights=chance, columns={"chance": chance}, behaviour_logprobs=spread(logits))
    found = credit([advantages.target_confidence, functools.partial(
        advantages.center_by_group, weight="chance")])(now, now.rewards, {})
    now = now.with_signals(advantages=OTHERS * found.values, **found.signals)

    def loss(logits):
      return objective(ModelOutputs(logprobs=spread(logits)), now, loss_weights(now, "sequence_sum") * 6,
                       mean_weights(now))[0]
    return logits - rate * jax.grad(loss)(logits), p
  return jax.lax.scan(step, jnp.zeros(3), length=steps)[1]


def closed_form(beta, *, steps=1500, rate=0.2, floor=0.05):
  """The same by the expected gradient in float64."""
  z, chances = np.zeros(3), []
  for _ in range(steps):
    p = np.exp(z - z.max())
    p /= p.sum()
    doubt = np.maximum(1 - p, floor)
    weight = OTHERS * (RIGHT - p @ RIGHT) / doubt + beta * (RIGHT - (1 - RIGHT) * p / doubt)
    chances.append(p)
    z += rate * p * (weight - p @ weight)
  return np.array(chances)


def test_a_bandit_is_the_better_calibrated_the_larger_beta():
  """Its mean confidence nears its accuracy, at a small cost in accuracy."""
  confidence, accuracy = [], []
  for beta in (0.0, 0.1, 0.3, 1.0):
    found = np.asarray(bandit(beta), np.float64)
    np.testing.assert_allclose(found, closed_form(beta), atol=1e-3)
    confidence.append(found[-1] @ found[-1])
    accuracy.append(found[-1] @ RIGHT)
  gaps = np.abs(np.subtract(confidence, accuracy))
  assert (np.diff(gaps) < 0).all() and (np.diff(accuracy) < 0).all()
  np.testing.assert_allclose(confidence, [0.99, 0.87, 0.71, 0.59], atol=0.015)
  np.testing.assert_allclose(accuracy, [0.698, 0.685, 0.664, 0.642], atol=0.003)


def test_the_config_builds_and_advantages_of_tokens_are_refused():
  config = configs.to_dict(configs.load("configs/methods/c2gspg.py"))
  term = compose.build(config["objective"][0], objectives)
  assert compose.is_whole(term) and config["aggregation"]["kind"] == "sequence_mean"
  for floor in (0.0, 1.0):
    with pytest.raises(ValueError, match="floor"):
      objectives.confident_policy_gradient(None, None, floor=floor)


def test_confidence_in_the_log_is_that_of_the_term_and_is_held_against_verdicts():
  logprobs = [[-0.1, -0.3], [-2.0], [-0.05, -0.05, -0.05], [-0.01], [0.0]]
  batch = [Trajectory([1] * (len(x) + 1), [False] + [True] * len(x), [0.0, *x], reward=r, scored=i != 3)
           for i, (x, r) in enumerate(zip(logprobs, (1.0, 0.0, 0.0, 0.0, 1.0)))]
  step = edits.Step(batch, {}, 0, {}, {})
  assert rollouts.log_confidence(step) == batch
  c, right = np.exp([-0.2, -2.0, -0.05, 0.0]), np.array([1, 0, 0, 1])  # the fourth is not scored
  assert step.metrics["mean_confidence"] == pytest.approx(c.mean())
  assert step.metrics["brier"] == pytest.approx(((c - right) ** 2).mean())
  # Bins of a tenth hold 0.82, 0.14, and 0.95 and 1 together.
  gaps = abs(c[0] - 1), c[1], abs(c[2] + c[3] - 1)
  assert step.metrics["ece"] == pytest.approx(sum(gaps) / 4)
