"""Batches in order, continued anywhere, and what is logged about rollouts."""

import json
import math

import numpy as np
import pytest

from jaxrl import data, tasks
from jaxrl.batch import Trajectory
from jaxrl.rewards import Criterion, Scored
from jaxrl.rollouts import Rollouts, group
from jaxrl.sampling import Sample, SamplingParams
from jaxrl.training import supply

TOKENIZER = data.CharacterTokenizer("0123456789+=")


def stream(seed=0):
  source = tasks.open_task("addition", split="train", size=40, seed=0, digits=2)
  builder = data.TaskBuilder(TOKENIZER, data.Fields(solution="solution"))
  return data.tasks_pipeline(source, builder.read_solved, seed=seed)


def examples():
  return supply.Examples(stream(), lambda tasks: [data.supervised(t, TOKENIZER) for t in tasks], 3)


class World:
  """Sampler and scorer: letters from the key; rewards alternate within a group for odd answers."""

  def sample(self, params, requests, base_key):
    return [[Sample(np.array([3 + (sum(r.key) * 7 + i * 3) % 12, 2], np.int32),
                    np.full(2, -1.0, np.float32), "stop") for i in range(r.n)] for r in requests]

  has_workers = False

  def score(self, pairs, *, among=0):
    rewards = [float(i % 2) if int(task.answer) % 2 else 1.0 for i, (task, _) in enumerate(pairs)]
    return [Scored(r, True, {"right": Criterion(r)}) for r in rewards]


async def pair(ctx, task):
  return await group(ctx, task, samples=2)


def rollouts(**options):
  options = dict(prompts=4, key=(0, 1), filter_zero_variance=False, max_resample=0) | options
  world = World()
  return supply.GroupsOfRollouts(
      stream(), Rollouts(pair, world, TOKENIZER, world, sampling=SamplingParams(max_tokens=4)),
      base_key="base", **options)


def contents(supplied):
  return [(t.task_id, t.tokens.tolist(), t.reward) for t in supplied.trajectories]


def test_examples_imitate_the_solutions_of_the_stream():
  supplied = examples().next(None, 0)
  assert len(supplied.trajectories) == 3 and supplied.metrics == {} == supplied.tasks
  for trajectory, task in zip(supplied.trajectories, stream()):
    completion = TOKENIZER.encode(task.solution) + [TOKENIZER.eos_id]
    assert trajectory.tokens.tolist() == task.prompt + completion
    assert trajectory.loss_mask.sum() == len(completion)


@pytest.mark.parametrize("make", [
    examples, rollouts, lambda: rollouts(filter_zero_variance=True, max_resample=3)])
def test_a_supply_continues_from_any_batch(make):
  params = {"params": None}
  whole, first = make(), make()
  batches = [contents(whole.next(params, step)) for step in range(30)]  # more than an epoch
  assert len({str(b) for b in batches}) == 30
  for step in range(9):
    assert contents(first.next(params, step)) == batches[step]
  state = json.loads(json.dumps(first.get_state()))
  second = make()
  second.set_state(state)
  for step in range(9, 30):
    assert contents(second.next(params, step)) == batches[step]


def test_what_was_prefetched_is_no_part_of_the_position():
  whole, early = examples(), examples()
  batches = [contents(whole.next(None, step)) for step in range(6)]
  early.prefetch()
  assert early.get_state() == examples().get_state()
  for step in range(3):
    early.prefetch()
    assert contents(early.next(None, step)) == batches[step]
    early.prefetch()
  state = json.loads(json.dumps(early.get_state()))
  for resumed in (examples(), early):  # into a new one, and over what has been prefetched
    resumed.set_state(state)
    assert [contents(resumed.next(None, step)) for step in range(3, 6)] == batches[3:]


def test_what_goes_wrong_early_is_raised_where_it_belongs():
  made = []

  def to_trajectories(tasks):
    made.append(len(tasks))
    if len(made) == 2:
      raise ArithmeticError("the second batch")
    return [data.supervised(t, TOKENIZER) for t in tasks]
  early = supply.Examples(stream(), to_trajectories, 3)
  first = early.next(None, 0)
  early.prefetch()  # says nothing
  assert len(first.trajectories) == 3 and made == [3, 3]
  with pytest.raises(ArithmeticError, match="the second batch"):
    early.next(None, 1)


def test_samples_depend_on_the_phase_and_the_step():
  params = {"params": None}
  same = [contents(rollouts(key=(0, phase)).next(params, step)) for phase, step in
          [(1, 0), (1, 0), (1, 1), (2, 0)]]
  assert same[0] == same[1] and same[0] != same[2] and same[0] != same[3]


def test_groups_are_counted_before_filtering():
  params = {"params": None}
  plain = rollouts(prompts=8).next(params, 0)
  differing = len({t.task_id for t in plain.trajectories if int(plain.tasks[t.task_id].answer) % 2})
  assert 0 < differing < 8
  assert plain.metrics["groups"] == 8 and len(plain.trajectories) == 16
  assert plain.metrics["sampled_sequences"] == 16
  assert plain.metrics["sampled_tokens"] == sum(int(t.loss_mask.sum()) for t in plain.trajectories)
  assert plain.metrics["effective_group_fraction"] == differing / 8
  filtered = rollouts(prompts=8, filter_zero_variance=True, max_resample=0).next(params, 0)
  assert filtered.metrics["groups"] == 8 and len(filtered.trajectories) == 2 * differing
  assert filtered.metrics["effective_group_fraction"] == differing / 8
  assert filtered.metrics["rollout_seconds"] >= 0


def trajectory(tokens=2, *, reward=0.0, scored=True, finish="stop", **evidence):
  return Trajectory(np.arange(3 + tokens), np.arange(3 + tokens) >= 3, reward=reward,
                    scored=scored, finish=finish, evidence=evidence)


def test_metrics_are_means_over_what_has_a_reward():
  good, bad, none = Criterion(1.0), Criterion(0.0), Criterion(0.0, "unscorable")
  metrics = supply.rollout_metrics([
      trajectory(2, reward=1.0, right=good, short=bad),
      trajectory(4, reward=0.5, right=good, short=none, finish="length"),
      trajectory(6, reward=0.0, right=bad, short=good),
      trajectory(8, reward=9.0, scored=False, right=none, short=good, finish="length")])
  assert metrics == pytest.approx({
      "reward": 0.5, "reward_std": math.sqrt(1 / 6), "response_tokens": 5.0,
      "response_tokens_max": 8.0, "truncated": 0.5, "unscored": 0.25, "criteria/right": 2 / 3,
      "criteria/short": 0.5})


def test_criteria_that_the_first_sequence_lacks_are_logged_too():
  """Such as the rounds of a trajectory, which its last round holds."""
  metrics = supply.rollout_metrics([trajectory(handed_on=Criterion(1.0)), trajectory(rounds=Criterion(2.0)),
                                    trajectory(handed_on=Criterion(0.0)), trajectory(rounds=Criterion(3.0))])
  assert (metrics["criteria/handed_on"], metrics["criteria/rounds"]) == (0.5, 2.5)


def test_nothing_scored_gives_nan_and_nothing_at_all_no_error(recwarn):
  metrics = supply.rollout_metrics([trajectory(scored=False)])
  assert math.isnan(metrics["reward"]) and math.isnan(metrics["reward_std"])
  assert metrics["unscored"] == 1.0 and not any(m.startswith("criteria/") for m in metrics)
  assert supply.rollout_metrics([])["response_tokens_max"] == 0.0
  assert not recwarn.list
