"""RMT: budgets, tiers, the triangle of lengths, and who learns which token how."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose, objectives, rollouts, tasks
from jaxrl import config as configs
from jaxrl.batch import ModelOutputs, Task, Trajectory, pack
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms
from jaxrl.rollouts import Rollouts, edits
from jaxrl.rollouts.edits import Step
from jaxrl.rollouts.midtraining import (budget_at, length_reward, remember_difficulty, thresholds,
                                        tier_probabilities)
from jaxrl.sampling import Sample, SamplingParams
from tests.methods.conftest import Characters, TableScorer

SETTINGS = dict(budget=800, smallest=1, shrink=0.2)
TIERS = dict(early=(0.5, 0.4, 0.1), late=(0.1, 0.3, 0.6), change=(0.3, 0.7))


def test_the_paper_s_budget_falls_from_800_to_160():
  found = [budget_at(t, 1000, **SETTINGS) for t in range(1200)]
  assert found[0] == 800 and set(found[1000:]) == {160}
  assert all(a >= b for a, b in zip(found, found[1:]))
  assert found[500] == 357  # floor(800 sqrt(0.2)) = floor(357.77)
  assert budget_at(3, 3, budget=9, smallest=4, shrink=0.1) == 4
  assert budget_at(5, 5, budget=49, smallest=1, shrink=1 / 49) == 1
  assert {budget_at(t, 9, budget=7, smallest=1, shrink=1.0) for t in range(20)} == {7}


def test_tiers_change_linearly_from_one_distribution_to_the_other():
  found = np.array([tier_probabilities(t, 100, **TIERS) for t in range(130)])
  np.testing.assert_allclose(found.sum(1), 1)
  assert (found >= 0).all()
  np.testing.assert_allclose(found[:31], [TIERS["early"]] * 31)
  np.testing.assert_allclose(found[70:], [TIERS["late"]] * 60)
  np.testing.assert_allclose(found[50], [0.3, 0.35, 0.35])
  np.testing.assert_allclose(found[40], [0.4, 0.375, 0.225])
  at_once = dict(TIERS, change=(0.5, 0.5))
  np.testing.assert_allclose(tier_probabilities(49, 100, **at_once), TIERS["early"])
  np.testing.assert_allclose(tier_probabilities(50, 100, **at_once), TIERS["late"])


def test_lengths_earn_a_triangle():
  for budget in (1, 3, 160):
    for length in range(3 * budget + 2):
      expected = (length / budget if length <= budget else
                  2 - length / budget if length <= 2 * budget else 0.0)
      assert length_reward(length, budget, 0.7) == pytest.approx(0.7 * expected, abs=1e-12)
    assert max(range(3 * budget), key=lambda n: length_reward(n, budget)) == budget


def batch_of(rng, texts=(False, True, False, True, True)):
  made = []
  for i, is_text in enumerate(texts):
    length = int(rng.integers(3, 9))
    mask = np.arange(length) > 0
    mask[rng.integers(1, length)] &= not is_text  # the token that is thought about
    made.append(Trajectory(np.arange(length), mask, tag_ids=np.full(length, 4 if is_text else 0),
                           group=i, scored=i != 4, weight=float(rng.uniform(0.5, 2))))
  return pack(made, row_length=10, min_rows=8, min_sequences=8)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_imitation_is_of_texts_alone_and_never_of_the_token_that_is_thought_about(aggregation):
  rng = np.random.default_rng(0)
  batch = batch_of(rng)
  logprobs = rng.normal(-2, 1, batch.tokens.shape).astype(np.float32)
  weights, means = loss_weights(batch, aggregation), mean_weights(batch)
  run = sum_of_terms([functools.partial(objectives.next_tokens, coefficient=0.3)])

  def loss(x, rows=slice(None)):
    part = jax.tree.map(lambda y: y[rows] if y.shape[:2] == batch.tokens.shape else y, batch)
    return run(ModelOutputs(logprobs=x), part, weights[rows], means[rows])[0]
  scored = [i for i in range(5) if batch.sequence_mask[i]]
  tokens = {i: np.nonzero((batch.sequence_ids == i) & batch.loss_mask) for i in scored}
  total, gradient = 0.0, np.zeros(batch.tokens.shape)
  for i in scored:
    share = (1 / sum(len(t[0]) for t in tokens.values()) if aggregation == "token_mean"
             else 1 / len(scored) / len(tokens[i][0]))
    for r, c in zip(*tokens[i]):
      if batch.tag_ids[r, c] == 4:
        total -= 0.3 * share * float(batch.weights[i]) * float(logprobs[r, c])
        gradient[r, c] = -0.3 * share * float(batch.weights[i])
  np.testing.assert_allclose(loss(logprobs), total, rtol=1e-5)
  np.testing.assert_allclose(jax.grad(loss)(logprobs), gradient, rtol=1e-5, atol=1e-8)
  parts = sum(loss(logprobs[i:i + 2], slice(i, i + 2)) for i in range(0, len(logprobs), 2))
  np.testing.assert_allclose(parts, total, rtol=1e-5)
  hidden = ~np.asarray(batch.loss_mask)
  assert np.isfinite(loss(jnp.where(hidden, -jnp.inf, logprobs)))


DOCUMENT = "abcdefghij"
# Letters that the reference takes to be equally likely, by the letter that is in question.
CHOICES = dict(zip(DOCUMENT, [1, 1, 1, 1, 2, 2, 2, 8, 8, 8]))


class Reader:
  """Reference and policy as tables: both read the document, the policy thinks too."""

  def __init__(self, completions):
    self.completions, self.probed, self.thought = completions, [], []

  def sample(self, params, requests, base_key, *, on_done=None):
    return [[self._one(params, r, i) for i in range(r.n)] for r in requests]

  def _one(self, params, request, i):
    text = "".join(map(chr, request.prompt))
    if params == "reference":
      assert request.params.max_tokens == 1
      self.probed.append(text)
      letter = DOCUMENT[len(text) - 1]
      return Sample(np.array([ord("z")], np.int32),
                    np.array([-math.log(CHOICES[letter])], np.float32), "length")
    self.thought.append(text)
    target = DOCUMENT[len(text.split("<")[0]) - 1]
    completion = self.completions[i].replace("*", target)
    return Sample(np.array([ord(c) for c in completion], np.int32),
                  np.full(len(completion), -1.0, np.float32), "stop")

  def logprobs(self, params, sequences):
    assert params == "policy"
    return [-0.1 * np.arange(len(s), dtype=np.float32) for s in sequences]


class Judge(TableScorer):
  """1 if the text ends with the answer that the episode gave."""

  def score(self, pairs, *, among=0):
    self.answers = [task.answer for task, _ in pairs]
    return [one for task, t in pairs for one in TableScorer(
        lambda text: text.endswith(f"={task.answer}")).score([(task, t)])]


def play(completions=("xxx=*", "x=!", "xxxxxx"), step=0, tasks=200, memory=None, **options):
  reader, judge = Reader(list(completions)), Judge(None)
  options = dict(dict(SETTINGS, budget=3, shrink=1.0, steps=10, boundary="=", probes=2,
                      first=0, field="text"), **options)
  made = Rollouts(functools.partial(rollouts.predict_tokens, samples=len(completions), **options),
                  reader, Characters(), judge, templates=dict(think="<{budget}>"),
                  likelihood=reader, max_failure_rate=0.0, sampling=SamplingParams(max_tokens=9))
  made.memory.update(memory or {})
  problems = [Task(id=str(i), prompt=[2, *map(ord, "ask")], question="ask", row=dict(text=DOCUMENT))
              for i in range(tasks)]
  found = made.run({"params": "policy"}, problems, base_key=None, key=(step,), step=step,
                   reference={"params": "reference"})
  groups = collections.defaultdict(list)
  for t in found:
    groups[t.task_id].append(t)
  return list(groups.values()), reader, made


def place_of(group):
  """Index in the document of the token that was thought about."""
  return len("".join(map(chr, group[0].tokens[:group[0].prompt_length])).split("<")[0]) - 1


def test_rewards_are_those_of_token_and_length():
  groups, reader, _ = play(length_weight=0.25)
  for *group, text in groups:
    # Three tokens of three and right; one of three and wrong; no end of the thought.
    assert [t.reward for t in group] == pytest.approx([0.75 + 0.25, 0.25 / 3, 0.0])
    assert [t.evidence["thought_tokens"].score for t in group] == [3, 1, 6]
    assert text.reward == pytest.approx(np.mean([t.reward for t in group]))
  assert all(text.endswith("<3>") for text in reader.thought)
  groups, reader, _ = play(step=10, shrink=0.5, budget=6, tasks=2)
  assert reader.thought[0].endswith("<3>")


@pytest.mark.parametrize("step, expected", [(0, (0.5, 0.4, 0.1)), (10, (0.1, 0.3, 0.6))])
def test_tiers_are_drawn_as_the_curriculum_says_and_tokens_evenly_within(step, expected):
  """Known thresholds of 0.5 and 1.5 nats: letters with 1, 2 and 8 choices are the three tiers."""
  memory = dict(difficulty=np.array([0.0, 0.5, 1.5, 3.0], np.float32))
  low, high = thresholds(memory["difficulty"])
  assert math.log(1) <= low < math.log(2) <= high < math.log(8)
  groups, reader, _ = play(step=step, tasks=600, memory=memory, **TIERS)
  assert collections.Counter(reader.probed) == {
      "\x02" + DOCUMENT[:i]: 1200 for i in range(1, 10)} | {"\x02": 1200}
  counts = np.bincount([place_of(g) for g in groups], minlength=10)
  tiers = np.array([counts[:4].sum(), counts[4:7].sum(), counts[7:].sum()])
  assert (np.abs(tiers / 600 - expected) < 4 * np.sqrt(np.array(expected) / 600)).all()
  for members in (counts[:4], counts[4:7], counts[7:]):
    mean = members.mean()
    assert ((members - mean) ** 2 / max(mean, 1)).sum() < 20
  for *group, text in groups:
    tier = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2][place_of(group + [text])]
    assert group[0].evidence["tier"].score == tier
    np.testing.assert_allclose(text.signals["difficulty"][1:],
                               [math.log(CHOICES[c]) for c in DOCUMENT], rtol=1e-6)
    assert all((t.signals["difficulty"] == -1).all() for t in group)


def test_a_tier_that_a_text_lacks_is_not_drawn():
  memory = dict(difficulty=np.array([5.0, 6.0, 7.0], np.float32))  # all of this text is easy
  groups, _, _ = play(memory=memory, early=(0.0, 0.5, 0.5), late=(0.0, 0.5, 0.5))
  assert {g[0].evidence["tier"].score for g in groups} == {0.0}
  groups, _, _ = play(first=4)
  assert {place_of(g) for g in groups} == {4, 5, 6, 7, 8, 9}
  assert play(first=10)[0] == []


def test_the_rest_of_the_text_is_imitated():
  groups, _, _ = play()
  for *group, text in groups:
    assert "".join(map(chr, text.tokens)) == "\x02" + DOCUMENT
    mask = np.ones(11, bool)
    mask[[0, 1 + place_of(group)]] = False
    np.testing.assert_array_equal(text.loss_mask, mask)
    assert (text.tag_ids[1:] == 4).all() and text.tag_ids[0] == 0
    np.testing.assert_allclose(text.behaviour_logprobs[1:], -0.1 * np.arange(1, 11), rtol=1e-6)
    assert text.group != group[0].group and len({t.group for t in group}) == 1
    assert not any((t.tag_ids == 4).any() for t in group)


def test_the_loss_is_the_mean_over_the_group_plus_lambda_times_the_mean_over_the_text():
  groups, _, _ = play(["x=*", "xx=!", "x=*", "xxxxx=!"], tasks=3)
  found = [t for g in groups for t in g]
  batch = pack(found, row_length=32)
  values = advantages.chain.chain([advantages.center_by_group, advantages.scale_by_group_std])(
      batch, batch.rewards)
  rng = np.random.default_rng(5)
  logprobs = jnp.asarray(rng.normal(-1, 0.3, batch.tokens.shape), jnp.float32)
  terms = [functools.partial(objectives.reinforce),
           functools.partial(objectives.next_tokens, coefficient=0.1)]
  weights = loss_weights(batch, "sequence_mean")
  loss, _ = sum_of_terms(terms)(ModelOutputs(logprobs=logprobs), batch.with_signals(
      advantages=values), weights, mean_weights(batch))
  expected = 0.0
  for g in range(3):
    *group, text = range(5 * g, 5 * g + 5)
    rewards = np.array([found[i].reward for i in group])
    advantage = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    per_token = lambda i: np.asarray(logprobs, np.float64)[
        np.asarray((batch.sequence_ids == i) & batch.loss_mask)]
    policy = -np.mean([a * per_token(i).mean() for a, i in zip(advantage, group)])
    expected += (policy - 0.1 * per_token(text).mean()) / 3
  np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_the_edit_remembers_the_last_tokens_and_their_terciles():
  groups, _, made = play(tasks=4)
  step = Step([t for g in groups for t in g], {}, 0, made.memory, {})
  assert remember_difficulty(step, window=25) == step.trajectories
  values = np.log([CHOICES[c] for c in DOCUMENT])
  np.testing.assert_allclose(step.memory["difficulty"], np.concatenate([values] * 4)[-25:],
                             rtol=1e-6)
  remember_difficulty(step, window=90)
  assert len(step.memory["difficulty"]) == 65
  low, high = np.quantile(step.memory["difficulty"], [1 / 3, 2 / 3])
  assert step.metrics == dict(easy_below=pytest.approx(low), hard_above=pytest.approx(high))
  with pytest.raises(ValueError, match="predict_tokens"):
    remember_difficulty(Step([Trajectory([1], [False])], {}, 0, {}, {}))
  with pytest.raises(ValueError, match="window=0"):
    remember_difficulty(step, window=0)


@pytest.mark.parametrize("options, message", [
    (dict(boundary=""), "boundary=''"), (dict(shrink=0.0), "shrink=0.0"),
    (dict(smallest=9), "smallest=9"), (dict(early=(0.5, 0.5)), "early=[0.5, 0.5]"),
    (dict(late=(0.5, 0.4, 0.4)), "late="), (dict(change=(0.7, 0.3)), "change=[0.7, 0.3]"),
    (dict(length_weight=1.5), "length_weight=1.5"), (dict(steps=0), "steps=0")])
def test_bad_settings_are_refused(options, message):
  with pytest.raises(rollouts.EpisodeFailure, match=re.escape(message)):
    play(tasks=1, **options)


def test_the_toy_s_solutions_are_right_and_their_thoughts_near_the_budget():
  data = tasks.open_task("repeated_addition", split="train", size=300, seed=0, digits=2, plain=0.3)
  plain, lengths, last = 0, set(), set()
  for row in data:
    a, b, c, again, d = map(int, re.split(r"[+=]", row["document"]))
    assert a + b == c and b == again and c + b == d
    if row["plain"]:
      plain += 1
      assert row["question"] + row["answer"] == row["document"]
      continue
    text, budget = re.fullmatch(r"(.+?)\+\+(\d)=", row["question"]).groups()
    assert row["document"].startswith(text + row["answer"]) and "=" in text
    thought, _, token = row["solution"].partition("=")
    assert token == row["answer"] and abs(len(thought) - int(budget)) <= 2
    lengths.add(len(thought) - int(budget))
    if text.endswith("=") and len(thought) >= len(str(d)):
      total = c if text.count("=") == 1 else d
      assert thought == str(total)[::-1] + "0" * (len(thought) - len(str(total)))
      last.add(total)
  assert 50 < plain < 130 and lengths == {-2, -1, 0, 1, 2} and len(last) > 5


def test_the_config_builds():
  config = configs.load("configs/methods/rmt.py")
  episode = compose.build(configs.to_dict(config.rollout.episode), rollouts)
  assert compose.signals_of(episode) == ("reference",)
  assert compose.supplied_by(episode) == (("difficulty",), ())
  assert compose.build(configs.to_dict(config.rollout.edits[0]), edits).func is remember_difficulty
  terms = [compose.build(configs.to_dict(t), objectives) for t in config.objective]
  assert [compose.name_of(t) for t in terms] == ["clipped_surrogate", "next_tokens"]
  assert config.rollout.episode.steps == config.rl.steps
