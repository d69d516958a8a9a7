"""OPE: outlines see one another, paths only their own; rewards, turns, and the use of diversity."""

import collections
import functools
import math

import numpy as np
import pytest

from jaxrl import compose, rollouts
from jaxrl import config as configs
from jaxrl.batch import Task
from jaxrl.rollouts import Rollouts, engine
from jaxrl.sampling import SamplingParams

CONFIG = "configs/methods/ope.py"


def episode(outlines=2, sets=3, paths=4, outline_tokens=2, **options):
  return functools.partial(rollouts.outlines_then_paths, samples=paths * outlines,
                           outlines=outlines, sets=sets, outline_tokens=outline_tokens,
                           separator=";", **options)


def text_of(t):
  return "".join(map(chr, t.tokens)).split("?")[1]


def trained(t):
  return "".join(map(chr, t.tokens[t.loss_mask]))


def two_letters(text):
  """Outlines of two letters; a path of two more, or three."""
  body = text.split("?")[1]
  outline = body.split(";")[-1]
  if ";" in body or len(outline) < 2:
    return {"a": 0.5, "b": 0.3, "c": 0.2}
  if len(outline) < 4:
    return {"r": 0.6, "w": 0.4}
  return {"r": 0.3, "$": 0.7} if len(outline) == 4 else {"$": 1.0}


def right(text):
  return float(text.count("r") >= 2)


def requests_of(played):
  """Texts behind the question that were asked to be continued, by task."""
  found = collections.defaultdict(list)
  for request in played.policy.asked:
    task, _, body = "".join(map(chr, request.prompt)).partition("?")
    found[task] += [body] * request.n
  return found


def test_outlines_see_those_before_them_and_paths_their_own_only(play):
  played = play(episode(outlines=3, train="outlines"), two_letters, right, tasks=8)
  asked = requests_of(played)
  for index in range(8):
    sets = [t for t in played.trajectories if t.task_id == str(index)]
    assert len(sets) == 3
    expected = collections.Counter({"": 3})
    for t in sets:
      o1, o2, o3 = text_of(t).split(";")
      assert trained(t) == o1 + o2 + o3 and t.text == text_of(t)
      assert t.tag_ids.tolist() == [0, 0, 1, 1, 0, 1, 1, 0, 1, 1]
      expected.update([f"{o1};", f"{o1};{o2};", o1, o2, o3])
    assert collections.Counter(asked[str(index)]) == expected


def test_the_behaviour_of_outlines_is_that_of_the_policy(play):
  played = play(episode(train="outlines"), two_letters, right, tasks=6)
  for t in played.trajectories:
    text = "".join(map(chr, t.tokens))
    for i, trained_on in enumerate(t.loss_mask):
      wanted = math.log(two_letters(text[:i])[text[i]]) if trained_on else 0.0
      assert t.behaviour_logprobs[i] == pytest.approx(wanted, abs=1e-5)


def test_a_set_is_rewarded_for_its_paths_its_majority_and_no_repetition(play):
  options = dict(alpha=0.3, form=0.25, repetition=0.6)
  played = play(episode(outlines=3, train="outlines", **options), two_letters, right, tasks=30)
  leaves = iter(played.scorer.judged)
  paths = [[next(leaves) for _ in range(3)] for _ in played.trajectories]
  seen = set()
  by_outlines = collections.defaultdict(list)
  for t in played.trajectories:
    by_outlines[t.task_id].append(t)
  ordered = [t for task in range(30) for t in by_outlines[str(task)]]
  # What was judged comes by task and set, in the order of the outlines.
  groups = {tuple(p[:2] for p in some): [] for some in paths}
  for some in paths:
    groups[tuple(p[:2] for p in some)].append(some)
  for t in ordered:
    texts = text_of(t).split(";")
    rewards = []
    for some in groups[tuple(texts)]:
      counts = collections.Counter(some)
      winner = max(some, key=lambda p: (counts[p], -some.index(p)))
      scores = [right(p) for p in some]
      distinct = len(set(texts)) / 3
      rewards.append(0.3 * right(winner) + 0.7 * np.mean(scores) + 0.25 - 0.6 * (1 - distinct))
      seen.add((len(set(texts)), right(winner)))
    assert any(t.reward == pytest.approx(r) for r in rewards)
    assert t.evidence["distinct_outlines"].score == pytest.approx(len(set(texts)) / 3)
  assert {n for n, _ in seen} == {1, 2, 3} and {r for _, r in seen} == {0.0, 1.0}


def test_a_path_group_has_one_outline_and_trains_behind_it(play):
  played = play(episode(outlines=2, paths=4, train="paths"), two_letters, right, tasks=20)
  assert len(played.trajectories) == 20 * 8
  for start in range(0, 160, 4):
    group = played.trajectories[start:start + 4]
    assert len({t.group for t in group}) == 1
    assert len({text_of(t)[:2] for t in group}) == 1
    for t in group:
      assert trained(t) == text_of(t)[2:] and ";" not in text_of(t)
      assert t.tag_ids.tolist() == [0] * (len(t.tokens) - len(text_of(t))) + [1, 1] + [2] * (
          len(text_of(t)) - 2)
      assert t.text == text_of(t).removesuffix("$")  # outline and path are judged as one
  assert len({t.group for t in played.trajectories}) == 40


@pytest.mark.parametrize("train,period,turns", [
    ("alternate", 2, "oopp" * 2), ("alternate", 3, "ooopppoo"), ("outlines", 1, "o" * 8),
    ("paths", 1, "p" * 8), ("both", 1, "b" * 8)])
def test_outlines_and_paths_take_turns(play, train, period, turns):
  probe = play(episode(), two_letters, right)  # for its policy and scorer
  end = SamplingParams(max_tokens=8, stop_ids=(ord("$"),))
  characters = type("Characters", (), dict(
      encode=staticmethod(lambda text: [ord(c) for c in text]),
      decode=staticmethod(lambda tokens: "".join(map(chr, tokens)))))()
  runs = Rollouts(episode(train=train, period=period), probe.policy, characters, probe.scorer,
                  sampling=end, max_failure_rate=0.0)
  for step, turn in enumerate(turns):
    found = runs.run({"params": None}, [Task(id="0", prompt=[48, 63])], base_key=None, key=(step,),
                     step=step)
    kinds = [t.group % engine.GROUPS_PER_EPISODE for t in found]
    expected = dict(o=[0] * 3, p=[1] * 4 + [2] * 4)
    assert kinds == (expected["o"] + expected["p"] if turn == "b" else expected[turn])


def test_an_outline_that_ends_is_its_own_path(play):
  def ends(text):
    return {"r": 0.5, "$": 0.5}
  played = play(episode(outlines=2, sets=8, outline_tokens=2, train="outlines", alpha=0.0, form=0.5,
                        repetition=0.0), ends, lambda text: float("r" in text), tasks=8)
  ended = 0
  for t in played.trajectories:
    outlines = text_of(t).split(";")
    open_ = np.mean([not outlines[min(i, len(outlines) - 1)].endswith("$") for i in range(2)])
    ended += "$" in text_of(t)
    assert not text_of(t)[:-1].count("$")
    judged = [float("r" in outlines[min(i, len(outlines) - 1)]) for i in range(2)]
    assert t.reward == pytest.approx(np.mean(judged) + 0.5 * open_)
  assert 10 < ended < 64
  paths = play(episode(paths=3, outline_tokens=2, train="paths"), ends, lambda text: 1.0, tasks=20)
  assert paths.trajectories and all(text_of(t)[:2] == "rr" for t in paths.trajectories)


def test_a_boundary_ends_an_outline(play):
  def table(text):
    return {"|": 0.4, "x": 0.6}
  played = play(episode(outlines=2, outline_tokens=4, boundary="|", train="outlines"), table,
                lambda text: 1.0, tasks=20)
  for t in played.trajectories:
    for outline in text_of(t).split(";"):
      assert outline.count("|") == outline.endswith("|")
      assert outline.endswith("|") or len(outline) == 4


def test_sets_without_a_judged_path_are_not_scored(play):
  played = play(episode(train="outlines"), two_letters,
                lambda text: None if "a" in text else right(text), tasks=20)
  for t in played.trajectories:
    assert t.scored == any("a" not in outline for outline in text_of(t).split(";"))


def test_the_pattern_says_which_answers_agree(play):
  def table(text):
    body = text.split("?")[1]
    return {"z": 1.0} if not body or body.endswith(";") else {
        1: {"u": 0.5, "v": 0.5}, 2: {"r": 0.5, "w": 0.5}}.get(len(body), {"$": 1.0})
  reward = lambda text: float(text.endswith("r"))
  played = play(episode(outlines=3, sets=4, outline_tokens=1, answer="([rw])", train="outlines",
                        alpha=1.0, form=0.0, repetition=0.0), table, reward, tasks=40)
  judged = np.array([reward(text) for text in played.scorer.judged]).reshape(-1, 3)
  majority = sorted(float(row.sum() >= 2) for row in judged)
  assert sorted(t.reward for t in played.trajectories) == majority


SKILL, LIKED = 0.8, 0.9


def modes(text):
  """Two ways to a solution; whoever sees one outline writes the other. The first letter of the
  answer tells the way, and the policy likes "a" better."""
  body = text.split("?")[1]
  if not body:
    return {"a": LIKED, "b": 1 - LIKED}
  if body.endswith(";"):
    return {"b": 1.0} if body[0] == "a" else {"a": 1.0}
  return {"r": SKILL, "w": 1 - SKILL} if len(body) == 1 else {"$": 1.0}


def share_solved_of_two(way):
  """Closed form for two independent answers, where only one way leads to the solution."""
  p = SKILL * (LIKED if way == "a" else 1 - LIKED)
  return 1 - (1 - p) ** 2


@pytest.mark.parametrize("way", ["a", "b"])
def test_outlines_win_where_the_way_differs_and_lose_where_one_way_is_always_right(play, way):
  solved = lambda text: float(text.startswith(way + "r"))
  sets = play(episode(sets=4, outline_tokens=1, train="outlines"), modes, solved, tasks=250)
  found = np.mean([t.evidence["any_right"].score for t in sets.trajectories])
  assert abs(found - SKILL) < 4 * np.sqrt(SKILL * (1 - SKILL) / 1000)  # one path goes the right way
  pairs = play(functools.partial(rollouts.group, samples=2), modes, solved, tasks=1000)
  naive = np.mean([max(t.reward for t in pairs.trajectories[i:i + 2]) for i in range(0, 2000, 2)])
  p = share_solved_of_two(way)
  assert abs(naive - p) < 4 * np.sqrt(p * (1 - p) / 1000)
  assert (found > naive) == (way == "b")
  # If "a" is right for a share q of the questions, outlines win below the crossover.
  crossover = (SKILL - share_solved_of_two("b")) / (
      share_solved_of_two("a") - share_solved_of_two("b"))
  assert crossover == pytest.approx(0.8417, abs=1e-4)


@pytest.mark.parametrize("options,message", [
    (dict(train="neither"), "train='neither'"), (dict(outlines=0), "outlines=0"),
    (dict(period=0), "period=0"), (dict(paths=0), "samples=0")])
def test_bad_arguments_are_refused(play, options, message):
  with pytest.raises(RuntimeError, match=message):
    play(episode(**options), two_letters, right)


def test_paths_that_do_not_divide_are_refused(play):
  uneven = functools.partial(rollouts.outlines_then_paths, samples=5, outlines=2, sets=1,
                             outline_tokens=1, separator=";")
  with pytest.raises(RuntimeError, match="make samples a multiple of outlines"):
    play(uneven, two_letters, right)


def test_the_config_builds_with_as_many_paths_as_grpo_has_answers():
  config = configs.load(CONFIG)
  built = compose.build(configs.to_dict(config.rollout.episode), rollouts).keywords
  answers = configs.load("configs/grpo.py").rollout.episode.samples
  assert built["sets"] * built["outlines"] == built["samples"] == answers
