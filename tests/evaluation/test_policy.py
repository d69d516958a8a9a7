"""Accuracies of a policy whose answers are known, and what is left out of them."""

import json
import math

import numpy as np
import pytest

from jaxrl.batch import Task
from jaxrl.evaluation import policy
from jaxrl.rewards import Criterion, Scored
from jaxrl.rollouts import Rollouts
from jaxrl.sampling import Sample, SamplingParams


class Scripted:
  """Task i answers greedily with `greedy[i]` and otherwise with `drawn[i]`, one letter each.

  `c` is correct, `w` wrong, `?` cannot be judged; `l` is correct but its length is not to be had.
  """

  def __init__(self, greedy, drawn):
    self.greedy, self.drawn, self.requests = greedy, drawn, []

  def sample(self, params, requests, base_key):
    self.requests += requests
    return [[Sample(np.array([ord(c)], np.int32), np.zeros(1, np.float32), "stop")
             for c in self._answers(r)] for r in requests]

  def _answers(self, request):
    script = self.greedy if request.params.temperature == 0 else self.drawn
    answers = script[request.prompt[0]]
    assert len(answers) == request.n
    return answers

  has_workers = False

  def score(self, pairs, *, among=0):
    return [self._one(t.text) for _, t in pairs]

  def _one(self, text):
    right = Criterion(float(text in "cl"), "unscorable" if text == "?" else "ok")
    short = Criterion(0.5, "failed" if text == "l" else "ok")
    scored = text not in "?l"
    return Scored(right.score * scored, scored, {"short": short, "right": right})

  def encode(self, text):
    return list(map(ord, text))

  def decode(self, tokens):
    return "".join(map(chr, tokens))


def evaluate(greedy, drawn=(), k=2, correct="right", **limits):
  world = Scripted(greedy, drawn)
  tasks = [Task(f"t{i}", [i], question=f"q{i}", answer="c") for i in range(len(greedy))]
  rollouts = Rollouts(None, world, world, world,
                      sampling=SamplingParams(max_tokens=4, temperature=0.7, top_k=3, top_p=0.9,
                                              min_p=0.1, stop_ids=(7,)))
  result = policy.evaluate(rollouts, {"params": None}, tasks, correct=correct,
                           samples=len(drawn[0]) if drawn else 0, k=k, temperature=0.8,
                           base_key="base", key=(1, 2), **limits)
  return result, world, tasks


def test_accuracies_are_those_of_the_script():
  result, _, _ = evaluate("ccw", ["cwww", "cccc", "wwww"], k=2)
  assert result.metrics == pytest.approx(dict(
      greedy_accuracy=2 / 3, greedy_tokens=1.0, unscored=0.0, sampled_accuracy=5 / 12,
      majority_accuracy=1 / 3, pass_at_2=(0.5 + 1.0 + 0.0) / 3, distinct_right=2 / 3))
  assert [t.text for t in result.answers] == ["c", "c", "w"]


def test_what_cannot_be_judged_is_left_out_and_not_wrong():
  result, _, _ = evaluate("c?w?", ["c???", "cw??", "????", "ccww"], k=2)
  assert result.metrics == pytest.approx(dict(
      greedy_accuracy=1 / 2, greedy_tokens=1.0, unscored=0.5,
      sampled_accuracy=(1.0 + 0.5 + 0.5) / 3, pass_at_2=(1.0 + (1 - 1 / 6)) / 2,
      distinct_right=1.0, majority_accuracy=1.0))  # of equal numbers, what came first


def test_only_the_named_criterion_decides():
  result, _, _ = evaluate("lw", ["ll", "lw"], k=2)
  assert result.metrics == pytest.approx(dict(
      greedy_accuracy=0.5, greedy_tokens=1.0, unscored=0.0, sampled_accuracy=0.75, pass_at_2=1.0,
      majority_accuracy=1.0, distinct_right=1.0))
  result, _, _ = evaluate("cw", correct="short")
  assert result.metrics["greedy_accuracy"] == 0.0  # a score of 0.5 is not solved


def test_right_answers_count_once_for_each_wording():
  result, _, _ = evaluate("cccc", ["clcl", "cccw", "wwww", "l?wl"], k=2)  # 2, 1, 0 and 1 of them
  assert result.metrics["distinct_right"] == 1.0


def test_nothing_to_judge_gives_nan_and_no_warning(recwarn):
  result, _, _ = evaluate("??", ["??", "??"])
  assert result.metrics["unscored"] == 1.0
  assert all(math.isnan(result.metrics[name])
             for name in ("greedy_accuracy", "sampled_accuracy", "pass_at_2",
                          "majority_accuracy", "distinct_right"))
  assert not recwarn.list


def test_without_samples_there_are_greedy_metrics_only():
  result, world, _ = evaluate("cw")
  assert set(result.metrics) == set(policy.GREEDY_METRICS)
  assert len(world.requests) == 2


def test_it_samples_from_the_whole_distribution_with_keys_of_its_own():
  _, world, _ = evaluate("cw", ["cc", "ww"])
  greedy, drawn = world.requests[:2], world.requests[2:]
  for request in world.requests:
    assert (request.params.top_k, request.params.top_p, request.params.min_p) == (0, 1.0, 0.0)
    assert request.params.max_tokens == 4 and request.params.stop_ids == (7,)
  assert {r.params.temperature for r in greedy} == {0.0}
  assert {r.params.temperature for r in drawn} == {0.8}
  assert len({r.key for r in world.requests}) == 4
  assert all(r.key[:2] == (1, 2) for r in world.requests)


def test_rows_of_samples_hold_what_a_reader_needs():
  result, _, tasks = evaluate("c?")
  rows = policy.sample_rows(result.answers, {t.id: t for t in tasks}, advantage=[0.5, 0.0])
  assert json.loads(json.dumps(rows)) == rows
  assert rows[0] == dict(
      task="t0", prompt="q0", answer="c", completion="c", finish="stop", tokens=1, reward=1.0,
      criteria=dict(short=dict(score=0.5, status="ok", detail=""),
                    right=dict(score=1.0, status="ok", detail="")), advantage=0.5)
  assert rows[1]["reward"] is None and rows[1]["criteria"]["right"]["status"] == "unscorable"


async def two_rounds(ctx, task):
  """A first answer that nobody asked for, then the one that counts."""
  assert ctx.step == 30
  first = await ctx.sample(task.prompt)
  first[0].group = 1
  return first + await ctx.sample(task.prompt)


def test_an_episode_answers_with_its_last_trajectory_once_for_each_sample():
  world = Script(["wc", "cw", "c?"])
  tasks = [Task(f"t{i}", [i], question=f"q{i}", answer="c") for i in range(3)]
  rollouts = Rollouts(None, world, world, world, sampling=SamplingParams(max_tokens=4))
  result = policy.evaluate(rollouts, {"params": None}, tasks, correct="right", samples=3, k=3,
                           temperature=0.8, base_key="base", key=(1,), episode=two_rounds,
                           step=30)
  assert result.metrics == pytest.approx(dict(
      greedy_accuracy=1 / 2, greedy_tokens=2.0, unscored=1 / 3, sampled_accuracy=1 / 2,
      majority_accuracy=1 / 2, pass_at_3=1 / 2, distinct_right=1 / 2))
  assert [t.task_id for t in result.answers] == ["t0", "t1", "t2"]


class Script(Scripted):
  """Task i answers the first request of an episode with its first letter, then with its second."""

  def __init__(self, answers):
    super().__init__(answers, answers)

  def _answers(self, request):
    return self.greedy[request.prompt[0]][request.key[-1]]
