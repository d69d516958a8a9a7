"""RS-GRPO: the risk-seeking baseline against its equations in float64."""

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


@pytest.mark.parametrize("beta", [1.0, 2.0, 4.0])
def test_the_mass_on_right_answers_peaks_at_the_success_rate_of_the_paper(beta):
  n = 200
  mass = []
  for right in range(1, n):
    batch = batch_of([1.0] * right + [0.0] * (n - right), [0] * n)
    found = np.asarray(advantages.risk_seeking(batch, batch.rewards, beta=beta))[:n]
    mass.append(found[:right].sum() / n)
  assert (np.argmax(mass) + 1) / n == pytest.approx(1 / (1 + np.exp(beta / 2)), abs=0.006)


def test_equal_rewards_and_singletons_give_nothing():
  batch = batch_of([0.7, 0.7, 0.7, 0.2], [0, 0, 0, 1])
  found = np.asarray(advantages.risk_seeking(batch, batch.rewards, beta=2.0))
  np.testing.assert_allclose(found, 0, atol=1e-6)


def test_the_config_changes_the_advantage_alone():
  config = configs.load("configs/methods/rs_grpo.py")
  pieces = [compose.build(dict(piece), advantages) for piece in config.advantage]
  assert [compose.name_of(p) for p in pieces] == ["risk_seeking"]
