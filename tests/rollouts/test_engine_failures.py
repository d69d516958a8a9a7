"""Episodes that break: what broke is named, and only as much is lost as was said to be bearable."""

import asyncio
import functools
import threading

import pytest

from jaxrl import rollouts
from jaxrl.rollouts import EpisodeFailure
from jaxrl.rollouts.engine import GROUPS_PER_EPISODE

TIMEOUT = 10  # seconds after which a run counts as hanging


def group(samples):
  return functools.partial(rollouts.group, samples=samples)


async def _raises(ctx, task):
  await ctx.sample(task.prompt)
  raise KeyError("no such tool")


async def _returns_text(ctx, task):
  return "done"


async def _returns_texts(ctx, task):
  return ["done"]


async def _returns_nothing(ctx, task):
  await ctx.sample(task.prompt)


async def _returns_one_twice(ctx, task):
  return (await ctx.sample(task.prompt)) * 2


async def _numbers_wildly(ctx, task):
  t, = await ctx.sample(task.prompt)
  t.group = GROUPS_PER_EPISODE
  return [t]


async def _asks_for_nothing(ctx, task):
  return await ctx.sample(task.prompt, n=0)


async def _gives_no_context(ctx, task):
  return await ctx.sample([])


async def _trains_off_temperature(ctx, task):
  return await ctx.sample(task.prompt, train=True, temperature=0.5)


async def _mistypes_a_template(ctx, task):
  return await ctx.sample(ctx.render("refin", draft=""))


async def _forgets_a_field(ctx, task):
  return await ctx.sample(ctx.render("refine", drft=""))


def _is_no_coroutine(ctx, task):
  return []


async def _cancels_itself(ctx, task):
  raise asyncio.CancelledError


@pytest.mark.parametrize("bad, message", [
    (_raises, "KeyError: 'no such tool'"),
    (_returns_text, "returns a list of Trajectory, but this one returned a str"),
    (_returns_texts, "returns a list of Trajectory, but this one has a str in it"),
    (_returns_nothing, "returned a NoneType"),
    (_returns_one_twice, "the same Trajectory twice"),
    (_numbers_wildly, f"group={GROUPS_PER_EPISODE}"),
    (_asks_for_nothing, "n=0"),
    (_gives_no_context, "the prompt is empty"),
    (_trains_off_temperature, r"temperature=0.5\) differs from config.rollout.temperature=1.0"),
    (_mistypes_a_template, r"config.rollout.templates has no 'refin'; it has \['refine'\]"),
    (_forgets_a_field, r"template 'refine' wants \{draft\}, but only \['drft'\] were given"),
    (_is_no_coroutine, "TypeError"),
    (_cancels_itself, "CancelledError"),
])
def test_a_failing_episode_is_named_and_dropped(world, bad, message):
  async def one_in_twenty(ctx, task):
    if task.id == "t7":
      return await bad(ctx, task)
    return await ctx.sample(task.prompt, n=2, train=True)

  result = world.run(one_in_twenty, 20, templates=dict(refine="{draft}"))
  assert len(result) == 38 and "t7" not in {t.task_id for t in result}
  report, = world.reports
  assert report.startswith("episode of task 't7' failed and was dropped: ")
  with pytest.raises(EpisodeFailure, match=message):
    world.run(bad, 20, templates=dict(refine="{draft}"))


def test_too_many_failures_stop_the_run_and_show_one_with_its_traceback(world):
  with pytest.raises(EpisodeFailure) as error:
    world.run(_raises, 20)
  text = str(error.value)
  assert text.startswith("20 of 20 episodes failed, more than config.rollout.max_failure_rate=0.1")
  assert "task 't0'" in text and "in _raises" in text and "no such tool" in text


def fails_on(numbers):
  async def episode(ctx, task):
    if int(task.id[1:]) in numbers:
      raise ValueError("bad luck")
    return await ctx.sample(task.prompt, train=True)
  return episode


def test_the_rate_is_that_of_many_episodes_not_of_a_small_round(world, tasks_of):
  rollouts_ = world.rollouts(fails_on({3}), max_failure_rate=0.1)
  for task in tasks_of(16):  # rounds of one task, as resampling has them
    rollouts_.run({"params": None}, [task], base_key="base")
  assert len(world.reports) == 1


def test_failures_add_up_over_calls(world, tasks_of):
  rollouts_ = world.rollouts(fails_on(range(0, 1000, 5)), max_failure_rate=0.1)
  with pytest.raises(EpisodeFailure, match="2 of 16 episodes"):
    for start in range(0, 40, 4):
      rollouts_.run({"params": None}, tasks_of(4, start), base_key="base")


def test_a_rate_of_zero_stops_at_the_first_failure_and_one_never(world):
  with pytest.raises(EpisodeFailure):
    world.run(fails_on({3}), 30, max_failure_rate=0.0)
  assert world.run(fails_on(range(30)), 30, max_failure_rate=1.0) == []


def test_episodes_may_return_nothing_to_train_on(world):
  async def gives_up(ctx, task):
    return []
  assert world.run(gives_up, 3) == [] and not world.reports


@pytest.mark.parametrize("part", ["sampler", "scorer"])
def test_a_broken_engine_stops_the_run_with_its_own_error(world, part):
  getattr(world, part).error = FloatingPointError("NaN")

  async def stubborn(ctx, task):  # swallows everything and asks again
    for _ in range(3):
      try:
        drafts = await ctx.sample(task.prompt)
        await ctx.score(task, drafts)
      except BaseException:
        pass
    return []

  for episode in (group(2), stubborn):
    with pytest.raises(FloatingPointError, match="NaN"):
      within_time(lambda: world.run(episode, 3))


def within_time(call):
  """Runs a call in a thread, so that a hang fails the test instead of the session."""
  result = []

  def target():
    try:
      result.append((call(), None))
    except BaseException as error:
      result.append((None, error))
  thread = threading.Thread(target=target, daemon=True)
  thread.start()
  thread.join(TIMEOUT)
  assert result, "it hangs"
  if result[0][1]:
    raise result[0][1]
  return result[0][0]
