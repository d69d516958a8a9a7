"""Runs many episodes together: each is a coroutine, and the sampler is their event loop.

An episode asks for samples and scores with `await`. When every live episode waits, all requests are
served in one batched call. What an episode gets never depends on which others run beside it: each
sampled row has its own PRNG key made of (phase, step, episode, request, row).
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
import concurrent.futures
import dataclasses
import traceback
from typing import Any

import jax
import numpy as np

from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.sampling import Request
from jaxrl.sampling import Sampler
from jaxrl.sampling import SamplingParams

GROUPS_PER_EPISODE = 1 << 20  # an episode numbers its own groups below this


class EpisodeFailure(RuntimeError):
  """Too many episodes raised; the message holds the first of their tracebacks."""


@dataclasses.dataclass
class _Pending:
  """A request of an episode, waiting to be served."""

  episode: int
  future: asyncio.Future
  request: Request | None = None  # for samples
  pairs: Sequence[tuple[Task, Trajectory]] = ()  # for scores


class EpisodeContext:
  """What an episode may ask for. One context per episode."""

  def __init__(self, rollouts: "Rollouts", session: "_Session", episode: int):
    self._rollouts, self._session, self._episode = rollouts, session, episode
    self._requests = 0
    self.step = session.step

  async def sample(self, prompt: Sequence[int], n: int = 1, *, train: bool = False,
                   max_tokens: int | None = None, temperature: float | None = None
                   ) -> list[Trajectory]:
    """Samples `n` completions of a context of token ids.

    Args:
      prompt: context; any list of token ids, also one that holds earlier samples.
      train: whether the sampled tokens enter the loss.
      max_tokens, temperature: instead of the run's own.

    Returns:
      Trajectories of prompt and completion, `text` being the completion's.
    """
    changes = dict(max_tokens=max_tokens, temperature=temperature)
    params = dataclasses.replace(self._rollouts.sampling,
                                 **{k: v for k, v in changes.items() if v is not None})
    key = (*self._session.key, self._episode, self._requests)
    self._requests += 1
    request = Request(prompt=list(prompt), n=n, key=key, params=params)
    samples = await self._session.post(self._episode, request=request)
    return [self._trajectory(request, sample, train) for sample in samples]

  async def score(self, task: Task, completions: Sequence[Trajectory]) -> np.ma.MaskedArray:
    """Scores completions with the run's reward and records the evidence on each.

    Returns:
      One reward per completion; what could not be scored is masked, so that `argmax` and `mean`
      pass over it. [completions]
    """
    await self._session.post(self._episode, pairs=[(task, c) for c in completions])
    return np.ma.MaskedArray([c.reward for c in completions],
                             mask=[not c.scored for c in completions])

  def encode(self, text: str) -> list[int]:
    """Token ids of a piece of text, to be appended to a context."""
    return self._rollouts.tokenizer.encode(text)

  def render(self, template: str, **fields: str) -> list[int]:
    """Token ids of a template from `config.rollout.templates`, filled with `fields`.

    Raises:
      ValueError: no such template, or a placeholder without a field.
    """
    templates = self._rollouts.templates
    if template not in templates:
      raise ValueError(f"config.rollout.templates has no {template!r}; it has {sorted(templates)}")
    try:
      return self.encode(templates[template].format(**fields))
    except (KeyError, IndexError) as error:
      raise ValueError(f"template {template!r} wants {{{error.args[0]}}}, but only "
                       f"{sorted(fields)} were given") from error

  def _trajectory(self, request, sample, train):
    start, length = len(request.prompt), len(request.prompt) + len(sample.tokens)
    logprobs = np.zeros(length, np.float32)
    logprobs[start:] = sample.logprobs
    return Trajectory(
        tokens=np.concatenate([np.asarray(request.prompt, np.int32), sample.tokens]),
        loss_mask=(np.arange(length) >= start) & train, behaviour_logprobs=logprobs,
        prompt_length=start, finish=sample.finish,
        text=self._rollouts.text_of(sample, request.params))


class Rollouts:
  """Runs an episode for each of many tasks and scores what comes back."""

  def __init__(self, episode: Callable[..., Coroutine[Any, Any, list[Trajectory]]],
               sampler: Sampler, tokenizer, scorer, *, sampling: SamplingParams,
               templates: Mapping[str, str] | None = None, max_failure_rate: float = 0.1,
               report: Callable[[str], None] = print):
    """Args:
      episode: `async (ctx, task) -> list[Trajectory]`, with its keyword arguments bound.
      sampler, tokenizer, scorer: serve the episodes' requests.
      sampling: the run's sampling parameters.
      templates: texts with `{placeholders}` for `ctx.render`.
      max_failure_rate: share of failing episodes in one call above which the run stops.
      report: takes a line about every failing episode.
    """
    self.episode, self.sampler, self.tokenizer, self.scorer = episode, sampler, tokenizer, scorer
    self.sampling, self.templates = sampling, templates or {}
    self.max_failure_rate, self.report = max_failure_rate, report

  def run(self, params: Any, tasks: Sequence[Task], *, base_key: jax.Array,
          key: tuple[int, ...] = (), step: int = 0, first_episode: int = 0) -> list[Trajectory]:
    """Runs one episode per task, all together.

    Args:
      params: parameters of the policy.
      base_key, key: PRNG key, and integers folded into it before (episode, request, row).
      step: shown to episodes as `ctx.step`.
      first_episode: number of the first episode, so that later calls of a step draw afresh.

    Returns:
      Scored trajectories in the order of their tasks; `group` tells episodes apart.

    Raises:
      EpisodeFailure: when more than `max_failure_rate` of the episodes raised, or all did.
    """
    session = _Session(self, params, base_key, key, step)
    outcomes = _complete(session.serve(tasks, first_episode))
    trajectories, failures = [], []
    for task, outcome in zip(tasks, outcomes):
      if isinstance(outcome, list):
        trajectories += outcome
      else:
        failures.append((task, outcome))
        self.report(f"episode of task {task.id!r} failed and was dropped: "
                    f"{type(outcome).__name__}: {outcome}")
    if failures and (len(failures) > self.max_failure_rate * len(tasks)
                     or len(failures) == len(tasks)):
      task, error = failures[0]
      raise EpisodeFailure(
          f"{len(failures)} of {len(tasks)} episodes failed, more than "
          f"config.rollout.max_failure_rate={self.max_failure_rate} allows. The first, of task "
          f"{task.id!r}:\n{''.join(traceback.format_exception(error))}") from error
    return trajectories

  def text_of(self, sample, params: SamplingParams) -> str:
    """Decoded completion, without its stop token or stop string."""
    tokens = list(map(int, sample.tokens))
    if tokens and tokens[-1] in params.stop_ids:
      tokens.pop()
    return self.tokenizer.decode(tokens)[:sample.text_end]


class _Session:
  """One call of `Rollouts.run`: the requests in flight and who waits for them."""

  def __init__(self, rollouts, params, base_key, key, step):
    self.rollouts, self.params, self.base_key = rollouts, params, base_key
    self.key, self.step = key, step
    self.pending: list[_Pending] = []
    self.waiting: dict[int, int] = {}

  def post(self, episode: int, **request) -> asyncio.Future:
    """Queues a request; the future resolves when the batch it joins has been served."""
    future = asyncio.get_running_loop().create_future()
    self.pending.append(_Pending(episode, future, **request))
    self.waiting[episode] += 1
    self.changed.set()
    return future

  async def serve(self, tasks, first_episode) -> list[list[Trajectory] | BaseException]:
    """Runs all episodes to their end; a failing one yields its exception."""
    self.changed = asyncio.Event()
    self.waiting = {first_episode + i: 0 for i in range(len(tasks))}
    episodes = {e: asyncio.ensure_future(self._run(e, task))
                for e, task in zip(self.waiting, tasks)}
    try:
      while await self._settle(episodes):
        batch, self.pending = self.pending, []
        self._serve_scores([p for p in batch if p.request is None])
        self._serve_samples([p for p in batch if p.request is not None])
      outcomes = await asyncio.gather(*episodes.values(), return_exceptions=True)
      kept = [(task, t) for task, outcome in zip(tasks, outcomes) if isinstance(outcome, list)
              for t in outcome if not t.evidence]
      self._score(kept)
      return outcomes
    finally:
      for episode in episodes.values():
        episode.cancel()

  async def _settle(self, episodes) -> bool:
    """Waits until every live episode waits for us; False once none is alive."""
    while True:
      await asyncio.sleep(0)
      live = [e for e, future in episodes.items() if not future.done()]
      if all(self.waiting[e] for e in live):
        return bool(live)
      self.changed.clear()
      await self.changed.wait()

  async def _run(self, episode, task):
    try:
      trajectories = await self.rollouts.episode(
          EpisodeContext(self.rollouts, self, episode), task)
      if not (isinstance(trajectories, list)
              and all(isinstance(t, Trajectory) for t in trajectories)):
        raise TypeError("an episode returns a list of Trajectory, but this one returned "
                        f"{type(trajectories).__name__}")
      for t in trajectories:
        t.task_id = task.id
        t.group += episode * GROUPS_PER_EPISODE
      return trajectories
    finally:
      self.changed.set()

  def _serve_samples(self, pending):
    if not pending:
      return
    results = self.rollouts.sampler.sample(self.params["params"], [p.request for p in pending],
                                           self.base_key)
    for p, result in zip(pending, results):
      self._resolve(p, result)

  def _serve_scores(self, pending):
    self._score([pair for p in pending for pair in p.pairs])
    for p in pending:
      self._resolve(p, None)

  def _score(self, pairs):
    for (_, trajectory), scored in zip(pairs, self.rollouts.scorer.score(pairs) if pairs else ()):
      trajectory.reward, trajectory.scored = scored.reward, scored.scored
      trajectory.evidence = dict(scored.evidence)

  def _resolve(self, pending, result):
    self.waiting[pending.episode] -= 1
    if not pending.future.done():  # an episode may have given up on it (asyncio.wait_for)
      pending.future.set_result(result)


def _complete(coroutine):
  """Runs a coroutine to its end, also where an event loop already runs (notebooks)."""
  if asyncio._get_running_loop() is None:
    return asyncio.run(coroutine)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    return pool.submit(asyncio.run, coroutine).result()
