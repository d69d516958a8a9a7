"""RLPT: tasks from documents, the prefix rule, and the weight of gaps."""

import collections
import functools
import itertools
import re

import numpy as np
import pytest

from jaxrl import advantages, compose, objectives, rewards, rollouts, tasks
from jaxrl import config as configs
from jaxrl.batch import ModelOutputs, Task, Trajectory, pack
from jaxrl.objectives.aggregate import loss_weights
from jaxrl.rewards import Scorer
from jaxrl.rollouts import Rollouts
from jaxrl.sampling import Sample, SamplingParams
from tests.methods.conftest import Characters

WORD = r"\w+ ?"
TEMPLATES = {"continue": "{context}", "fill": "{context}_{following}"}


class Parrot:
  """Always gives the same completions; keeps what it was asked."""

  def __init__(self, texts):
    self.texts, self.asked = texts, []

  def sample(self, params, requests, base_key, *, on_done=None):
    self.asked += ["".join(map(chr, r.prompt)) for r in requests]
    return [[Sample(np.array([ord(c) for c in self.texts[i]], np.int32),
                    np.full(len(self.texts[i]), -1.0, np.float32), "stop") for i in range(r.n)]
            for r in requests]


def play(documents, texts=("x", "y"), steps=1, **options):
  """Trajectories and prompts of episodes on documents, of several steps."""
  policy = Parrot(list(texts))
  options = dict(dict(segments=WORD, field="text"), **options)
  scorer = Scorer.from_config(dict(criteria=[dict(
      name="continues_text", label="prefix", pattern=r"(?:.*:)?(.+)", segments=WORD)]))
  made = Rollouts(functools.partial(rollouts.predict_segments, samples=len(texts), **options),
                  policy, Characters(), scorer, templates=TEMPLATES, max_failure_rate=0.0,
                  sampling=SamplingParams(max_tokens=30))
  problems = [Task(id=str(i), prompt=[2, *map(ord, "ask?")], question="ask?", solution="me",
                   row=dict(text=text))
              for i, text in enumerate(documents)]
  found = [made.run({"params": None}, problems, base_key=None, key=(s,), step=s)
           for s in range(steps)]
  scorer.close()
  return [t for batch in found for t in batch], policy.asked


def prompts_of(words, first):
  """By the definition: contexts of every target i = first .. n - 1, counted from 1."""
  n = len(words)
  asr = {"".join(words[:i - 1]) for i in range(first, n)}
  msr = {"".join(words[:i - 1]) + "_" + words[i] for i in range(first, n)}
  return asr, msr


@pytest.mark.parametrize("first", [2, 3])
def test_every_tuple_of_a_document_is_asked_about_and_no_other(first):
  words = ["aa ", "bb ", "cc ", "dd ", "ee"]
  found, asked = play(["".join(words)] * 30, steps=10, first=first)
  asr, msr = prompts_of(words, first)
  counts = collections.Counter(asked)
  assert set(counts) == {"\x02" + text for text in asr | msr}  # BOS, and no question
  share = np.mean(["_" in text for text in asked])
  assert abs(share - 0.5) < 4 * 0.5 / 300 ** 0.5
  expected = 300 / len(counts)
  assert sum((c - expected) ** 2 / expected for c in counts.values()) < 25  # 5 degrees: p < 0.001
  for t in found:
    filled = "_" in "".join(map(chr, t.tokens[:t.prompt_length]))
    assert t.evidence["middle"].score == filled and t.weight == (0.5 if filled else 1.0)
    assert t.loss_mask[t.prompt_length:].all() and not t.loss_mask[:t.prompt_length].any()


def test_the_document_is_the_reference_of_its_own_segments():
  document = "aa bb cc dd ee"
  found, asked = play([document] * 40, texts=["bb", "bb cc dd", "b", "cc dd", "thought: dd"],
                      middle_weight=0.25)
  assert {t.weight for t in found} == {1.0, 0.25}
  for t in found:
    target = "".join(map(chr, t.tokens[1:t.prompt_length])).split("_")[0]
    rest = document.removeprefix(target)
    prediction = t.text.removeprefix("thought: ")
    right = rest.startswith(prediction) and len(prediction) > 1
    assert t.reward == right, (t.text, rest)
  assert {t.reward for t in found} == {0.0, 1.0}


def test_short_segments_are_context_only_and_short_documents_nothing():
  found, asked = play(["aa b ccc d ee ff"] * 40, middle=0.0, shortest=2)
  assert set(asked) == {"\x02aa b ", "\x02aa b ccc d "}
  found, asked = play(["aa bb", "aa bb cc", "aa b cc"], middle=1.0, shortest=2)
  assert asked == ["\x02aa _cc"] and {t.task_id for t in found} == {"1"}


def test_without_a_field_question_and_solution_are_the_document():
  _, asked = play([""] * 30, field="", segments=r"\w\W?", middle=0.0)
  assert set(asked) == {"\x02a", "\x02as", "\x02ask?"}


def test_the_prefix_rule_against_an_enumeration():
  """All texts of up to 6 characters: right are those that the definition lists."""
  reference, window = "ab|c|ab|c", 2
  right = {"ab|", "ab|c", "ab|c|", "ab"}  # "ab" lacks the end of its segment only
  criterion = compose.build(dict(name="continues_text", pattern="<(.*)>", segments=r"\w+\|?",
                                 window=window, ends="|"), rewards)
  task = Task(id="t", prompt=[1], answer=reference)
  for length in range(7):
    for letters in itertools.product("abc|", repeat=length):
      text = "".join(letters)
      found = criterion(task, Trajectory([1], [False], text=f"<{text}>"))
      assert found.status == "ok" and found.score == (text in right), text
  assert criterion(task, Trajectory([1], [False], text="ab|")).score == 0  # no tags
  assert criterion(Task(id="t", prompt=[1]), Trajectory([1], [False], text="<ab>")
                   ).status == "unscorable"


def test_a_longer_window_never_takes_a_reward_away_and_one_segment_is_the_strict_rule():
  rng = np.random.default_rng(0)
  seen = set()
  for _ in range(300):
    words = ["".join(rng.choice(list("ab"), rng.integers(1, 3))) + " " for _ in range(4)]
    text = "".join(rng.choice(list("ab "), rng.integers(1, 8)))
    scores = [rewards.continues_text(
        Task(id="t", prompt=[1], answer="".join(words)), Trajectory([1], [False], text=f":{text}"),
        pattern=":(.*)", segments=r"\w+ ", window=w).score for w in (1, 2, 3)]
    assert scores == sorted(scores)
    assert scores[0] == (text.strip() == words[0].strip())
    seen.add(tuple(scores))
  assert {(0, 0, 0), (1, 1, 1), (0, 1, 1)} <= seen


def test_lambda_multiplies_the_gradient_of_gaps_where_a_factor_on_rewards_would_not():
  """J = E_ASR + lambda E_MSR; A is divided by the deviation of its group."""
  chain = advantages.chain.chain([advantages.center_by_group, advantages.scale_by_group_std])
  rng = np.random.default_rng(3)
  made = []
  for i in range(12):
    length = int(rng.integers(3, 8))
    filled = i // 4 == 1
    made.append(Trajectory(np.arange(length), np.arange(length) > 1, group=i // 4,
                           reward=float(i % 4 < 2), scored=i != 10, weight=0.3 if filled else 1.0))
  batch = pack(made, row_length=8)
  values = np.asarray(chain(batch, batch.rewards))
  scaled = np.asarray(chain(batch, batch.rewards * np.where(batch.group_ids == 1, 0.3, 1.0)))
  np.testing.assert_allclose(scaled, values, rtol=1e-3)
  weights = np.asarray(loss_weights(batch, "sequence_mean"))
  term = objectives.reinforce(ModelOutputs(logprobs=np.full(batch.tokens.shape, -1.0, np.float32)),
                              batch.with_signals(advantages=np.abs(values)))[0]
  by_group = [np.sum((weights * np.asarray(term))[np.isin(batch.sequence_ids, np.nonzero(
      batch.group_ids == g)[0])]) for g in range(3)]
  assert by_group[1] == pytest.approx(0.3 * by_group[0], rel=1e-4)


@pytest.mark.parametrize("options, message", [
    (dict(first=1), "first=1"), (dict(middle=1.5), "middle=1.5"), (dict(field="body"), "no text"),
    (dict(segments=r"\w+"), "not all of the document"), (dict(segments=r"(\w)(\s)"), "not all of")])
def test_bad_settings_are_refused(options, message):
  with pytest.raises(rollouts.EpisodeFailure, match=re.escape(message)):
    play(["aa bb cc dd"], **options)


@pytest.mark.parametrize("options, message", [
    (dict(pattern="x"), "0 groups"), (dict(pattern="("), "not a regular"),
    (dict(pattern="(.)", segments="(.)"), "1 groups"), (dict(pattern="(.)", window=0), "window=0")])
def test_bad_criteria_are_refused(options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    Scorer.from_config(dict(criteria=[dict(name="continues_text", **options)]))


def test_the_toy_s_series_are_sums_and_no_cycle_is_in_two_splits():
  cycles = {}
  for split in ("train", "validation", "test"):
    data = tasks.open_task("series", split=split, size=60, seed=1, digits=2, missing=0.5)
    for row in data:
      terms = list(map(int, row["document"].removesuffix("+").split("+")))
      assert all((a + b) % 100 == c for a, b, c in zip(terms, terms[1:], terms[2:]))
      context = row["question"].partition("=")[0]
      assert row["document"] == context + row["answer"] + "+"
      thought, _, shown = row["solution"].partition("=")
      assert row["answer"].startswith(shown) and thought == row["answer"][:2][::-1]
      if "=" in row["question"]:
        assert row["question"].partition("=")[2] == row["answer"].split("+")[1] + "+"
      pair, smallest = tuple(terms[:2]), tuple(terms[:2])
      for _ in range(300):
        pair = pair[1], sum(pair) % 100
        smallest = min(smallest, pair)
      assert cycles.setdefault(smallest, split) == split


def test_what_the_toy_asks_in_evaluations_is_what_the_episode_asks():
  config = configs.load("configs/methods/rlpt.py")
  data = tasks.open_task("series", split="train", size=100, seed=0, **config.data.task.to_dict())
  policy = Parrot(["7=7"])
  scorer = Scorer.from_config(configs.to_dict(config.reward))
  options = {**configs.to_dict(config.rollout.episode), "samples": 1}
  del options["name"]
  made = Rollouts(functools.partial(rollouts.predict_segments, **options), policy, Characters(),
                  scorer, templates=config.rollout.templates.to_dict(), max_failure_rate=0.0,
                  sampling=SamplingParams(max_tokens=16))
  shape = lambda text: re.sub(r"\d", "0", text)
  made.run({"params": None}, [Task(id=row["id"], prompt=[2, *map(ord, row["question"])],
                                   question=row["question"], row=row) for row in data],
           base_key=None)
  scorer.close()
  asked, own = (collections.Counter(map(shape, texts)) for texts in (
      [text[1:] for text in policy.asked], [row["question"] for row in data]))
  assert set(asked) == set(own) and len(own) == 6
  assert all(abs(asked[k] - own[k]) < 20 for k in own)


def test_the_config_builds_and_rewards_the_toy_s_own_solutions():
  config = configs.load("configs/methods/rlpt.py")
  episode = compose.build(configs.to_dict(config.rollout.episode), rollouts)
  assert episode.func is rollouts.predict_segments
  scorer = Scorer.from_config(configs.to_dict(config.reward))
  data = tasks.open_task("series", split="train", size=50, seed=0, **config.data.task.to_dict())
  several = 0
  for row in data:
    task = Task(id="t", prompt=[1], answer=row["answer"])
    found, = scorer.score([(task, Trajectory([1], [False], text=row["solution"]))])
    assert found.reward == found.evidence["prefix"].score == 1.0
    assert found.evidence["exact"].score == ("+" not in row["solution"])
    several += "+" in row["solution"]
    assert len(row["question"]) < 32 and len(row["solution"]) < config.rollout.max_tokens
  assert 10 < several < 50
  scorer.close()
