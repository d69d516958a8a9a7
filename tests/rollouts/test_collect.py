"""Batches of groups: what is kept, what is drawn again, and what is counted."""

import functools

import numpy as np
import pytest

from jaxrl import rollouts
from jaxrl.rewards import Criterion, Scored
from jaxrl.rollouts import EpisodeFailure, collect


class Stream:
  """Tasks `t0, t1, ...`; remembers how many were asked for each time."""

  def __init__(self, tasks_of, ids=None):
    self.tasks_of, self.ids, self.drawn, self.asked = tasks_of, ids, 0, []

  def __call__(self, count):
    self.asked.append(count)
    start, self.drawn = self.drawn, self.drawn + count
    if self.ids is None:
      return self.tasks_of(count, start)
    return [self.tasks_of(1, i)[0] for i in self.ids[start:start + count]]


@pytest.fixture
def run(world, tasks_of):
  """`run(rewards)`: the group of the i-th task gets the rewards `rewards(i)`; None is unscored."""
  def run(rewards, *, prompts, episode=None, ids=None, punished=0.0, **options):
    counts = {}

    def score(pairs):
      scored = []
      for task, _ in pairs:
        given = rewards(int(task.id[1:]))
        at = counts[task.id] = counts.get(task.id, -1) + 1
        value = given[at % len(given)]
        scored.append(Scored((value or 0.0) - punished * at, value is not None,
                             {"given": Criterion(value or 0.0, "ok" if value is not None
                                                 else "unscorable")}))
      return scored

    world.scorer.score = score
    stream = Stream(tasks_of, ids)
    episode = episode or functools.partial(rollouts.group, samples=2)
    collected = collect(world.rollouts(episode), {"params": None}, stream, prompts=prompts,
                        base_key="base", key=(0, 0), step=0, **options)
    return collected, stream.asked
  return run


def ids(collected):
  return list(dict.fromkeys(t.task_id for t in collected.trajectories))


def every_third(i):
  return (0.0, 1.0) if i % 3 == 0 else (1.0, 1.0)


def test_without_the_filter_every_group_is_kept_and_counted(run):
  collected, asked = run(every_third, prompts=6)
  assert ids(collected) == [f"t{i}" for i in range(6)] and asked == [6]
  assert len(collected.trajectories) == 12
  assert (collected.groups, collected.effective_groups) == (6, 2)
  assert set(collected.tasks) == set(ids(collected))


def test_groups_that_teach_nothing_are_replaced(run):
  collected, asked = run(every_third, prompts=3, filter_zero_variance=True, max_resample=5)
  assert asked == [3, 3, 3]
  assert ids(collected) == ["t0", "t3", "t6"]
  rewards = {}
  for t in collected.trajectories:
    rewards.setdefault(t.group, set()).add(t.reward)
  assert all(len(r) == 2 for r in rewards.values()) and len(rewards) == 3


def test_what_differs_may_be_one_criterion_of_the_reward(run):
  """Every sample is punished differently, but only every third task has one that is right."""
  options = dict(prompts=3, filter_zero_variance=True, max_resample=5, punished=0.1)
  collected, _ = run(every_third, **options)
  assert ids(collected) == ["t0", "t1", "t2"]
  collected, asked = run(every_third, filter_by="given", **options)
  assert ids(collected) == ["t0", "t3", "t6"] and asked == [3, 3, 3]
  assert (collected.groups, collected.effective_groups) == (9, 3)
  collected, _ = run(lambda i: (None, 1.0) if i else (0.0, 1.0), filter_by="given", **{**options, "prompts": 2})
  assert ids(collected) == ["t0"], "what cannot be judged does not differ"


def test_samples_that_left_the_statistics_differ_from_nobody(run):
  async def half(ctx, task):
    found = await rollouts.group(ctx, task, samples=2)
    await ctx.score(task, found)
    found[1].scored = int(task.id[1:]) == 0
    return found
  collected, _ = run(lambda i: (0.0, 1.0), prompts=2, episode=half, filter_zero_variance=True, filter_by="given")
  assert ids(collected) == ["t0"]


def test_resampling_is_bounded_and_a_short_batch_is_accepted(run):
  collected, asked = run(lambda i: (0.0, 1.0) if i == 0 else (0.0, 0.0), prompts=4,
                         filter_zero_variance=True, max_resample=2)
  assert asked == [4, 4, 4] and ids(collected) == ["t0"]
  assert (collected.groups, collected.effective_groups) == (12, 1)


def test_what_the_last_round_brings_too_many_is_dropped(run):
  collected, asked = run(lambda i: (0.0, 1.0) if i in (1, 3, 4, 5) else (0.0, 0.0), prompts=3,
                         filter_zero_variance=True, max_resample=5)
  assert asked == [3, 3] and ids(collected) == ["t1", "t3", "t4"]
  assert (collected.groups, collected.effective_groups) == (6, 4)


def test_if_no_group_differs_the_last_round_is_kept(run):
  collected, asked = run(lambda i: (1.0, 1.0), prompts=2, filter_zero_variance=True,
                         max_resample=2)
  assert asked == [2, 2, 2] and ids(collected) == ["t4", "t5"]
  assert (collected.groups, collected.effective_groups) == (6, 0)


def test_unscored_samples_do_not_make_a_group_differ(run):
  rewards = [(None, None), (1.0, None), (None, 0.0), (0.0, 1.0)]
  collected, _ = run(lambda i: rewards[i], prompts=4, filter_zero_variance=True)
  assert ids(collected) == ["t3"] and collected.effective_groups == 1
  collected, _ = run(lambda i: rewards[i], prompts=4)
  assert ids(collected) == ["t0", "t1", "t2", "t3"] and collected.effective_groups == 1


def test_a_task_that_comes_again_is_a_group_of_its_own_with_other_samples(run):
  again = [0, 0, 1, 0, 1, 0]
  collected, asked = run(lambda i: (0.0, 1.0) if i == 0 else (0.0, 0.0), prompts=3, ids=again,
                         filter_zero_variance=True, max_resample=1)
  assert asked == [3, 3] and ids(collected) == ["t0"]
  groups = {}
  for t in collected.trajectories:
    groups.setdefault(t.group, []).append(t.text)
  assert len(groups) == 3 and all(len(texts) == 2 for texts in groups.values())
  assert len({text for texts in groups.values() for text in texts}) == 6


async def three_groups(ctx, task):
  result = await ctx.sample(task.prompt, n=6, train=True)
  for i, t in enumerate(result):
    t.group = i // 2
  return result


def test_prompts_are_counted_in_tasks_where_an_episode_gives_several_groups(run):
  collected, asked = run(lambda i: (0.0, 1.0) if i % 2 else (0.0, 0.0), prompts=4,
                         episode=three_groups, filter_zero_variance=True, max_resample=5)
  assert asked == [4, 4]  # t1 and t3 gave three groups each, and two tasks were wanted still
  assert len(ids(collected)) == 4 and len(collected.trajectories) == 24
  assert collected.effective_groups == 12


async def one_beside_a_group(ctx, task):
  result = await ctx.sample(task.prompt, n=3, train=True)
  result[2].group = 1
  return result


def test_a_sequence_alone_stays_with_the_group_that_it_belongs_to(run):
  collected, _ = run(lambda i: (0.0, 1.0, 0.0) if i == 1 else (0.0, 0.0, 1.0), prompts=2,
                     episode=one_beside_a_group, filter_zero_variance=True)
  assert ids(collected) == ["t1"] and len(collected.trajectories) == 3
  assert (collected.groups, collected.effective_groups) == (4, 1)


async def nothing(ctx, task):
  return []


def test_episodes_that_never_return_anything_stop_the_run(run):
  for options in ({}, dict(filter_zero_variance=True, max_resample=1)):
    with pytest.raises(EpisodeFailure, match="none of .* episodes returned a trajectory"):
      run(every_third, prompts=2, episode=nothing, **options)


async def sometimes_nothing(ctx, task):
  return [] if task.id in ("t2", "t3") else await ctx.sample(task.prompt, n=2, train=True)


def test_an_empty_last_round_leaves_the_round_before(run):
  collected, _ = run(lambda i: (1.0, 1.0), prompts=2, episode=sometimes_nothing,
                     filter_zero_variance=True, max_resample=1)
  assert ids(collected) == ["t0", "t1"]


def test_the_same_call_gives_the_same_batch(run):
  one, _ = run(every_third, prompts=3, filter_zero_variance=True, max_resample=5)
  two, _ = run(every_third, prompts=3, filter_zero_variance=True, max_resample=5)
  for a, b in zip(one.trajectories, two.trajectories, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
