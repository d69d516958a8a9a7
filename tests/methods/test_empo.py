"""EMPO: clusters, rewards and gates by hand, and the gradient that they give on average."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from jaxrl import advantages, compose
from jaxrl import config as configs
from jaxrl.batch import Task, Trajectory, pack
from jaxrl.rollouts import edits, semantic

TASK = Task(id="q", prompt=[1], answer="7")


def step_of(groups, task=TASK, scored=None):
  """A batch with these texts by group."""
  trajectories = [Trajectory([1, 2], [False, True], group=g, text=text, task_id=task.id, reward=0.5)
                  for g, texts in enumerate(groups) for text in texts]
  for t, one in zip(trajectories, scored if scored is not None else [True] * len(trajectories)):
    t.scored = bool(one)
  return edits.Step(trajectories, {task.id: task}, 0, {}, {})


def rewards_of(groups, **options):
  step = step_of(groups)
  found = [t.reward for t in semantic.semantic_frequency(step, **options)]
  return found, step.metrics


@pytest.mark.parametrize("seed", range(5))
def test_rewards_and_entropy_are_those_of_the_counts(seed):
  rng = np.random.default_rng(seed)
  groups = [[str(x) for x in rng.integers(0, 4, rng.integers(1, 9))] for _ in range(12)]
  scored = rng.random(sum(map(len, groups))) < 0.8
  step = step_of(groups, scored=scored)
  result = semantic.semantic_frequency(step)
  at, entropies, collisions = 0, [], []
  for texts in groups:
    mask = scored[at:at + len(texts)]
    kept = [t for t, m in zip(texts, mask) if m]
    for i, (text, m) in enumerate(zip(texts, mask)):
      assert result[at + i].scored == m
      assert result[at + i].reward == pytest.approx(kept.count(text) / len(kept) if m else 0.5)
    if kept:
      p = np.unique(kept, return_counts=True)[1] / len(kept)
      entropies.append(-(p * np.log(p)).sum())
      own = [r.reward for r, m in zip(result[at:at + len(texts)], mask) if m]
      assert np.mean(own) == pytest.approx((p ** 2).sum())
    at += len(texts)
  assert step.metrics["semantic_entropy"] == pytest.approx(np.mean(entropies))


def test_equal_values_written_differently_are_one_answer():
  texts = ["so it is #1/2", "#0.5", "#3", "#7", "nothing", "#2 no, #.5"]
  judge = dict(name="numeric_answer")
  found, metrics = rewards_of([texts], judge=judge, pattern=r"#(\S+)")
  np.testing.assert_allclose(found, [3 / 6, 3 / 6, 1 / 6, 1 / 6, 0, 3 / 6])
  assert metrics["semantic_entropy"] == pytest.approx(0.5 * math.log(2) + 3 * math.log(6) / 6)


def test_empty_answers_match_nothing_and_earn_nothing():
  found, metrics = rewards_of([["", "", "", "4"]])
  assert found == [0, 0, 0, 0.25]
  assert metrics["semantic_entropy"] == pytest.approx(math.log(4))


def test_an_answer_joins_the_first_cluster_whose_first_answer_is_near():
  values = [1.0, 1.4, 1.8, 1.3, 2.1]
  near = lambda i, j: abs(values[i] - values[j]) <= 0.5
  # 1.4 is near 1.0; 1.8 is near 1.4, but not near the first of that cluster; 1.3 is near both.
  assert semantic.clusters(list(map(str, values)), near) == [0, 0, 1, 0, 1]


def test_labels_change_nothing():
  groups = [["7", "7", "8"], ["8", "8", "9"]]
  other = dataclasses.replace(TASK, answer="9")
  both = [[t.reward for t in semantic.semantic_frequency(step_of(groups, task))]
          for task in (TASK, other)]
  assert both[0] == both[1]


GROUPS = [["a"] * 4, ["a", "a", "a", "b"], ["a", "a", "b", "b"], ["a", "a", "b", "c"],
          ["a", "b", "c", "d"]]  # entropies 0, .562, .693, 1.040, 1.386


@pytest.mark.parametrize("gate,left_out", [
    (dict(), []), (dict(min_entropy=0.0), [0]), (dict(max_entropy=math.log(4)), [4]),
    (dict(min_entropy=0.6, max_entropy=1.2), [0, 1, 4]), (dict(min_confidence=0.5), [4]),
    (dict(min_confidence=0.51, min_entropy=0.0), [0, 2, 3, 4])])
def test_a_gated_group_gets_no_reward_and_so_no_gradient(gate, left_out):
  found, metrics = rewards_of(GROUPS, **gate)
  free, _ = rewards_of(GROUPS)
  assert metrics["semantic_gated"] == pytest.approx(len(left_out) / 5)
  for g in range(5):
    own = found[4 * g:4 * g + 4]
    assert own == ([0.0] * 4 if g in left_out else free[4 * g:4 * g + 4])


def test_the_expected_gradient_is_that_of_the_chance_to_agree():
  """All 3^G groups of a softmax policy, with the rewards and the baseline of the package."""
  p = np.array([0.5, 0.3, 0.2])
  score = np.eye(3) - p  # gradient of log p_k in the logits, by k
  collision = 2 * p * (p - (p ** 2).sum())  # gradient of sum p^2
  for size in (2, 3, 5):
    combinations = list(itertools.product(range(3), repeat=size))
    result = semantic.semantic_frequency(step_of([map(str, c) for c in combinations]))
    batch = pack(result, row_length=1024)
    centred = np.asarray(advantages.center_by_group(batch, batch.rewards))
    plain, baselined = np.zeros(3), np.zeros(3)
    for n, answers in enumerate(combinations):
      chance = np.prod(p[list(answers)])
      for i, k in enumerate(answers):
        plain += chance * result[n * size + i].reward * score[k] / size
        baselined += chance * float(centred[n * size + i]) * score[k] / size
    expected = (size - 1) / size * collision / 2
    np.testing.assert_allclose(plain, expected, atol=1e-7)
    np.testing.assert_allclose(baselined, (1 - 2 / size) * expected, atol=1e-6)


@pytest.mark.parametrize("start,right,final", [([0.45, 0.3, 0.25], 0, 1.0),
                                               ([0.3, 0.45, 0.25], 0, 0.0)])
def test_the_first_mode_wins_right_or_wrong(start, right, final):
  """The natural gradient of the expected reward, in small steps with large groups."""
  p = np.array(start)
  for _ in range(400):
    counts = np.round(p * 60).astype(int)
    texts = [str(k) for k in range(3) for _ in range(counts[k])]
    found, _ = rewards_of([texts])
    by_answer = {text: reward for text, reward in zip(texts, found)}
    reward = np.array([by_answer.get(str(k), 0.0) for k in range(3)])
    p = p + 0.2 * p * (reward - (p * reward).sum())
  assert p[right] == pytest.approx(final, abs=0.02)


def test_nothing_scored_changes_nothing():
  step = step_of([["1", "1"]], scored=[False, False])
  assert [t.reward for t in semantic.semantic_frequency(step)] == [0.5, 0.5] and not step.metrics


@pytest.mark.parametrize("options,message", [
    (dict(pattern="a"), "has 0 groups"), (dict(pattern="("), "not a regular expression"),
    (dict(min_entropy=1.0, max_entropy=0.5), "make the first less"),
    (dict(min_confidence=2.0), "the last 0 to 1"), (dict(judge="same"), "has no 'same'")])
def test_arguments_that_make_no_sense_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    rewards_of([["1"]], **options)


def test_the_config_replaces_the_reward_of_labels():
  config = configs.load("configs/methods/empo.py")
  edit, = [compose.build(dict(e), edits) for e in config.rollout.edits]
  assert not config.rollout.filter_zero_variance  # which would look at labels
  step = step_of([["975", "975", "965", "7"]])
  assert [t.reward for t in edits.apply([edit], step)] == [0.5, 0.5, 0.25, 0.25]
