"""Self-verification: what is remembered, balanced and forgotten, and what judgements earn."""

import copy
import functools
import json

import numpy as np
import pytest

from jaxrl import config as configs
from jaxrl import rollouts, tasks
from jaxrl.batch import Task, Trajectory
from jaxrl.rewards import Scored, ok
from jaxrl.rollouts import Rollouts, edits
from jaxrl.rollouts.self_verification import MEMORY, collect_answers, is_verifying
from jaxrl.sampling import Sample, SamplingParams


def answer(question, right, *, text=None, scored=True):
  return Trajectory([1, 2], [False, True], group=ord(question), reward=float(right), scored=scored,
                    task_id=question, text=text if text is not None else f"{question}{int(right)}")


TASKS = {q: Task(id=q, prompt=[1], question=f"{q}?") for q in "abcdefgh"}


def collect(memory, index, group, **options):
  step = edits.Step(list(group), TASKS, index, memory, {})
  assert collect_answers(step, **options) == list(group)
  return step.metrics


def batch(rights):
  """A group of 4 for each question: how many of them are right."""
  return [answer(q, i < r) for q, r in rights.items() for i in range(4)]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_remembered_is_balanced_and_spread_over_questions(seed):
  memory = {}
  collect(memory, 10 * seed, batch(dict(a=2, b=1, c=3, d=4, e=0, f=4)))
  items = memory[MEMORY]["items"]
  assert len(items) == 6 and sum(i["right"] for i in items) == 3
  asked = {v: [i["question"] for i in items if i["right"] == v] for v in (True, False)}
  assert sorted(asked[True]) == sorted(asked[False]) == ["a?", "b?", "c?"], "mixed questions first"
  assert all(i["answer"].endswith(str(int(i["right"]))) for i in items)
  assert json.loads(json.dumps(memory)) == memory


def test_halves_are_filled_with_others_then_again_and_hopeless_questions_are_skipped():
  memory = {}
  collect(memory, 0, batch(dict(a=1, b=4, c=4, d=4, e=0, f=0, g=4, h=4)))
  items = memory[MEMORY]["items"]
  assert len(items) == 8 and sum(i["right"] for i in items) == 4
  right = [i["question"] for i in items if i["right"]]
  assert right.count("a?") == 1 and len(set(right)) == 4, "questions that go well fill the right half"
  assert {i["question"] for i in items if not i["right"]} == {"a?"}, "with replacement"


def test_judgements_are_about_all_batches_since_the_last_ones():
  """A batch of judgements asks as many answers as it has questions, the first of the buffer."""
  memory, batches = {}, ("ab", "cd", "ef", "gh")
  for index, pair in enumerate(batches):
    collect(memory, index, batch({q: 2 for q in pair}))
  asked = [item["question"][0] for item in memory[MEMORY]["items"]]
  come_from = [next(i for i, pair in enumerate(batches) if q in pair) for q in asked]
  assert sorted(come_from) == [0, 0, 1, 1, 2, 2, 3, 3]
  assert len(set(come_from[:4])) > 2, "not the oldest batches first"


@pytest.mark.parametrize("rights", [dict(a=4, b=4), dict(a=0, b=0)])
def test_one_label_alone_is_not_remembered(rights):
  memory = {}
  assert collect(memory, 0, batch(rights))["to_verify"] == 0


def test_answers_without_a_text_or_a_reward_are_left_out():
  memory = {}
  group = [answer("a", True, text=" "), answer("a", False), answer("a", True, scored=False)]
  assert collect(memory, 0, group + batch(dict(b=0)))["to_verify"] == 0


def test_judgements_end_what_was_remembered():
  memory = {}
  for index in range(4):
    metrics = collect(memory, index, batch(dict(a=2, b=2)), interval=5)
  assert metrics["to_verify"] == 8
  judged = [answer("a", True), answer("a", False)]
  for t in judged:
    t.evidence = {"verdict": ok(t.reward)}
  metrics = collect(memory, 4, judged, interval=5)
  assert metrics == {"verdict_accuracy": 0.5, "to_verify": 0.0}


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_intervals_count_batches_where_each_has_several_updates(updates):
  """With four updates to a batch, say, no update is the last of 4 when a batch is sampled."""
  memory, seen = {}, []
  for number in range(8):
    collect(memory, updates * number, batch(dict(a=2, b=2)), interval=4)
    seen.append(len(memory[MEMORY]["items"]))
  assert seen == [2, 4, 6, 0] * 2
  judged, world = play(3, ITEMS, interval=4, update=updates * 3)
  assert world.asked[0] == "1+1=2+" and all("verdict" in t.evidence for t in judged)


class World:
  labels, has_workers = ["right"], False
  bos_id = None

  def __init__(self, says):
    self.says, self.asked = says, []

  def encode(self, text):
    return [ord(c) for c in text]

  def decode(self, tokens):
    return "".join(map(chr, tokens))

  def sample(self, params, requests, base_key, *, on_done=None):
    self.asked += ["".join(map(chr, r.prompt)) for r in requests]
    return [[Sample(np.array([ord(self.says[i])]), np.array([-1.0], np.float32), "stop")
             for i in range(r.n)] for r in requests]

  def score(self, pairs, *, among=0):
    return [Scored(1.0, True, {"right": ok(1.0)}) for _ in pairs]


def play(step, items, says="10", update=None, **options):
  world = World(says)
  episode = functools.partial(rollouts.answer_or_verify, samples=len(says), yes="1", no="0",
                              **{"interval": 5, **options})
  made = Rollouts(episode, world, world, world, templates=dict(verify="{question}{answer}+"),
                  max_failure_rate=0.0, sampling=SamplingParams(max_tokens=3))
  made.memory[MEMORY] = {"items": copy.deepcopy(items), "batches": step}
  problems = [Task(id=str(i), prompt=[ord("p")], question="p") for i in range(3)]
  return made.run({"params": None}, problems, base_key=None,
                  step=step if update is None else update), world


ITEMS = [dict(question="1+1=", answer="2", right=True), dict(question="1+2=", answer="4", right=False)]


def test_every_fifth_update_asks_about_remembered_answers_in_turn():
  assert [i for i in range(12) if is_verifying(i, 5)] == [4, 9]
  found, world = play(4, ITEMS)
  assert world.asked == ["1+1=2+", "1+2=4+", "1+1=2+"]
  assert [t.reward for t in found] == [1, 0, 0, 1, 1, 0]
  assert [t.evidence["answer_was_right"].score for t in found] == [1, 1, 0, 0, 1, 1]
  assert all(t.loss_mask.sum() == 1 and t.prompt_length == 6 for t in found), "no gradient in answers"
  found, world = play(3, ITEMS)
  assert world.asked == ["p"] * 3 and all("right" in t.evidence for t in found)
  assert play(4, [])[1].asked == ["p"] * 3, "with nothing to judge it answers"


def test_learning_from_judgements_alone():
  found, _ = play(3, ITEMS, train_answers=False)
  assert not any(t.loss_mask.any() for t in found)
  found, _ = play(4, ITEMS, train_answers=False)
  assert all(t.loss_mask.any() for t in found)
  with pytest.raises(rollouts.EpisodeFailure, match="interval=1"):
    play(4, ITEMS, interval=1)


def test_the_toy_asks_for_verdicts_that_are_as_often_right_as_wrong():
  data = tasks.open_task("addition", split="train", size=400, seed=0, digits=2,
                         answer_format="reversed", verdicts=0.5)
  verdicts = []
  for row in data:
    if row["question"].endswith("+"):
      shown = row["question"].split("=")[1][:-1]
      assert row["answer"] == str(int(shown == str(row["a"] + row["b"])[::-1]))
      verdicts.append(int(row["answer"]))
  assert 150 < len(verdicts) < 250 and 0.4 < np.mean(verdicts) < 0.6


def test_the_config_uses_one_interval():
  config = configs.load("configs/methods/self_verify.py")
  assert config.rollout.episode.interval == config.rollout.edits[0]["interval"] == 5
