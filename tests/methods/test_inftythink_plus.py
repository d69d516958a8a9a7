"""InftyThink+: rounds, rewards of whole trajectories, and statistics that count trajectories."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages
from jaxrl import compose
from jaxrl import config as configs
from jaxrl import rollouts
from jaxrl.batch import Task, Trajectory, pack
from jaxrl.rewards import Criterion, Scored
from jaxrl.rollouts import Rollouts
from jaxrl.sampling import Sample, SamplingParams
from jaxrl.tasks import running_sum


class Script:
  """Completions by context; "?" at the end of a text stands for a sample that was cut off."""

  labels, has_workers = ["right"], False

  def __init__(self, first, later):
    self.first, self.later, self.contexts = first, later, []

  def sample(self, params, requests, base_key, *, on_done=None):
    return [[self._one(r, i) for i in range(r.n)] for r in requests]

  def _one(self, request, i):
    context = self.decode(request.prompt)
    self.contexts.append(context)
    text = self.first[i] if context == "q" else self.later[context]
    finish = "length" if text.endswith("?") else "stop"
    tokens = np.array(self.encode(text.removesuffix("?")), np.int32)
    return Sample(tokens, np.full(len(tokens), -0.5, np.float32), finish)

  def score(self, pairs, *, among=0):
    return [Scored(float(t.text.endswith("=7")), "x" not in t.text,
                   {"right": Criterion(float(t.text.endswith("=7")))}) for _, t in pairs]

  def encode(self, text):
    return list(map(ord, text))

  def decode(self, tokens):
    return "".join(map(chr, tokens))


def play(first, later=None, *, rounds=5, **options):
  script = Script(first, later or {})
  episode = functools.partial(rollouts.summarised_rounds, samples=len(first), rounds=rounds,
                              summary=r"\+(\w+)$", conclusion=r"=\w$", **options)
  made = Rollouts(episode, script, script, script, sampling=SamplingParams(max_tokens=20),
                  templates={"continue": "<{summary}>"}, max_failure_rate=0.0)
  return made.run({"params": None}, [Task("t", script.encode("q"), question="q", answer="7")],
                  base_key=None), script


LATER = {"q<a>": "bb+b", "q<b>": "c=7", "q<c>": "d=8"}


def test_rounds_see_the_last_summary_and_nothing_else():
  found, script = play(["aa+a", "z=7", "cc+c"], LATER)
  assert script.contexts == ["q"] * 3 + ["q<a>", "q<c>", "q<b>"]
  assert [t.text for t in found] == ["aa+a", "bb+b", "c=7", "z=7", "cc+c", "d=8"]
  assert [t.reward for t in found] == [1, 1, 1, 1, 0, 0]
  assert [t.columns["share"] for t in found] == [1 / 3] * 3 + [1] + [1 / 2] * 2
  for t in found:  # each round is trained on given its own prompt
    assert t.loss_mask.sum() == len(t.text) and t.group == found[0].group
    assert t.prompt_length in (1, 4)
  assert [t.evidence["rounds"].score for t in found if "rounds" in t.evidence] == [3, 1, 2]
  assert [t.evidence["handed_on"].score for t in found if "handed_on" in t.evidence] == [1, 1, 0]


@pytest.mark.parametrize("efficiency, expected", [
    ("none", [1, 1, 1, 1, 1]), ("product", [1, 0.96, 0.84, 0.64, 0.36]),
    ("sum", [2, 1.96, 1.84, 1.64, 1.36])])
def test_rewards_of_right_answers_after_one_to_five_rounds(efficiency, expected):
  texts = ["a+1", "a+2", "a+3", "a+4"]
  for n, reward in enumerate(expected, start=1):
    later = {f"q<{j}>": "z=7" if j == n - 1 else texts[j] for j in range(1, n)}
    found, _ = play(["z=7" if n == 1 else texts[0]], later, efficiency=efficiency)
    assert len(found) == n and [t.reward for t in found] == pytest.approx([reward] * n)


def test_a_product_gives_wrong_answers_nothing_and_a_sum_pays_for_haste():
  assert play(["z=8"], efficiency="product")[0][0].reward == 0
  assert play(["z=8"], efficiency="sum")[0][0].reward == 1


@pytest.mark.parametrize("efficiency", ["product", "sum"])
def test_whether_three_rounds_pay_for_a_better_chance(efficiency):
  """Right at once with chance p1, or after three rounds with p3: a product goes on where
  0.84 p3 > p1, a sum where p3 - p1 > 0.16 and so stops, wrongly, when both chances are low."""
  def reward(text, later=None):
    return play([text], later, efficiency=efficiency)[0][0].reward
  now = {True: reward("z=7"), False: reward("z=8")}
  late = {verdict: reward("aa+a", {"q<a>": "bb+b", "q<b>": f"c={7 if verdict else 8}"})
          for verdict in (True, False)}
  for p1, p3 in np.random.default_rng(0).random((400, 2)):
    stop, go_on = (p * r[True] + (1 - p) * r[False] for p, r in ((p1, now), (p3, late)))
    claim = 0.84 * p3 - p1 if efficiency == "product" else p3 - p1 - 0.16
    assert (go_on > stop) == (claim > 0)
  stop, go_on = (p * r[True] + (1 - p) * r[False] for p, r in ((0.05, now), (0.2, late)))
  assert (go_on > stop) == (efficiency == "product")


@pytest.mark.parametrize("first", ["nothing", "z=7?", "aa+a?", "", "z=77"])
def test_a_broken_round_ends_a_trajectory_with_0_that_stays_in_the_group(first):
  for efficiency in ("none", "product", "sum"):
    (only,), _ = play([first], LATER, efficiency=efficiency)
    assert only.reward == 0 and only.scored and only.evidence["concluded"].score == 0


def test_the_last_round_that_is_allowed_must_conclude():
  found, script = play(["aa+a"], LATER, rounds=2)
  assert [t.text for t in found] == ["aa+a", "bb+b"] and len(script.contexts) == 2
  assert [t.reward for t in found] == [0, 0]


def test_a_conclusion_goes_before_a_summary_and_an_unjudged_one_takes_all_rounds_out():
  episode_conclusion, _ = play(["a+b=7"], LATER)
  assert len(episode_conclusion) == 1 and episode_conclusion[0].reward == 1
  found, _ = play(["aa+e"], {"q<e>": "x=7"})
  assert [t.scored for t in found] == [False, False]


def test_without_credit_for_all_only_last_rounds_are_trained_on():
  found, _ = play(["aa+a", "z=7"], LATER, credit_all=False)
  assert [int(t.loss_mask.sum()) for t in found] == [0, 0, 3, 3]


def test_statistics_count_trajectories_and_not_rounds(rng=np.random.default_rng(3)):
  """Rewards that go with the number of rounds, where the two statistics differ."""
  rounds, rewards = [1, 3, 2, 5, 1, 1], [1.0, 0.0, 0.36, 0.0, 0.84, 0.5]
  trajectories, expected = [], []
  for group in (0, 1):
    own = slice(3 * group, 3 * group + 3)
    values = np.array(rewards[own], np.float64)
    normal = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    for n, reward, advantage in zip(rounds[own], rewards[own], normal):
      for _ in range(n):
        length = int(rng.integers(2, 9))
        mask = np.arange(length) > 0
        trajectories.append(Trajectory(np.ones(length), mask, group=group, reward=reward,
                                       columns={"share": 1 / n}))
        expected.append(advantage)
  trajectories.append(Trajectory([1, 1], [False, True], group=0, reward=9.0, scored=False,
                                 columns={"share": 0.5}))
  batch = pack(trajectories, row_length=16)
  centred = advantages.center_by_group(batch, jnp.asarray(batch.rewards), weight="share")
  found = advantages.scale_by_group_std(batch, centred, weight="share", epsilon=1e-6)
  np.testing.assert_allclose(found[:len(expected)], expected, rtol=2e-5, atol=1e-6)
  assert not np.any(found[len(expected):])
  plain = advantages.center_by_group(batch, jnp.asarray(batch.rewards))
  assert np.abs(np.asarray(plain[:len(expected)] - centred[:len(expected)])).max() > 0.05


def test_a_missing_column_is_named():
  batch = pack([Trajectory([1, 1], [False, True])], row_length=4)
  with pytest.raises(ValueError, match="center_by_group reads the column 'share'"):
    advantages.center_by_group(batch, jnp.asarray(batch.rewards), weight="share")


@pytest.mark.parametrize("options, message", [
    (dict(efficiency="ratio"), "efficiency='ratio'; valid are 'none'"), (dict(rounds=0), "rounds=0")])
def test_bad_settings_are_refused(options, message):
  with pytest.raises(rollouts.EpisodeFailure, match=message):
    play(["z=7"], **options)


def test_the_toy_carries_a_position_and_a_sum():
  for seed in range(300):
    row = running_sum.sample(np.random.default_rng(seed), resumed=0.5, piece=4)
    terms = row["terms"]
    question, *summaries = row["question"].replace("=", "= ").rstrip("+ ").split(" ")
    state = [s for s in "".join(summaries).split("+") if s]
    done = int(state[-1][0]) if state else 0
    assert question == "+".join(map(str, terms)) + "="
    for s in state:
      assert sum(terms[:int(s[0])]) % 10 == int(s[1])
    thought, _, end = row["solution"].partition("=" if "=" in row["solution"] else "++")
    assert [int(x) for x in thought] == [sum(terms[:j + 1]) % 10
                                         for j in range(done, done + len(thought))]
    if "=" in row["solution"]:
      assert int(end) == sum(terms) % 10 and running_sum.check(row, row["solution"])
    else:
      assert end == f"{done + len(thought)}{thought[-1]}"
      assert not running_sum.check(row, row["solution"])


def test_the_config_builds():
  config = configs.load("configs/methods/inftythink_plus.py")
  episode = compose.build(configs.to_dict(config.rollout.episode), rollouts)
  assert compose.supplied_by(episode) == ((), ("share",))
