"""CBS: advantages before choosing, replay, the delayed target, the network, and regret on a bandit."""

import copy

import numpy as np
import pytest

from jaxrl import advantages
from jaxrl import config as configs
from jaxrl.batch import Trajectory, pack
from jaxrl.rollouts import edits
from jaxrl.rollouts import replay
from jaxrl.rollouts.replay import choose_rollouts


def group_of(rewards, group, *, seed=0, scored=None):
  rng = np.random.default_rng([seed, group])
  made = []
  for i, r in enumerate(rewards):
    n = int(rng.integers(1, 5))
    made.append(Trajectory(rng.integers(0, 9, n + 2), [False, False] + [True] * n,
                           [0, 0, *(-rng.exponential(1.0, n))], group=group, reward=float(r),
                           scored=scored is None or scored[i], task_id=f"{seed}-{group}",
                           prompt_length=2, finish="stop"))
  return made


def play(memory, index, trajectories, **options):
  step = edits.Step(trajectories, {}, index, memory, {})
  return choose_rollouts(step, **options), step.metrics


def test_advantages_are_those_of_the_whole_group_and_only_scored_ones_are_chosen():
  rewards = [1, 0, 0, 1, 1]
  made = group_of(rewards, 0, scored=[True, True, True, True, False])
  found, _ = play({}, 0, made, share=0.5, buffer=0)
  assert len(found) == 2 and all(t.scored for t in found)
  mine = np.array(rewards[:4], float)
  expected = (mine - mine.mean()) / (mine.std(ddof=1) + 1e-4)
  for t in found:
    at = next(i for i, m in enumerate(made) if m.tokens is t.tokens)
    assert t.columns["advantage"] == pytest.approx(expected[at])
  batch = pack(found, row_length=8)
  values = advantages.stored_advantages(batch, batch.rewards)
  np.testing.assert_allclose(np.asarray(values)[:2], [t.columns["advantage"] for t in found])
  with pytest.raises(ValueError, match="choose_rollouts"):
    advantages.stored_advantages(batch.replace(columns={}), batch.rewards)


def test_replayed_rollouts_keep_what_they_had_and_leave_first_in_first_out():
  memory, batches = {}, [group_of([1, 0, 1, 0], 0, seed=s) for s in range(5)]
  ages = set()
  for index, made in enumerate(batches):
    found, metrics = play(memory, index, made, count=4, buffer=2, rule="random")
    for t in found:
      age = index - int(t.task_id.split("-")[0])
      ages.add(age)
      original = next(m for m in batches[index - age] if (m.tokens.shape == t.tokens.shape and (
          m.tokens == t.tokens).all() and (m.behaviour_logprobs == t.behaviour_logprobs).all()))
      assert t.reward == original.reward
      assert t.columns["advantage"] == pytest.approx((original.reward - 0.5) / (3 ** -0.5 + 1e-4))
      assert age == 0 or t.group < 0
    assert {c["index"] for c in memory[replay.MEMORY]["store"]} <= {index, index - 1}
  assert ages == {0, 1, 2} and 0 < metrics["replayed"] < 1
  assert len({t.group for t in found if t.group < 0}) == sum(t.group < 0 for t in found)


@pytest.mark.parametrize("rule", ["advantage", "random", "bandit"])
def test_half_of_all_candidates_are_chosen_remembered_ones_included(rule):
  memory = {}
  for index, expected in enumerate((4, 8, 12, 12)):  # of 8, 16, 24 and 24 candidates
    found, _ = play(memory, index, group_of([1, 0, 1, 0, 0, 0, 1, 0], 0, seed=index), buffer=2, rule=rule)
    assert len(found) == len({id(t.tokens) for t in found}) == expected


def test_groups_may_lie_among_one_another():
  a, b = group_of([1, 0, 0], 0), group_of([1, 1, 0], 1)
  found, _ = play({}, 0, [t for pair in zip(a, b) for t in pair], share=1.0, explore=0.0)
  for t in found:
    mean = (1 / 3, 2 / 3)[t.group]
    assert t.columns["advantage"] == pytest.approx((t.reward - mean) / (3 ** -0.5 + 1e-4))


def test_a_buffer_counts_batches_where_each_has_several_updates():
  memory, ages = {}, set()
  for batch in range(5):
    found, _ = play(memory, 4 * batch, group_of([1, 0, 1, 0], 0, seed=batch), count=12, buffer=2)
    ages |= {batch - int(t.task_id.split("-")[0]) for t in found}
  assert ages == {0, 1, 2}


def test_replayed_rollouts_keep_their_columns_signals_and_weights():
  memory = {}
  for index in range(2):
    made = group_of([1, 0, 1, 0], 0, seed=index)
    for t in made:
      t.columns, t.weight = {"mode": float(index + 1)}, index + 0.5
      t.signals = {"hint": np.full(len(t.tokens), index + 7.0, np.float32)}
    found, _ = play(memory, index, made, count=8)
  assert len(found) == 8
  for t in found:
    index = int(t.task_id.split("-")[0])
    assert t.columns["mode"] == index + 1 and t.weight == index + 0.5
    assert (t.signals["hint"] == index + 7).all()
  pack(found, row_length=16)


def test_the_target_comes_one_update_later():
  memory = {}
  options = dict(buffer=0, smoothing=0.5, entropy_weight=0.1, entropy_floor=0.3)
  batches = [group_of(r, 0, seed=s) for s, r in enumerate(([0, 0, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]))]
  surprises = [-sum(t.behaviour_logprobs.sum() for t in b) / sum(t.loss_mask.sum() for t in b)
               for b in batches]
  _, metrics = play(memory, 0, batches[0], **options)
  assert "bandit_target" not in metrics
  value, past = 0.25, surprises[0]
  for index, reward in ((1, 0.75), (2, 0.25)):
    _, metrics = play(memory, index, batches[index], **options)
    new = 0.5 * value + 0.5 * reward
    above = past > 0.3 * surprises[0]
    assert metrics["bandit_target"] == pytest.approx(
        new - value - 0.1 * above * (surprises[index] - past))
    value, past = new, surprises[index]
  assert len(memory[replay.MEMORY]["past"]) == 2


def test_the_network_s_gradient_is_that_of_finite_differences():
  rng = np.random.default_rng(0)
  memory = {"network": replay._network(rng, 5), "adam": 0,
            "past": [dict(contexts=rng.normal(size=(6, len(replay.FEATURES))), rho=0.7)]}
  before = copy.deepcopy(memory["network"])
  x = memory["past"][0]["contexts"]

  def loss(network):
    return np.mean((replay.predict(network, x) - 0.7) ** 2)
  assert replay.fit(memory, 1e-3, 1) == pytest.approx(loss(before))
  for name in ("w1", "b1", "w2", "b2"):
    found = memory["network"][f"m_{name}"] / 0.1
    for index in np.ndindex(before[name].shape):
      ends = []
      for sign in (1, -1):
        moved = copy.deepcopy(before)
        moved[name] = np.array(moved[name])
        moved[name][index] += sign * 1e-5
        ends.append(loss(moved))
      assert found[index] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-7)
  for _ in range(300):
    replay.fit(memory, 1e-2, 1)
  assert loss(memory["network"]) < 1e-4


def test_on_a_bandit_it_learns_what_pays():
  """Sets are worth the mean of a feature that the network has to find; regret falls below random's."""
  rng = np.random.default_rng(1)
  memory = {"network": replay._network(rng, 16), "adam": 0, "past": []}
  regrets = []
  for index in range(150):
    contexts = rng.normal(size=(30, len(replay.FEATURES)))
    worth = 0.5 * contexts[:, 5] - 0.3 * contexts[:, 6]
    chosen = replay._choose(memory, [None] * 30, contexts, 8, "bandit", 0.1, rng)
    best = np.sort(worth)[-8:].mean()
    regrets.append(best - worth[chosen].mean())
    rho = worth[chosen].mean() + 0.1 * rng.normal()
    memory["past"] = [*memory["past"], dict(contexts=contexts[chosen], rho=rho)][-20:]
    replay.fit(memory, 1e-2, 8)
  random = 0.75  # what a random set loses here
  assert np.mean(regrets[:5]) > 0.4 and np.mean(regrets[-50:]) < 0.6 * random


def regrets(rule, seed, updates=300):
  """What each set of 8 among 30 lost, with the settings of `choose_rollouts`; worth is a little bent."""
  rng = np.random.default_rng(seed)
  memory = {"network": replay._network(rng, 64), "adam": 0, "past": []}
  found = []
  for _ in range(updates):
    contexts = rng.normal(size=(30, len(replay.FEATURES)))
    worth = 0.5 * contexts[:, 5] - 0.3 * contexts[:, 6] + 0.3 * np.tanh(contexts[:, 0])
    chosen = replay._choose(memory, [None] * 30, contexts, 8, rule, 0.1, rng)
    found.append(np.sort(worth)[-8:].mean() - worth[chosen].mean())
    if rule == "bandit":
      rho = worth[chosen].mean() + 0.1 * rng.normal()
      memory["past"] = [*memory["past"], dict(contexts=contexts[chosen], rho=rho)][-20:]
      replay.fit(memory, 1e-3, 4)
  return np.array(found)


def test_cumulative_regret_grows_with_an_exponent_below_1():
  """While it learns: what is explored at random, a constant share, keeps a linear part in the end."""
  def exponent(each):
    total, at = np.cumsum(np.mean(each, axis=0)), np.arange(1, len(each[0]) + 1)
    return np.polyfit(np.log(at[9:]), np.log(total[9:]), 1)[0], total[-1]
  learned, regret = exponent([regrets("bandit", seed) for seed in range(3)])
  blind, of_random = exponent([regrets("random", seed) for seed in range(3)])
  assert blind == pytest.approx(1, abs=0.03)
  assert learned < 0.93 and regret < 0.6 * of_random


@pytest.mark.parametrize("rule", ["advantage", "random", "bandit"])
def test_other_rules(rule):
  made = group_of([1, 0, 0, 0, 0, 0], 0)
  found, _ = play({}, 0, made, rule=rule, share=1 / 3, explore=0.0)
  assert len(found) == 2
  if rule == "advantage":
    assert 1.0 in {t.reward for t in found}


def test_the_same_update_chooses_the_same_and_nothing_scored_is_passed_on():
  memory = {}
  play(memory, 0, group_of([1, 0, 1, 0], 0))
  a, b = (play(copy.deepcopy(memory), 1, group_of([1, 0, 0, 0], 0, seed=1)) for _ in range(2))
  assert [t.tokens.tolist() for t in a[0]] == [t.tokens.tolist() for t in b[0]]
  found, _ = play({}, 0, group_of([1, 0], 0, scored=[False, False]))
  assert len(found) == 2 and not any(t.scored for t in found)


@pytest.mark.parametrize("options, message", [
    (dict(rule="best"), "rule='best'"), (dict(share=0.0), "share=0.0"), (dict(window=0), "window=0"),
    (dict(explore=2.0), "explore=2.0"), (dict(buffer=-1), "buffer=-1")])
def test_bad_settings_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    play({}, 0, group_of([1, 0], 0), **options)


def test_the_config():
  config = configs.load("configs/methods/contextual_rollout_bandits.py")
  assert [a["name"] for a in config.advantage] == ["stored_advantages"]
