"""What episodes may ask beside samples of the policy: the reference, given tokens, stops, schedules."""

import asyncio
import sys

import numpy as np
import pytest

from jaxrl import compose, rollouts
from jaxrl.rollouts import Rollouts
from jaxrl.sampling import SamplingParams

POLICY, REFERENCE = {"params": "policy"}, {"params": "reference"}


class Sampler:
  """The fake one, for any parameters; keeps whose samples were asked for."""

  def __init__(self, fake):
    self._fake, self.asked = fake, []

  def sample(self, params, requests, base_key, *, on_done=None):
    self.asked += [(params, r.params.stop_strings, r.params.max_tokens) for r in requests]
    return self._fake.sample(None, requests, base_key, on_done=on_done)


class Likelihood:
  """-index of a token in place of its log-probability; gradients that count the mask."""

  def __init__(self):
    self.asked = []

  def logprobs(self, params, sequences):
    self.asked.append((params, len(sequences)))
    return [-np.arange(len(s), dtype=float) for s in sequences]

  def embedding_gradients(self, params, sequences, masks):
    self.asked.append((params, len(sequences)))
    return [np.full((len(s), 2), float(sum(m))) for s, m in zip(sequences, masks)]


@pytest.fixture
def run(world, tasks_of):
  def go(episode, *, reference=REFERENCE, likelihood=True, tasks=2, step=0):
    world.asked, world.likelihood = Sampler(world.sampler), Likelihood() if likelihood else None
    made = Rollouts(episode, world.asked, world.rollouts(episode).tokenizer, world.scorer,
                    sampling=SamplingParams(max_tokens=8), report=world.reports.append,
                    likelihood=world.likelihood)
    return made.run(POLICY, tasks_of(tasks), base_key="base", reference=reference, step=step)
  return go


def test_samples_of_both_models_and_stops_of_their_own(world, run):
  async def episode(ctx, task):
    mine, other = await asyncio.gather(
        ctx.sample(task.prompt, train=True, stop_strings=("x", "yz")),
        ctx.sample(task.prompt, 2, model="reference", max_tokens=np.float32(3)))
    assert not any(t.loss_mask.any() for t in other)
    return mine
  assert len(run(episode)) == 2
  assert sorted(world.asked.asked) == sorted(
      [("policy", ("x", "yz"), 8)] * 2 + [("reference", (), 3)] * 2)


def test_given_tokens_are_read_together(world, run):
  seen = []

  async def episode(ctx, task):
    logprobs, slopes = await asyncio.gather(
        ctx.logprobs([1, 2], [3, 4, 5]), ctx.embedding_gradients([1, 2, 3], [0, 1, 1]))
    seen.append((ctx.episode, logprobs.tolist(), slopes.tolist()))
    now = await ctx.logprobs(task.prompt, [], model="policy")
    assert now.shape == (0,)
    return await ctx.sample(task.prompt, train=True)
  run(episode)
  assert sorted(seen) == [(i, [-2.0, -3.0, -4.0], [[2.0, 2.0]] * 3) for i in range(2)]
  assert world.likelihood.asked == [("reference", 2), ("reference", 2), ("policy", 2)]


def test_a_number_of_an_episode_follows_its_schedule(world, run):
  episode = compose.build(dict(name="capped", most=dict(schedule="linear", start=2, end=6, steps=4)),
                          sys.modules[__name__])
  for step, expected in ((0, 2), (2, 4), (9, 6)):
    run(episode, step=step)
    assert {most for _, _, most in world.asked.asked} == {expected}


async def capped(ctx, task, *, most):
  return await ctx.sample(task.prompt, train=True, max_tokens=most)


@pytest.mark.parametrize("ask, message", [
    (lambda ctx, p: ctx.sample(p, train=True, model="reference"), "only the policy's own"),
    (lambda ctx, p: ctx.sample(p, model="referense"), "did you mean 'reference'"),
    (lambda ctx, p: ctx.logprobs([], [1]), "context is empty"),
    (lambda ctx, p: ctx.embedding_gradients([1, 2], [True]), "2 tokens, but a mask of 1"),
    (lambda ctx, p: ctx.embedding_gradients([], []), "0 tokens.*at least 1"),
])
def test_what_cannot_be_asked_is_said(world, run, ask, message):
  async def episode(ctx, task):
    return await ask(ctx, task.prompt)
  with pytest.raises(rollouts.EpisodeFailure, match=message):
    run(episode, tasks=20)


def test_without_a_reference_or_a_likelihood(world, run):
  async def other(ctx, task):
    return await ctx.sample(task.prompt, model="reference")

  async def reads(ctx, task):
    return await ctx.logprobs(task.prompt, [1], model="policy")
  with pytest.raises(rollouts.EpisodeFailure, match="compose.needs"):
    run(other, reference=None, tasks=20)
  with pytest.raises(rollouts.EpisodeFailure, match="without a Likelihood"):
    run(reads, likelihood=False, tasks=20)
