"""Episodes: what they get does not depend on their neighbours."""

import asyncio
import dataclasses
import functools
import threading

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl import rollouts
from jaxrl.batch import Trajectory
from jaxrl.batch import pack
from jaxrl.sampling import Sample

TIMEOUT = 10  # seconds after which a run counts as hanging


def group(samples):
  return functools.partial(rollouts.group, samples=samples)


def outcome(trajectories):
  """What two runs must agree on."""
  return [(t.task_id, t.group, t.tokens.tolist(), t.loss_mask.tolist(), t.reward, t.scored)
          for t in trajectories]


async def many_turns(ctx, task):
  """Branches of different shape and depth, with scores between."""
  async def thread(prompt, turns, pause):
    for _ in range(pause):
      await asyncio.sleep(0)
    for _ in range(turns):
      drafts = await ctx.sample(prompt, n=2)
      await ctx.score(task, drafts)
      prompt = drafts[0].tokens.tolist()
    return await ctx.sample(prompt, train=True)

  async def pair(turns):
    parts = await asyncio.gather(thread(task.prompt, turns, 0), thread(task.prompt, 1, 5))
    return parts[0] + parts[1]

  threads = [pair(1 + len(task.id) % 3), thread(task.prompt, int(task.id[1:]) % 4, 3)]
  parts = await asyncio.gather(*threads)
  return [t for part in parts for t in part]


def test_a_group_is_n_scored_answers_to_the_task_in_order(world, tasks_of):
  tasks = tasks_of(3)
  result = world.run(group(4), tasks)
  assert [t.task_id for t in result] == ["t0"] * 4 + ["t1"] * 4 + ["t2"] * 4
  assert [len({t.group for t in result[i:i + 4]}) for i in (0, 4, 8)] == [1, 1, 1]
  assert len({t.group for t in result}) == 3
  assert len(world.sampler.calls) == 1 and len(world.scorer.calls) == 1
  for t, task in zip(result, [task for task in tasks for _ in range(4)]):
    assert t.tokens[:2].tolist() == task.prompt and t.prompt_length == 2
    assert t.loss_mask.tolist() == [False, False, True, True, True]
    np.testing.assert_array_equal(t.behaviour_logprobs, np.float32([0, 0, -.5, -.5, -.5]))
    assert t.text == "".join(map(chr, t.tokens[2:]))
    assert t.scored and t.reward == (sum(t.tokens[2:]) % 2 == 0) and "even" in t.evidence


def test_every_sample_has_randomness_of_its_own(world):
  result = world.run(group(4), 3)
  assert len({t.text for t in result}) > 6
  keys = {r.key for call in world.sampler.calls for r in call}
  world.run(group(4), 3, first_episode=3)  # a second round of the same step
  world.run(group(4), 3, key=(0, 1))  # the next step
  world.run(group(4), 3, key=(1, 0))  # another phase
  later = [r.key for call in world.sampler.calls[1:] for r in call]
  assert len(set(later)) == 9 and not keys & set(later)


def test_requests_of_one_episode_have_different_keys(world):
  async def three_times(ctx, task):
    first = await ctx.sample(task.prompt)
    both = await asyncio.gather(ctx.sample(task.prompt), ctx.sample(task.prompt))
    return first + both[0] + both[1] + await ctx.sample(task.prompt)

  result = world.run(three_times, 2)
  assert len({r.key for call in world.sampler.calls for r in call}) == 8
  assert len({t.text for t in result}) == 8


@hypothesis.settings(max_examples=15, deadline=None,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.lists(st.booleans(), min_size=5, max_size=5))
def test_what_an_episode_gets_does_not_depend_on_its_neighbours(world, tasks_of, split):
  world.reports.clear()
  together = outcome(world.run(many_turns, 6))
  tasks = tasks_of(6)
  apart, start = [], 0
  for end in [i + 1 for i, cut in enumerate(split) if cut] + [6]:
    apart += outcome(world.run(many_turns, tasks[start:end], first_episode=start))
    start = end
  assert apart == together and not world.reports


def test_samples_do_not_depend_on_how_long_tools_take(world):
  def with_pauses(pauses):
    async def episode(ctx, task):
      async def branch(pause):
        await asyncio.sleep(pause)
        first = await ctx.sample(task.prompt)
        await asyncio.sleep(pause)
        return first + await ctx.sample(task.prompt, train=True)
      return sum(await asyncio.gather(*map(branch, pauses)), [])
    return episode

  slow_first = outcome(world.run(with_pauses([0.02, 0.0, 0.01]), 2))
  slow_last = outcome(world.run(with_pauses([0.0, 0.01, 0.02]), 2))
  assert slow_first == slow_last


def test_requests_of_all_waiting_episodes_are_one_batch(world):
  async def nested(ctx, task):
    async def inner():
      return sum(await asyncio.gather(*[ctx.sample(task.prompt) for _ in range(2)]), [])
    parts = await asyncio.gather(inner(), inner())
    return parts[0] + await ctx.sample(task.prompt)

  world.run(nested, 5)
  assert [len(call) for call in world.sampler.calls] == [20, 5]


def test_an_episode_that_awaits_the_world_is_waited_for(world):
  async def some_call_a_tool(ctx, task):
    if task.id == "t1":
      await asyncio.sleep(0.02)
    return await ctx.sample(task.prompt, n=2, train=True)

  world.run(some_call_a_tool, 3)
  assert [len(call) for call in world.sampler.calls] == [3]


def test_an_abandoned_request_is_not_sampled_and_blocks_nobody(world):
  async def impatient(ctx, task):
    if task.id == "t0":
      try:
        await asyncio.wait_for(ctx.sample(task.prompt, n=7), timeout=0.01)
      except TimeoutError:
        pass
      await asyncio.sleep(0.05)
    else:
      await asyncio.sleep(0.03)
    return await ctx.sample(task.prompt, n=2, train=True)

  result = world.run(impatient, 3)
  assert len(result) == 6
  assert [[r.n for r in call] for call in world.sampler.calls] == [[2, 2, 2]]


def test_requests_left_behind_by_an_episode_that_ended_are_dropped(world):
  async def hasty(ctx, task):
    if task.id == "t0":
      asyncio.ensure_future(ctx.sample(task.prompt, n=7))
      await asyncio.sleep(0)
      return []
    return await ctx.sample(task.prompt, n=2, train=True)

  assert len(world.run(hasty, 2)) == 2
  assert [[r.n for r in call] for call in world.sampler.calls] == [[2]]


def test_a_later_turn_sees_earlier_samples_and_trains_on_its_own(world):
  async def two_turns(ctx, task):
    first, = await ctx.sample(task.prompt)
    context = first.tokens.tolist() + ctx.encode("!")
    return await ctx.sample(context, n=2, train=True)

  result = world.run(two_turns, 2)
  assert [len(t.tokens) for t in result] == [9] * 4
  for t in result:
    assert t.tokens[5] == ord("!") and t.prompt_length == 6
    assert t.loss_mask.tolist() == [False] * 6 + [True] * 3
    assert not t.behaviour_logprobs[:6].any()
    assert world.scorer.calls[-1].count((t.task_id, t.text)) == 1


async def draft_then_refine(ctx, task, *, drafts, refinements):
  """iGRPO (arXiv:2602.09000), as in the design."""
  attempts = await ctx.sample(task.prompt, n=drafts)
  scores = await ctx.score(task, attempts)
  best = attempts[scores.argmax()]
  prompt = task.prompt + ctx.render("refine", draft=best.text)
  return await ctx.sample(prompt, n=refinements, train=True)


def test_drafts_are_scored_and_refined(world):
  episode = functools.partial(draft_then_refine, drafts=4, refinements=3)
  result = world.run(episode, 5, templates=dict(refine=" draft: {draft}. Better: "))
  assert len(result) == 15 and all(t.scored and t.loss_mask.any() for t in result)
  drafts, refinements = world.scorer.calls
  assert len(drafts) == 20 and len(refinements) == 15
  scores = {}
  for task_id, text in drafts:
    scores.setdefault(task_id, []).append((sum(map(ord, text)) % 2 == 0, text))
  for t in result:
    context = "".join(map(chr, t.tokens[:t.prompt_length]))
    used = context.split("draft: ")[1].split(".")[0]
    assert (max(even for even, _ in scores[t.task_id]), used) in scores[t.task_id]


def test_a_draft_without_a_score_is_not_the_best_one(world):
  seen = []

  async def best_draft(ctx, task):
    attempts = await ctx.sample(task.prompt, n=8)
    worst = min(attempts, key=lambda t: t.text)
    world.scorer.broken = lambda text: text != worst.text
    scores = await ctx.score(task, attempts)
    seen.append((scores, attempts, worst))
    return []

  world.run(best_draft, 1)
  (scores, attempts, worst), = seen
  assert scores.count() == 1 and attempts[scores.argmax()] is worst
  assert scores.mean() == worst.reward


def test_what_an_episode_scored_is_not_scored_again(world):
  async def scores_its_own(ctx, task):
    attempts = await ctx.sample(task.prompt, n=2, train=True)
    await ctx.score(task, attempts)
    return attempts

  world.run(scores_its_own, 3)
  assert [len(call) for call in world.scorer.calls] == [6]


def test_unscorable_trajectories_stay_and_say_so(world):
  world.scorer.broken = lambda text: True
  result = world.run(group(2), 2)
  assert [t.scored for t in result] == [False] * 4
  assert not pack(result).loss_mask.any()


def test_an_episode_may_number_groups_of_its_own(world):
  async def two_groups(ctx, task):
    result = await ctx.sample(task.prompt, n=4, train=True)
    for i, t in enumerate(result):
      t.group = i // 2
    return result

  groups = [t.group for t in world.run(two_groups, 3)]
  assert [groups.count(g) for g in groups] == [2] * 12


def test_trajectories_without_loss_tokens_are_kept(world):
  async def looks(ctx, task):
    return await ctx.sample(task.prompt, n=2)

  result = world.run(looks, 2)
  assert len(result) == 4 and not any(t.loss_mask.any() for t in result)


def test_the_text_ends_before_the_stop_token(world):
  sample = Sample(np.array([*b"hi", 3], np.int32), np.zeros(3, np.float32), "stop")
  world.sampler.sample = lambda *_: [[sample]]
  t, = world.run(group(1), 1, stop_ids=(3,))
  assert t.text == "hi" and t.loss_mask.tolist() == [False, False, True, True, True]


def test_the_step_is_shown_to_episodes(world):
  seen = []

  async def curious(ctx, task):
    seen.append(ctx.step)
    return await ctx.sample(task.prompt, train=True)

  world.run(curious, 1, step=7)
  assert seen == [7]


def test_a_run_inside_a_running_event_loop_is_the_same(world):
  expected = outcome(world.run(many_turns, 4))

  async def notebook_cell():
    return world.run(many_turns, 4)

  assert outcome(asyncio.run(notebook_cell())) == expected


def test_no_tasks_give_no_trajectories(world):
  assert world.run(group(2), 0) == [] and not world.sampler.calls


def test_what_has_ended_is_judged_while_the_rest_is_sampled(world, tasks_of):
  """The sampler goes on only once the first group has been judged."""
  world.scorer.has_workers = True
  judged = threading.Event()
  score = world.scorer.score

  def noted(pairs, **options):
    judged.set()
    return score(pairs, **options)
  world.scorer.score = noted
  waited = []
  world.sampler.after_delivery = lambda index: waited.append(judged.wait(TIMEOUT))
  result = world.run(group(4), tasks_of(3))
  assert waited == [True, True]
  assert [t.evidence["even"].score for t in result] == [t.reward for t in result]
  assert len(world.scorer.calls) == 3


@pytest.mark.parametrize("episode", [group(3), many_turns])
def test_judging_early_changes_no_result_and_no_batch_of_requests(world, tasks_of, episode):
  expected = outcome(world.run(episode, tasks_of(5)))
  requests = [[r.key for r in call] for call in world.sampler.calls]
  world.sampler.calls.clear()
  world.scorer.has_workers = True
  assert outcome(world.run(episode, tasks_of(5))) == expected
  assert [sorted(r.key for r in call) for call in world.sampler.calls] == [
      sorted(keys) for keys in requests]


def test_a_reward_that_fails_early_stops_the_run(world, tasks_of):
  world.scorer.has_workers = True
  world.scorer.error = RuntimeError("the judge is broken")
  with pytest.raises(RuntimeError, match="the judge is broken"):
    world.run(group(2), tasks_of(3))


def test_the_end_of_a_run_does_not_put_its_trajectories_into_words(world, monkeypatch):
  """`asyncio.run` has the repr of its finished task made; with arrays in it that takes long."""
  def refuse(self):
    raise AssertionError("a trajectory was put into words")
  monkeypatch.setattr(Trajectory, "__repr__", refuse)
  assert len(world.run(group(2), 3)) == 6


def test_choices_of_an_episode_follow_seed_step_episode_and_salt_and_nothing_else(world):
  def drawn(seed, step, salt=()):
    found = []

    async def episode(ctx, task):
      first, again = ctx.rng(*salt).random(), ctx.rng(*salt).random()
      assert first == again
      found.append(first)
      return await ctx.sample(task.prompt, train=True)
    world.run(episode, tasks=3, step=step, seed=seed)
    return tuple(found)
  runs = [drawn(0, 0), drawn(1, 0), drawn(0, 1), drawn(0, 0, (5,))]
  assert drawn(0, 0) == runs[0]
  assert len({x for run in runs for x in run}) == 4 * 3


def test_all_samples_are_counted_whatever_becomes_of_them(world, tasks_of):
  async def episode(ctx, task):
    drafts = await ctx.sample(task.prompt, n=4)
    return await ctx.sample(drafts[0].tokens.tolist(), n=2, train=True)
  rollouts_ = world.rollouts(episode)
  for calls in (1, 2):
    rollouts_.run({"params": None}, tasks_of(3), base_key="base", key=(0, calls))
    sequences, tokens = rollouts_.drawn
    assert sequences == calls * 3 * (4 + 2) and tokens == 3 * sequences


def test_a_solution_is_written_anew_and_ends_as_answers_do(world, tasks_of):
  """Whatever a chat template wrote for the solution that the task was read with."""
  async def imitated(ctx, task):
    return [ctx.solved(dataclasses.replace(task, solution="no", reply=[7, 7], said=[True] * len(task.prompt)))]
  tasks = tasks_of(1)
  t, = world.run(imitated, tasks, end_id=ord("$"))
  assert list(map(chr, t.tokens)) == [*"0?no$"]
  assert t.loss_mask.tolist() == [False, False, True, True, True]
