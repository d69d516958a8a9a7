"""RLTR: cuts, who finishes what, rewards by hand, and answers that are given away."""

import functools

import numpy as np
import pytest

from jaxrl import compose
from jaxrl import config as configs
from jaxrl import rollouts
from jaxrl.batch import Task
from jaxrl.rewards import Criterion, Scored
from jaxrl.rollouts import Rollouts
from jaxrl.sampling import Sample, SamplingParams


class Characters:
  def encode(self, text):
    return [ord(c) for c in text]

  def decode(self, tokens):
    return "".join(map(chr, tokens))


class Models:
  """Policy and reference as scripts: the policy's answers in order, the reference's by context."""

  def __init__(self, answers, finish):
    self.answers, self.finish, self.asked = answers, finish, []

  def sample(self, params, requests, base_key, *, on_done=None):
    return [[self._one(params, r, i) for i in range(r.n)] for r in requests]

  def _one(self, params, request, i):
    if params == "policy":
      text = self.answers[i]
    else:
      context = "".join(map(chr, request.prompt))
      self.asked.append((context, request.params.max_tokens, request.params.temperature))
      text = self.finish(context)
    return Sample(np.array([ord(c) for c in text], np.int32),
                  np.full(len(text), -1.0, np.float32), "stop")


class Judge:
  """1 for a text that ends with "=7"; "x" cannot be judged."""

  labels, has_workers = ["right"], False

  def score(self, pairs, *, among=0):
    return [Scored(0.0, False, {"right": Criterion(0, "unscorable", "")}) if "x" in t.text else
            Scored(float(t.text.endswith("=7")), True, {"right": Criterion(t.text.endswith("=7"))})
            for _, t in pairs]


def play(answers, finish, *, step=0, **options):
  models = Models(answers, finish)
  episode = functools.partial(rollouts.transferable_answers, samples=len(answers),
                              **dict(boundary="=", max_tokens=20) | options)
  made = Rollouts(episode, models, Characters(), Judge(), max_failure_rate=0.0,
                  sampling=SamplingParams(max_tokens=20))
  task = Task(id="t", prompt=[ord(c) for c in "3+4?"], question="3+4?", answer="7")
  found = made.run({"params": "policy"}, [task], base_key=None, step=step,
                   reference={"params": "reference"})
  return found, models


def test_rewards_are_those_of_the_equation():
  answers = ["abcdefghij=7", "klmnopqrst=8", "no thought", "uvwx=7"]
  # The reference finishes what begins with a or k rightly.
  found, models = play(answers, lambda text: "=7" if text[4] in "ak" else "=0",
                       answer_weight=0.8, transfer_weight=0.3)
  assert [t.scored for t in found] == [True, True, True, False]
  assert [t.reward for t in found[:3]] == pytest.approx([0.8 + 0.3, 0.3, 0.0])
  assert [t.evidence["transfer"].score for t in found[:3]] == [1.0, 1.0, 0.0]
  assert [t.evidence["right"].score for t in found[:3]] == [1.0, 0.0, 0.0]
  assert len(models.asked) == 2, "neither an answer without a thought nor an unscored one is tried"
  for t in found:  # the policy's own answer is what is trained on, whole
    assert t.loss_mask.sum() == len(t.text) and t.prompt_length == 4


def test_a_cut_is_inside_the_thought_and_its_share_uniform():
  thought = "abcdefghijklmnopqrstuvwyz" * 4  # 100 tokens
  lengths = []
  for step in range(60):
    found, models = play([f"{thought}=8"] * 4, lambda text: "=7", step=step, max_tokens=200)
    for context, left, temperature in models.asked:
      part = context.removeprefix("3+4?")
      assert thought.startswith(part) and temperature == 0.7
      assert len(part) + left == 200
      lengths.append(len(part))
  assert min(lengths) >= 30 and max(lengths) <= 90
  assert np.mean(lengths) == pytest.approx(59.5, abs=3.5)  # floor of a mean of 60
  assert np.std(lengths) == pytest.approx(60 / 12 ** 0.5, rel=0.1)
  again = play([f"{thought}=8"] * 4, lambda text: "=7", step=59, max_tokens=200)[1].asked
  assert [len(c) - 4 for c, *_ in again] == lengths[-4:], "a step draws the same cuts again"


def test_a_part_that_gives_the_answer_away_earns_nothing_by_transfer():
  answers = ["7aaaaaaaaa=7", "baaaaaaaaa=7"]
  found, _ = play(answers, lambda text: "=7")
  assert [t.reward for t in found] == [1.0, 1.5]
  assert [t.evidence["given_away"].score for t in found] == [1.0, 0.0]
  found, _ = play(answers, lambda text: "=7", hide_answer=False)
  assert [t.reward for t in found] == [1.5, 1.5]
  assert [t.evidence["given_away"].score for t in found] == [1.0, 0.0]


def test_several_receivers_are_averaged_and_without_transfer_it_is_grpo():
  count = [0]

  def alternating(text):
    count[0] += 1
    return "=7" if count[0] % 4 else "=0"
  found, _ = play(["abcdefghij=8"], alternating, receivers=4, transfer_weight=0.5)
  assert found[0].reward == pytest.approx(0.5 * 0.75)
  found, _ = play(["abcdefghij=8", "abcdefghij=7"], lambda text: "=7", transfer_weight=0.0)
  assert [t.reward for t in found] == [0.0, 1.0]
  # What nobody can judge is no 0: it leaves the statistics of the group.
  found, _ = play(["abcdefghij=8"], lambda text: "=x", receivers=2)
  assert not found[0].scored


def test_a_receiver_that_is_always_right_shifts_rewards_only():
  """A constant transfer leaves group advantages where they were: RLVR exactly."""
  answers = ["abcdefghij=8", "abcdefghij=7", "bbbbbbbbbb=7"]
  plain, _ = play(answers, lambda text: "=7", transfer_weight=0.0)
  shifted, _ = play(answers, lambda text: "=7", transfer_weight=0.5)
  a, b = (np.array([t.reward for t in found]) for found in (plain, shifted))
  np.testing.assert_allclose(a - a.mean(), b - b.mean(), atol=1e-12)


@pytest.mark.parametrize("options, message", [
    (dict(low=0.5, high=0.3), "0 <= low <= high <= 1"), (dict(high=1.2), "0 <= low"),
    (dict(receivers=0), "receivers=0")])
def test_bad_settings_are_refused(options, message):
  with pytest.raises(rollouts.EpisodeFailure, match=message):
    play(["a=7"] * 2, lambda text: "=7", **options)


def test_the_config_keeps_a_reference():
  config = configs.load("configs/methods/rltr.py")
  episode = compose.build(configs.to_dict(config.rollout.episode), rollouts)
  assert compose.signals_of(episode) == ("reference",)
