"""RS-GRPO: the risk-seeking baseline against its equations in float64, and the paper's bandit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose
from jaxrl import config as configs
from jaxrl.batch import Trajectory, pack


def batch_of(rewards, groups, scored=None):
  scored = np.ones(len(rewards), bool) if scored is None else scored
  return pack([Trajectory(tokens=[1, 2, 3], loss_mask=[False, True, True], reward=r, group=int(g),
                          scored=bool(s)) for r, g, s in zip(rewards, groups, scored)])


def direct(rewards, beta):
  rewards = np.asarray(rewards, np.float64)
  return (np.exp(beta * rewards) / np.mean(np.exp(beta * rewards)) - 1) / beta


@pytest.mark.parametrize("beta", [-3.0, 0.5, 2.0, 64.0])
def test_it_is_the_gradient_weight_of_exponential_utility_on_ragged_groups(beta):
  rng = np.random.default_rng(0)
  groups = np.repeat(np.arange(4), [5, 1, 3, 4])
  rewards, scored = rng.uniform(0, 1, len(groups)), rng.random(len(groups)) < 0.8
  batch = batch_of(rewards, groups, scored)
  found = np.asarray(advantages.risk_seeking(batch, batch.rewards, beta=beta))[:len(groups)]
  for g in range(4):
    mine = (groups == g) & scored
    if mine.any():
      np.testing.assert_allclose(found[mine], direct(rewards[mine], beta), rtol=1e-4, atol=1e-5)
      assert abs(found[mine].sum()) < 1e-3 * max(1.0, np.abs(found[mine]).max())
  assert not found[~scored].any()


def test_beta_0_is_the_mean_and_large_beta_the_maximum():
  rewards = [0.0, 0.25, 1.0, 0.5]
  batch = batch_of(rewards, [0] * 4)
  mean = np.asarray(advantages.risk_seeking(batch, batch.rewards, beta=0.0))[:4]
  np.testing.assert_allclose(mean, np.array(rewards) - np.mean(rewards), atol=1e-6)
  near = np.asarray(advantages.risk_seeking(batch, batch.rewards, beta=1e-3))[:4]
  np.testing.assert_allclose(near, mean, atol=1e-3)
  far = np.asarray(advantages.risk_seeking(batch, batch.rewards, beta=64.0))[:4]
  assert far[2] == pytest.approx(3 / 64, rel=1e-3) and (far[[0, 1, 3]] < 0).all()


@pytest.mark.parametrize("beta", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("right", [1, 3, 7])
def test_advantages_of_verdicts_in_closed_form(beta, right):
  """With k = exp(beta) - 1 and Z = 1 + k p: k (1 - p) / (beta Z) if right, else -k p / (beta Z)."""
  p, k = right / 8, np.expm1(beta)
  batch = batch_of([1.0] * right + [0.0] * (8 - right), [0] * 8)
  found = np.asarray(advantages.risk_seeking(batch, batch.rewards, beta=beta))[:8]
  expected = [k * (1 - p) / (beta * (1 + k * p))] * right + [-k * p / (beta * (1 + k * p))] * (8 - right)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("beta", [1.0, 2.0, 4.0])
def test_the_mass_on_right_answers_peaks_at_the_success_rate_of_the_paper(beta):
  n = 200
  batch = batch_of([0.0] * n, [0] * n)
  advantage = jax.jit(functools.partial(advantages.risk_seeking, beta=beta))
  mass = []
  for right in range(1, n):
    rewards = (np.arange(batch.num_sequences) < right).astype(np.float32)
    found = np.asarray(advantage(batch.replace(rewards=rewards), rewards))
    mass.append(found[:right].sum() / n)
  assert (np.argmax(mass) + 1) / n == pytest.approx(1 / (1 + np.exp(beta / 2)), abs=0.006)


def test_equal_rewards_and_singletons_give_nothing():
  batch = batch_of([0.7, 0.7, 0.7, 0.2], [0, 0, 0, 1])
  found = np.asarray(advantages.risk_seeking(batch, batch.rewards, beta=2.0))
  np.testing.assert_allclose(found, 0, atol=1e-6)


ARMS = np.arange(100)
WORTH = 0.1 + 0.9 * np.exp(-(ARMS - 40) ** 2 / 50) + 0.5 * np.exp(-(ARMS - 75) ** 2 / 50)
NARROW = np.log(np.exp(-(ARMS - 75) ** 2 / 50) + 0.1)  # the policy begins at the lower bump


@functools.cache
def bandit(beta, *, samples=2048, steps=750, rate=2.0):
  """Mean reward after each update, all samples of an update one group of the piece."""
  batch = pack([Trajectory([0, 1], [False, True])] * samples)

  def update(logits, key):
    p = jax.nn.softmax(logits)
    # Evenly spaced quantiles behind a random first one: each arm is drawn as often as p says, or once
    # more, which leaves little noise and no bias in the gradient.
    quantiles = (jnp.arange(samples) + jax.random.uniform(key)) / samples
    arms = jnp.minimum(jnp.searchsorted(jnp.cumsum(p), quantiles), 99)
    rewards = jnp.asarray(WORTH, jnp.float32)[arms]
    found = advantages.risk_seeking(batch.replace(rewards=rewards), rewards, beta=beta)
    push = jax.ops.segment_sum(found, arms, num_segments=100) - p * jnp.sum(found)
    return logits + rate * push / samples, p @ WORTH
  keys = jax.random.split(jax.random.key(0), steps)
  return np.asarray(jax.jit(functools.partial(jax.lax.scan, update))(jnp.float32(NARROW), keys)[1])


def exact_bandit(beta, *, steps=750, rate=2.0):
  """The same by the gradient of log(E[exp(beta * r)]) / beta over all arms, in float64."""
  logits, curve = NARROW.copy(), []
  for _ in range(steps):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    curve.append(p @ WORTH)
    utility = np.exp(beta * (WORTH - 1))
    slope = (utility / (p @ utility) - 1) / beta if beta else WORTH - p @ WORTH
    logits += rate * p * (slope - p @ slope)
  return np.array(curve)


@pytest.mark.parametrize("beta, end", [(0.0, 0.6), (2.0, 0.6), (4.0, 1.0), (8.0, 1.0), (16.0, 1.0)])
def test_a_bandit_of_100_arms_stays_at_the_lower_bump_unless_it_seeks_risk(beta, end):
  """As in the paper: 0 and 2 stay at the mode that they are near, 4 and above find the better one."""
  found, exact = bandit(beta), exact_bandit(beta)
  assert found[0] == pytest.approx(0.375, abs=1e-3)
  assert found[-1] == pytest.approx(end, abs=0.01)
  np.testing.assert_allclose(found, exact, atol=0.02)


def test_on_the_bandit_the_largest_beta_is_the_slowest_of_those_that_escape():
  after = {beta: bandit(beta)[250] for beta in (8.0, 64.0)}
  assert 0.6 < after[64.0] < 0.9 < 0.98 < after[8.0]


def test_the_config_changes_the_advantage_alone():
  config = configs.load("configs/methods/rs_grpo.py")
  pieces = [compose.build(dict(piece), advantages) for piece in config.advantage]
  assert [compose.name_of(p) for p in pieces] == ["risk_seeking"]
