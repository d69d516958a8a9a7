"""EMPG: advantages of steps against a loop over episodes in float64, and limits of each part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose
from jaxrl import config as configs
from jaxrl.advantages.chain import chain, credit
from jaxrl.batch import Trajectory, pack
from jaxrl.models.distributions import collision


def episodes(seed, count=9):
  """Trajectories of a few turns, observations between them, and their steps: [[token places]]."""
  rng = np.random.default_rng(seed)
  trajectories, steps = [], []
  for i in range(count):
    mask, turns, tags, mine = [False], [0], [0], []
    for turn in range(1 if i == 0 else int(rng.integers(0 if i == 1 else 1, 4))):
      for tag in (1, 2)[:int(rng.integers(1, 3))]:
        size = int(rng.integers(1, 4))
        mine.append([len(mask) + j for j in range(size)])
        mask += [True] * size
        turns += [2 * turn + 1] * size
        tags += [tag] * size
      gap = int(rng.integers(0, 3))  # what the environment says
      mask, turns, tags = mask + [False] * gap, turns + [2 * turn + 2] * gap, tags + [0] * gap
    length = len(mask)
    scored = i % 4 != 3
    trajectories.append(Trajectory(
        rng.integers(0, 9, length), mask, turn_ids=turns, tag_ids=tags, scored=scored,
        reward=float(rng.normal()), group=i % 2, signals={"entropy": rng.exponential(1.0, length)}))
    steps.append(mine if scored else [])
  return trajectories, steps


def turns_of(trajectory, steps):
  """The steps of a trajectory with those of one turn put together."""
  merged = {}
  for step in steps:
    merged.setdefault(int(trajectory.turn_ids[step[0]]), []).extend(step)
  return list(merged.values())


def packed(trajectories):
  return pack(trajectories, row_length=32, min_rows=8, min_sequences=16)


def expected(trajectories, steps, k, k_next, bonus):
  """The paper's equations, one step after the other; [advantages of the tokens of a trajectory]."""
  entropy = [[t.signals["entropy"][s].astype(np.float64).mean() for s in mine]
             for t, mine in zip(trajectories, steps)]
  everything = np.concatenate([e for e in entropy if e])
  low, high = everything.min(), everything.max()
  h = [[(e - low) / (high - low + 1e-8) for e in mine] for mine in entropy]
  mean_g = np.mean([np.exp(-k * x) for mine in h for x in mine])
  value = [[np.float64(t.reward) * np.exp(-k * x) / mean_g
            + (bonus * np.exp(-k_next * mine[j + 1]) if j + 1 < len(mine) else 0.0)
            for j, x in enumerate(mine)] for t, mine in zip(trajectories, h)]
  mean = np.mean([v for mine in value for v in mine])
  found = [np.zeros(len(t.tokens)) for t in trajectories]
  for array, mine, values in zip(found, steps, value):
    for places, v in zip(mine, values):
      array[places] = v - mean
  return found


def by_trajectory(batch, trajectories, per_token):
  per_token = np.asarray(per_token)
  return [per_token[batch.sequence_ids == i] for i in range(len(trajectories))]


@functools.partial(jax.jit, static_argnames="steps")
def modulated(batch, steps, **numbers):
  piece = functools.partial(advantages.modulate_by_entropy, steps=steps, **numbers)
  return credit([piece])(batch, batch.rewards, {})


def run(trajectories, *, steps="tag", k=1.0, k_next=1.0, bonus=0.1):
  batch = packed(trajectories)
  found = modulated(batch, steps, k=k, k_next=k_next, bonus=bonus)
  return by_trajectory(batch, trajectories, found.values), found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", ["turn", "tag", "token"])
def test_it_is_the_papers_algorithm_on_ragged_episodes(seed, steps):
  trajectories, tagged = episodes(seed)
  places = {"tag": tagged, "turn": [turns_of(*x) for x in zip(trajectories, tagged)],
            "token": [[[p] for s in mine for p in s] for mine in tagged]}[steps]
  arguments = dict(k=0.8, k_next=1.7, bonus=0.4)
  found, credited = run(trajectories, steps=steps, **arguments)
  for mine, wanted in zip(found, expected(trajectories, places, **arguments)):
    np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-5)
  assert int(credited.metrics["steps"]) == sum(map(len, places))


def test_the_mean_over_steps_is_zero_and_scales_average_to_one():
  trajectories, tagged = episodes(5)
  for t in trajectories:
    t.reward = 3.0
  found, _ = run(trajectories, k=2.0, bonus=0.0, steps="tag")
  of_steps = [mine[s[0]] for mine, steps in zip(found, tagged) for s in steps]  # 3 (g - 1)
  assert np.mean(of_steps) == pytest.approx(0, abs=1e-5) and np.std(of_steps) > 0.1
  entropy = [t.signals["entropy"][s].mean() for t, mine in zip(trajectories, tagged) for s in mine]
  g = np.array(of_steps) / 3 + 1
  assert g[np.argmax(entropy)] / g[np.argmin(entropy)] == pytest.approx(np.exp(-2.0), rel=1e-4)


def test_without_k_and_bonus_the_advantages_are_centred_over_steps():
  trajectories, tagged = episodes(6)
  found, _ = run(trajectories, k=0.0, bonus=0.0, steps="tag")
  mean = np.mean([t.reward for t, steps in zip(trajectories, tagged) for _ in steps])
  for t, mine, steps in zip(trajectories, found, tagged):
    for s in steps:
      np.testing.assert_allclose(mine[s], t.reward - mean, rtol=1e-5, atol=1e-6)


def test_shifted_and_stretched_entropies_say_the_same():
  trajectories, _ = episodes(7)
  before, _ = run(trajectories, steps="tag")
  for t in trajectories:
    t.signals["entropy"] = 3 * t.signals["entropy"] + 5
  for one, other in zip(before, run(trajectories, steps="tag")[0]):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_sure_steps_earn_and_lose_more_and_clear_ones_attract():
  def episode(reward, *entropies):
    length = 1 + len(entropies)
    return Trajectory([0] * length, [False] + [True] * (length - 1), reward=reward,
                      turn_ids=range(length), signals={"entropy": (9.0, *entropies)})
  right, wrong = run([episode(1.0, 0.1, 2.0), episode(-1.0, 0.1, 2.0)], bonus=0.0,
                     steps="turn")[0]
  assert right[1] > right[2] > 0 > wrong[2] > wrong[1]
  clear, unclear = run([episode(0.0, 1.0, 0.0), episode(0.0, 1.0, 2.0)], k=0.0, k_next=3.0,
                       bonus=1.0, steps="turn")[0]
  assert clear[1] - unclear[1] == pytest.approx(1 - np.exp(-3.0), rel=1e-4)
  assert clear[2] == pytest.approx(unclear[2])  # the last step has no next one


@pytest.mark.parametrize("k, k_next", [(1.0, 1.0), (0.5, 2.0)])
def test_a_large_bonus_pulls_into_a_dead_end_that_is_easy_to_predict(k, k_next):
  """A wrong first step leads to a forced one, the right one to a coin flip: entropies 0 and log 10. Wrong is
  preferred where bonus > (A_right - A_wrong) g / (1 - exp(-k')), g the scale of the first step."""
  def episode(reward, second):
    return Trajectory([0] * 3, [False, True, True], reward=reward, turn_ids=range(3),
                      signals={"entropy": (0.0, np.log(2), second)})
  made = [episode(1.0, np.log(10)), episode(-1.0, 0.0)]
  h = np.array([np.log(2) / np.log(10), 1, np.log(2) / np.log(10), 0])
  g = np.exp(-k * h[0]) / np.exp(-k * h).mean()
  edge = 2 * g / (1 - np.exp(-k_next))
  for bonus, pays in ((0.1, True), (0.95 * edge, True), (1.05 * edge, False)):
    right, wrong = run(made, steps="turn", k=k, k_next=k_next, bonus=bonus)[0]
    assert (right[1] > wrong[1]) == pays
    assert right[1] - wrong[1] == pytest.approx(2 * g - bonus * (1 - np.exp(-k_next)), rel=1e-4)


def test_equal_entropies_leave_the_outcome_alone():
  trajectories, tagged = episodes(8)
  for t in trajectories:
    t.signals["entropy"] = np.full(len(t.tokens), 0.3, np.float32)
  found, _ = run(trajectories, bonus=5.0, steps="tag")
  mean = np.mean([t.reward for t, steps in zip(trajectories, tagged) for _ in steps])
  for t, mine, steps in zip(trajectories, found, tagged):
    for s in steps:
      np.testing.assert_allclose(mine[s], t.reward - mean, rtol=1e-4, atol=1e-5)


def test_what_is_not_scored_says_nothing():
  trajectories, _ = episodes(9)
  alone = [t for t in trajectories if t.scored]
  spoiled = [t if t.scored else Trajectory(t.tokens, t.loss_mask, scored=False, reward=99.0,
                                           signals={"entropy": np.full(len(t.tokens), np.nan)})
             for t in trajectories]
  mine = [x for x, t in zip(run(spoiled)[0], trajectories) if t.scored]
  for one, other in zip(mine, run(alone)[0]):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
  nothing, _ = run([t for t in spoiled if not t.scored])
  assert not any(x.any() for x in nothing)


def test_the_mean_squared_score_is_what_two_draws_disagree_by():
  """The paper's motive: E |grad log pi(a)|^2 = 1 - sum pi^2, so sure steps have small gradients."""
  for scale in (0.1, 1.0, 4.0):
    z = jnp.float32(scale * np.random.default_rng(10).normal(size=12))
    scores = jax.jit(jax.jacobian(jax.nn.log_softmax))(z)
    found = jnp.sum(jax.nn.softmax(z) * jnp.sum(scores ** 2, axis=-1))
    assert float(found) == pytest.approx(1 - float(collision(z)), rel=1e-4, abs=1e-6)


def test_unknown_steps_are_refused():
  with pytest.raises(ValueError, match="steps='sentence'; valid are 'turn', 'tag' and 'token'"):
    run(episodes(0)[0], steps="sentence")


def test_the_config_builds():
  config = configs.load("configs/methods/empg.py")
  pieces = [compose.build(dict(p), advantages) for p in config.advantage]
  assert [compose.name_of(p) for p in pieces] == ["center_by_group", "scale_by_group_std",
                                                  "modulate_by_entropy"]
  batch = packed(episodes(0)[0])
  assert np.all(np.isfinite(jax.jit(chain(pieces))(batch, batch.rewards)))
