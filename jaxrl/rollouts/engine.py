"""Runs many episodes together: each is a coroutine, and the sampler is their event loop.

An episode asks for samples and scores with `await`. When every live episode waits, all requests are
served in one batched call. Where rewards are judged in worker processes, what has ended is judged
while the rest is still being sampled. What an episode gets never depends on which others run beside
it, or on when (but for the last bits of what a model says of given tokens): each sampled row has its
own PRNG key made of (phase, step, episode, branch, request, row). Branches are the asyncio tasks that
an episode starts (`asyncio.gather`, `asyncio.create_task`), numbered in the order in which it starts
them, so it does not matter either which of them is the first to ask.
"""

import asyncio
import collections
from collections.abc import Callable, Coroutine, Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import traceback
from typing import Any

import jax
import numpy as np

from jaxrl import compose
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.data.pairs import PairBuilder
from jaxrl.rollouts.context import BRANCH
from jaxrl.rollouts.context import Branch
from jaxrl.rollouts.context import EpisodeContext
from jaxrl.rollouts.context import Pending
from jaxrl.rollouts.context import start_branch
from jaxrl.rollouts.event_loops import complete
from jaxrl.sampling import Likelihood
from jaxrl.sampling import Sampler
from jaxrl.sampling import SamplingParams
from jaxrl.schedule import Schedule

GROUPS_PER_EPISODE = 1 << 20  # an episode numbers its own groups below this
WINDOW = 512  # past episodes that the failure rate looks back on
FEWEST = 16  # episodes that the rate is computed over at least: 1 failure in 2 says little
QUIET_TICKS = 8  # turns of the event loop without a new request after which all are taken to wait


class EpisodeFailure(RuntimeError):
  """Too many episodes raised; the message holds the first of their tracebacks."""


class Rollouts:
  """Runs an episode for each of many tasks and scores what comes back."""

  def __init__(self, episode: Callable[..., Coroutine[Any, Any, list[Trajectory]]],
               sampler: Sampler, tokenizer, scorer, *, sampling: SamplingParams,
               templates: Mapping[str, str] | None = None, max_failure_rate: float = 0.1,
               report: Callable[[str], None] = print, likelihood: Likelihood | None = None,
               pairs: PairBuilder | None = None, seed: int = 0,
               schedules: Mapping[str, Schedule] | None = None, end_id: int | None = None):
    """Args:
      episode: `async (ctx, task) -> list[Trajectory]`, with its keyword arguments bound.
      sampler, tokenizer, scorer: serve the episodes' requests.
      sampling: the run's sampling parameters.
      templates: texts with `{placeholders}` for `ctx.render`.
      max_failure_rate: share of failing episodes, among those of a call and the last 512 before
        it (taken as 16 if there are fewer), above which the run stops.
      report: takes a line about every failing episode.
      likelihood: answers what episodes ask about given tokens, None if they may not.
      pairs: reads the answers that rows hold, None if episodes ask for none.
      seed: of `ctx.rng`.
      schedules: of fields of `sampling`.
      end_id: token that ends a written answer, such as that of a turn; None is EOS.
    """
    self.episode, self.sampler, self.tokenizer, self.scorer = episode, sampler, tokenizer, scorer
    self.sampling, self.templates = sampling, templates or {}
    self.max_failure_rate, self.report = max_failure_rate, report
    self.stopped = False
    self.memory: dict[str, Any] = {}
    self.drawn = np.zeros(2, np.int64)  # samples so far, and their tokens, whatever became of them
    self.likelihood = likelihood
    self.pairs, self.seed, self.schedules, self.end_id = pairs, seed, schedules or {}, end_id
    self._failed = collections.deque(maxlen=WINDOW)

  def stop(self) -> None:
    """Has a `run` of any thread raise `CancelledError` once it has served what it is at."""
    self.stopped = True

  def run(self, params: Any, tasks: Sequence[Task], *, base_key: jax.Array,
          key: tuple[int, ...] = (), step: int = 0, first_episode: int = 0, reference: Any = None
          ) -> list[Trajectory]:
    """Runs one episode per task, all together.

    Args:
      params: parameters of the policy.
      base_key, key: PRNG key, and integers folded into it before (episode, request, row).
      step: shown to episodes as `ctx.step`.
      first_episode: number of the first episode, so that later calls of a step draw afresh.
      reference: parameters of the phase's reference, if it keeps one.

    Returns:
      Scored trajectories in the order of their tasks; `group` tells episodes apart.

    Raises:
      EpisodeFailure: when more than `max_failure_rate` of the episodes raised.
      CancelledError: after `stop`.
    """
    session = _Session(self, {"policy": params, "reference": reference}, base_key, key, step)
    outcomes = complete(session.serve, tasks, first_episode)
    trajectories, failures = [], []
    for task, outcome in zip(tasks, outcomes):
      if isinstance(outcome, list):
        trajectories += outcome
      else:
        failures.append((task, outcome))
        self.report(f"episode of task {task.id!r} failed and was dropped: "
                    f"{type(outcome).__name__}: {outcome}")
    self._check_failures(tasks, failures)
    return trajectories

  def scheduled(self, step: int) -> dict[str, float]:
    """Fields of `sampling` that have a schedule, as they are at an update."""
    return {name: float(of(step)) for name, of in self.schedules.items()}

  def text_of(self, sample, params: SamplingParams) -> str:
    """Decoded completion, without its stop token or stop string."""
    tokens = list(map(int, sample.tokens))
    if tokens and tokens[-1] in params.stop_ids:
      tokens.pop()
    return self.tokenizer.decode(tokens)[:sample.text_end]

  def _check_failures(self, tasks, failures):
    count = len(failures) + sum(self._failed)
    total = max(len(tasks) + len(self._failed), FEWEST)
    self._failed.extend(i < len(failures) for i in range(len(tasks)))
    if failures and count > self.max_failure_rate * total:
      task, error = failures[0]
      raise EpisodeFailure(
          f"{count} of {total} episodes failed, more than config.rollout.max_failure_rate="
          f"{self.max_failure_rate:g} allows. One of them, of task {task.id!r}:\n"
          f"{''.join(traceback.format_exception(error))}") from error


class _Session:
  """One call of `Rollouts.run`: the requests in flight and who waits for them."""

  def __init__(self, rollouts, models, base_key, key, step):
    self.rollouts, self.models, self.base_key = rollouts, models, base_key
    self.key, self.step, self.episode = key, step, compose.at(rollouts.episode, step)
    now = rollouts.scheduled(step)
    self.sampling = dataclasses.replace(rollouts.sampling, **now)
    self.likelihood = rollouts.likelihood
    if "temperature" in now and self.likelihood:
      self.likelihood = self.likelihood.at(now["temperature"])
    self.pending: list[Pending] = []
    self.over, self.episodes = False, 0
    # Several processes must agree on the order of what they do together, scores among it.
    early = rollouts.scorer.has_workers and jax.process_count() == 1
    self.judge = concurrent.futures.ThreadPoolExecutor(1, "jaxrl-judge") if early else None
    self.ended: list[tuple[list, concurrent.futures.Future]] = []  # pairs of episodes, judged early

  def post(self, episode: int, **request) -> asyncio.Future:
    """Queues a request; the future resolves when the batch it joins has been served."""
    if self.over:  # nobody would serve it; the episode is being cancelled and must not go on
      raise asyncio.CancelledError
    future = asyncio.get_running_loop().create_future()
    self.pending.append(Pending(episode, future, judged=self._judge_early(request.get("pairs")),
                                 **request))
    self.changed.set()
    return future

  async def serve(self, tasks, first_episode) -> list[list[Trajectory] | BaseException]:
    """Runs all episodes to their end; a failing one yields its exception."""
    self.changed, self.episodes = asyncio.Event(), len(tasks)
    asyncio.get_running_loop().set_task_factory(start_branch)
    episodes = {first_episode + i: asyncio.ensure_future(self._run(first_episode + i, task))
                for i, task in enumerate(tasks)}
    try:
      while await self._settle(episodes):
        if self.rollouts.stopped:
          raise asyncio.CancelledError("the rollouts were stopped")
        # An episode may have given up on a request (asyncio.wait_for), or ended without waiting.
        batch = [p for p in self.pending
                 if not p.future.done() and not episodes[p.episode].done()]
        self.pending = []
        await self._serve_scores([p for p in batch if p.request is None and p.reading is None])
        for model in self.models:
          asked = [p for p in batch if p.model == model]
          self._serve_readings(model, [p for p in asked if p.reading])
          await self._serve_samples(model, [p for p in asked if p.request])
      outcomes = await asyncio.gather(*episodes.values(), return_exceptions=True)
      for pairs, judged in self.ended:
        _record(pairs, await asyncio.wrap_future(judged))
      kept = [(task, t) for task, outcome in zip(tasks, outcomes) if isinstance(outcome, list)
              for t in outcome if not t.evidence]
      self._score(kept)
      return outcomes
    finally:
      self.over = True
      if self.judge:
        self.judge.shutdown(wait=False, cancel_futures=True)
      for episode in episodes.values():
        episode.cancel()

  async def _settle(self, episodes) -> bool:
    """Waits until every live episode waits for us; False once none is alive."""
    while True:
      quiet = 0
      while quiet < QUIET_TICKS:  # a result takes some turns to pass through nested gathers
        self.changed.clear()
        await asyncio.sleep(0)
        quiet = 0 if self.changed.is_set() else quiet + 1
      live = {e for e, future in episodes.items() if not future.done()}
      if live <= {p.episode for p in self.pending if not p.future.done()}:
        return bool(live)
      await self.changed.wait()

  async def _run(self, episode, task):
    BRANCH.set(Branch())
    try:
      trajectories = _checked(await self.episode(
          EpisodeContext(self.rollouts, self, episode), task))
      for t in trajectories:
        t.task_id = task.id
        t.group += episode * GROUPS_PER_EPISODE
      pairs = [(task, t) for t in trajectories if not t.evidence]
      if judged := self._judge_early(pairs):
        self.ended.append((pairs, judged))
      return trajectories
    finally:
      self.changed.set()

  def _serve_readings(self, model, pending):
    """What a model says of given tokens; log-probabilities and gradients are two programs."""
    for gradients in (False, True):
      some = [p for p in pending if (p.reading.mask is not None) == gradients]
      if not some:
        continue
      arguments = [[p.reading.tokens for p in some]]
      if gradients:
        arguments.append([p.reading.mask for p in some])
      ask = self.likelihood.embedding_gradients if gradients else self.likelihood.logprobs
      for p, found in zip(some, ask(self.models[model]["params"], *arguments)):
        _resolve(p.future, found)

  async def _serve_samples(self, model, pending):
    if not pending:
      return
    sample = functools.partial(self.rollouts.sampler.sample, self.models[model]["params"],
                               [p.request for p in pending], self.base_key)
    if self.judge is None:
      for p, result in zip(pending, sample()):
        p.future.set_result(result)
      return
    # In a thread, so that episodes whose samples have ended can go on to be judged. None of them is
    # sampled for before all others wait again, so what is batched together stays the same.
    loop = asyncio.get_running_loop()

    def deliver(index, samples):
      loop.call_soon_threadsafe(_resolve, pending[index].future, samples)
    results = await loop.run_in_executor(None, functools.partial(sample, on_done=deliver))
    for p, result in zip(pending, results):
      _resolve(p.future, result)

  async def _serve_scores(self, pending):
    self._score([pair for p in pending if not p.judged for pair in p.pairs])
    for p in pending:
      if p.judged:
        _record(p.pairs, await asyncio.wrap_future(p.judged))
      _resolve(p.future, None)

  def _judge_early(self, pairs):
    """Begins to judge in a thread, if there are workers to do it meanwhile."""
    if not (self.judge and pairs):
      return None
    return self.judge.submit(self.rollouts.scorer.score, pairs, among=len(pairs) * self.episodes)

  def _score(self, pairs):
    if pairs:
      _record(pairs, self.rollouts.scorer.score(pairs))


def _record(pairs, scores):
  """Writes what was found about trajectories into them."""
  for (_, trajectory), scored in zip(pairs, scores):
    trajectory.reward, trajectory.scored = scored.reward, scored.scored
    trajectory.evidence = dict(scored.evidence)


def _resolve(future, result):
  if not future.done():  # an episode may have given up on it
    future.set_result(result)


def _checked(trajectories):
  """What an episode returned, if it is what an episode returns."""
  if not isinstance(trajectories, list):
    raise TypeError("an episode returns a list of Trajectory, but this one returned a "
                    f"{type(trajectories).__name__}")
  for t in trajectories:
    if not isinstance(t, Trajectory):
      raise TypeError("an episode returns a list of Trajectory, but this one has a "
                      f"{type(t).__name__} in it")
    if not 0 <= t.group < GROUPS_PER_EPISODE:
      raise ValueError(f"an episode numbers its groups from 0 to {GROUPS_PER_EPISODE - 1}, but "
                       f"this one has group={t.group}")
  if len({id(t) for t in trajectories}) < len(trajectories):
    raise ValueError("an episode returned the same Trajectory twice; copy.copy makes another")
  return trajectories
