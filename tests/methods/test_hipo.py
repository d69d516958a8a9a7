"""HiPO: modes told apart, the bonus and its window, two advantages against loops over groups."""

import fractions
import functools
import re

import jax
import numpy as np
import pytest

from jaxrl import advantages, compose, rewards, rollouts
from jaxrl import config as configs
from jaxrl.advantages.chain import chain, credit
from jaxrl.batch import Task, Trajectory, pack
from jaxrl.tasks import scratchpad_addition

CONFIG = "configs/methods/hipo.py"
NONE, ON, OFF = 0, 1, 2


def batch_of(modes, values, groups=None, scored=None, decided=2, length=5):
  """One sequence for each mode and reward: a prompt, `decided` tokens of decision, and the rest."""
  groups = [0] * len(modes) if groups is None else groups
  scored = [True] * len(modes) if scored is None else scored
  tags = [0] + [1] * decided + [2] * (length - 1 - decided)
  return pack([Trajectory(
      tokens=np.arange(length), loss_mask=np.arange(length) > 0, tag_ids=tags, reward=value,
      group=g, scored=s, columns={"mode": float(m)})
      for m, value, g, s in zip(modes, values, groups, scored)], row_length=16)


def random_batch(seed):
  """Ragged groups: modes of one answer or none, equal rewards, unscored and undecided answers."""
  rng = np.random.default_rng(seed)
  trajectories = []
  for g in range(6):
    for _ in range(int(rng.integers(1, 9))):
      length = int(rng.integers(2, 10))
      start = int(rng.integers(1, length))
      cut = int(rng.integers(start, length + 1))
      mode = int(rng.choice([NONE, ON, OFF], p=[0.15, 0.45, 0.4]))
      reward = 1.0 if g == 0 else float(rng.choice([0, 0.2, 1, 1.2]))
      index = np.arange(length)
      trajectories.append(Trajectory(
          tokens=rng.integers(0, 9, length), loss_mask=index >= start,
          tag_ids=np.where(index < start, 0, np.where(index < cut, 1, 2)), reward=reward, group=g,
          scored=bool(rng.random() < 0.85), columns={"mode": float(mode)}))
  return pack(trajectories, row_length=16, rows_multiple=4)


def members(batch, group, mode=None):
  return [i for i in np.nonzero(batch.sequence_mask)[0] if batch.group_ids[i] == group
          and mode in (None, batch.columns["mode"][i])]


def bonus_rule(batch, omega):
  """The adjusted rewards by exact fractions of the rewards' decimals."""
  exact = [fractions.Fraction(str(round(float(r), 6))) for r in batch.rewards]
  found = list(exact)
  for g in set(batch.group_ids[batch.sequence_mask]):
    on, off = members(batch, g, ON), members(batch, g, OFF)
    if on and off:
      mean_on, mean_off = (sum(exact[i] for i in part) / len(part) for part in (on, off))
      bonus = omega * mean_on
      if 0 <= mean_on - mean_off <= bonus:
        for i in off:
          found[i] += bonus
  return np.array([float(r) for r in found])


def two_advantages(batch, values, gamma):
  """Advantage of every token by a loop over sequences, in float64."""
  values = np.asarray(values, np.float64)
  found = np.zeros(batch.tokens.shape)
  for i in np.nonzero(batch.sequence_mask)[0]:
    whole = values[members(batch, batch.group_ids[i])]
    mode = values[members(batch, batch.group_ids[i], batch.columns["mode"][i])]

    def over(x, part):
      spread = part.std(ddof=1) if len(part) > 1 else 0.0
      return x / (spread + 1e-4) if spread > 1e-7 else 0.0
    judge = over((mode.mean() - whole.mean()) + gamma * (values[i] - whole.mean()), whole)
    answer = over(values[i] - mode.mean(), mode)
    at = (batch.sequence_ids == i) & batch.loss_mask
    found[at & (batch.tag_ids == 1)] = judge
    found[at & (batch.tag_ids != 1)] = answer
  return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("omega", [0.0, 0.3])
def test_both_pieces_agree_with_loops_over_groups(seed, omega):
  batch = random_batch(seed)
  found = jax.jit(functools.partial(advantages.favour_direct_mode, omega=omega))(
      batch, batch.rewards)
  expected = bonus_rule(batch, fractions.Fraction(str(omega)))
  np.testing.assert_allclose(np.asarray(found.values)[batch.sequence_mask],
                             expected[batch.sequence_mask], rtol=1e-5)
  compare = jax.jit(functools.partial(advantages.compare_modes, gamma=0.4))
  np.testing.assert_allclose(compare(batch, found.values), two_advantages(batch, expected, 0.4),
                             rtol=2e-3, atol=2e-5)


def test_a_mode_of_equal_rewards_is_judged_by_its_decision_alone():
  batch = batch_of([ON, ON, OFF, OFF], [1.2, 1.2, 0.0, 1.2])
  values = np.asarray(advantages.compare_modes(batch, batch.rewards, gamma=0.0))
  decision, rest = (np.unique(values[(batch.tag_ids == tag) & (batch.sequence_ids < 2)
                                     & (batch.sequence_ids >= 0)]) for tag in (1, 2))
  spread = np.std([1.2, 1.2, 0.0, 1.2], ddof=1)
  assert rest.tolist() == [0.0]
  np.testing.assert_allclose(decision, [(1.2 - 0.9) / (spread + 1e-4)], rtol=1e-5)
  direct = np.unique(values[(batch.tag_ids == 2) & (batch.sequence_ids >= 2)])
  np.testing.assert_allclose(direct, np.array([-0.6, 0.6]) / (np.std([0, 1.2], ddof=1) + 1e-4),
                             rtol=1e-5)


def decision_of(batch, mode, gamma=0.0):
  """The advantage of the decision for a mode."""
  values = np.asarray(advantages.compare_modes(batch, batch.rewards, gamma=gamma))
  first = np.nonzero(batch.columns["mode"] == mode)[0][0]
  return values[(batch.tag_ids == 1) & (batch.sequence_ids == first)][0]


def test_swapping_the_modes_flips_the_sign_of_each():
  rewards_ = [1.0, 0.25, 0.5, 0.0, 0.75, 0.25]
  one = batch_of([ON] * 3 + [OFF] * 3, rewards_)
  other = batch_of([OFF] * 3 + [ON] * 3, rewards_)
  assert decision_of(one, ON) > 0
  for mode in (ON, OFF):
    assert decision_of(one, mode) == pytest.approx(-decision_of(other, mode), rel=1e-6)


def test_one_mode_with_gamma_1_is_grpo():
  rng = np.random.default_rng(0)
  batch = batch_of([ON] * 12, rng.normal(size=12), groups=rng.integers(0, 3, 12))
  expected = chain([advantages.center_by_group, advantages.scale_by_group_std])(
      batch, batch.rewards)
  np.testing.assert_allclose(advantages.compare_modes(batch, batch.rewards, gamma=1.0), expected,
                             rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on,off,applies", [
    (1.0, 1.0, True), (1.0, 0.95, True), (1.0, 0.89, False), (0.9, 1.0, False), (0.0, 0.0, True)])
def test_the_bonus_is_given_inside_its_window_only(on, off, applies):
  batch = batch_of([ON, OFF, NONE], [on, off, 5.0])
  found = advantages.favour_direct_mode(batch, batch.rewards, omega=0.1)
  bonus = 0.1 * on if applies else 0.0
  np.testing.assert_allclose(found.values[:3], [on, off + bonus, 5.0], rtol=1e-6)
  assert float(found.metrics["direct_favoured"]) == applies


def test_a_group_without_one_of_the_modes_gets_no_bonus():
  for modes in ([ON, ON], [OFF, OFF], [NONE, OFF], [ON, NONE]):
    batch = batch_of(modes, [1.0, 1.0])
    found = advantages.favour_direct_mode(batch, batch.rewards, omega=0.5)
    np.testing.assert_array_equal(found.values, batch.rewards)
  unscored = batch_of([ON, OFF, OFF], [1.0, 1.0, 1.0], scored=[False, True, True])
  found = advantages.favour_direct_mode(unscored, unscored.rewards, omega=0.5)
  np.testing.assert_array_equal(found.values, unscored.rewards)


@pytest.mark.parametrize("omega", [0.0, 0.1, 0.25])
def test_the_preferred_mode_changes_where_the_gain_is_a_share_of_omega(omega):
  pieces = [functools.partial(advantages.favour_direct_mode, omega=omega),
            functools.partial(advantages.compare_modes, gamma=0.0)]
  for p_on in (0.2, 0.5, 0.9):
    for share in (0.02, 0.08, 0.12, 0.2, 0.3, 0.6):
      batch = batch_of([ON, OFF, OFF], [p_on, p_on * (1 - share), p_on * (1 - share)])
      values = np.asarray(chain(pieces)(batch, batch.rewards))
      by_mode = [values[(batch.tag_ids == 1) & (batch.sequence_ids == i)][0] for i in (0, 1)]
      assert (by_mode[1] > by_mode[0]) == (share < omega), (p_on, share)


def test_exact_ascent_of_the_decision_thinks_only_where_that_pays():
  """A bandit: the probability of each mode is a logit for easy and for hard problems."""
  p = {"easy": (1.0, 0.99), "hard": (0.9, 0.3)}
  for omega, easy_thinks in ((0.0, True), (0.05, False)):
    for kind, (on, off) in p.items():
      batch = batch_of([ON, OFF], [on, off])
      values = np.asarray(chain([functools.partial(advantages.favour_direct_mode, omega=omega),
                                 advantages.compare_modes])(batch, batch.rewards))
      credit_of = [values[(batch.tag_ids == 1) & (batch.sequence_ids == i)][0] for i in (0, 1)]
      logit = 0.0
      for _ in range(200):
        q = 1 / (1 + np.exp(-logit))
        logit += 0.5 * q * (1 - q) * (credit_of[0] - credit_of[1])
      thinks = 1 / (1 + np.exp(-logit)) > 0.5
      assert thinks == (kind == "hard" or easy_thinks)


def test_metrics_are_rates_and_lengths_by_mode():
  batch = pack([Trajectory(np.arange(n), np.arange(n) > 0, columns={"mode": m}, scored=s)
                for n, m, s in ((7, 1.0, True), (3, 2.0, True), (5, 2.0, True), (9, 1.0, False),
                                (4, 0.0, True))], row_length=16)
  metrics = credit([advantages.favour_direct_mode, advantages.compare_modes])(
      batch, batch.rewards, {}).metrics
  assert float(metrics["thinking_rate"]) == 0.25
  assert float(metrics["thinking_tokens"]) == 6 and float(metrics["direct_tokens"]) == 3


def test_without_modes_a_batch_is_refused():
  batch = pack([Trajectory([1, 2], [False, True])])
  for piece in (advantages.favour_direct_mode, advantages.compare_modes):
    with pytest.raises(ValueError, match="answer_in_mode"):
      piece(batch, batch.rewards)


def test_the_first_marker_of_an_answer_is_its_mode(play):
  def table(text):
    return {"x": 0.4, "+": 0.2, "=": 0.2, "-": 0.1, "$": 0.1}
  episode = functools.partial(rollouts.answer_in_mode, samples=32, on="+-", off="=")
  played = play(episode, table, lambda text: 1.0, tasks=10)
  seen = set()
  for t in played.trajectories:
    body = "".join(map(chr, t.tokens[2:]))
    match = re.match(r".*?(\+-|=)", body)
    mode = {None: NONE, "+-": ON, "=": OFF}[match and match[1]]
    head = match.end() if match else len(body)
    assert t.columns == {"mode": mode}
    assert t.tag_ids.tolist() == [0, 0] + [1] * head + [2] * (len(body) - head)
    assert t.loss_mask.tolist() == [False] * 2 + [True] * len(body)
    seen.add(mode)
  assert seen == {NONE, ON, OFF}


@pytest.mark.parametrize("on,off", [("", "="), ("=", "=-"), ("+", "+")])
def test_markers_that_do_not_tell_modes_apart_are_refused(play, on, off):
  with pytest.raises(RuntimeError, match="do not tell modes apart"):
    play(functools.partial(rollouts.answer_in_mode, samples=2, on=on, off=off),
         lambda text: {"x": 1.0}, lambda text: 0.0)


def test_the_task_writes_sums_of_all_lengths_with_and_without_a_scratchpad():
  rng = np.random.default_rng(0)
  rows = [scratchpad_addition.sample(rng) for _ in range(600)]
  thoughts = 0
  for row in rows:
    a, b = map(int, row["question"].removesuffix("=").split("+"))
    assert row["answer"] == str(a + b) and scratchpad_addition.check(row, row["solution"])
    assert row["solution"] in (f"={a + b}", f"+{str(a + b)[::-1]}={a + b}")
    assert scratchpad_addition.check(row, f"+={a + b}")
    assert not scratchpad_addition.check(row, f"={a + b + 1}")
    assert not scratchpad_addition.check(row, row["answer"])
    thoughts += row["solution"].startswith("+")
  assert 240 < thoughts < 360
  assert {len(row["question"].split("+")[0]) for row in rows} == {1, 2, 3}
  assert not any(scratchpad_addition.sample(rng, scratchpad=0.0)["solution"].startswith("+")
                 for _ in range(50))
  with pytest.raises(ValueError, match="scratchpad=2"):
    scratchpad_addition.sample(rng, scratchpad=2)


@pytest.mark.parametrize("text,reward", [
    ("=579", 1.2), ("+975=579", 1.2), ("+=579", 1.0), ("=578", 0.2), ("579", 0.0), ("+975", 0.0)])
def test_the_reward_is_the_answer_and_a_fifth_for_the_form(text, reward):
  config = configs.load(CONFIG)
  scorer = rewards.Scorer([dict(c) for c in configs.to_dict(config.reward.criteria)],
                          configs.to_dict(config.reward.aggregate), workers=0)
  t = Trajectory([1, 2], [False, True], text=text)
  found, = scorer.score([(Task(id="q", prompt=[1], answer="579"), t)])
  assert found.scored and found.reward == pytest.approx(reward)


def test_the_config_builds():
  config = configs.load(CONFIG)
  built = [compose.build(dict(a), advantages) for a in config.advantage]
  chain(built)
  episode = compose.build(configs.to_dict(config.rollout.episode), rollouts)
  assert compose.supplied_by(episode) == ((), ("mode",))
  assert config.rollout.max_tokens >= len("+8991=1998") + 1
