"""What an episode may ask for, and the requests that this makes.

An episode's asyncio tasks are its branches, each with a path of its own: what a request draws depends on
the path of the branch that makes it, so it does not matter which of several branches is the first to ask.
"""

import asyncio
from collections.abc import Sequence
import concurrent.futures
import contextvars
import dataclasses
from typing import Literal

import numpy as np

from jaxrl import compose
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.data.examples import supervised
from jaxrl.data.pairs import compared
from jaxrl.sampling import Request

Model = Literal["policy", "reference"]


@dataclasses.dataclass
class Branch:
  """An asyncio task of an episode: its path from the episode's own, and what it has counted."""

  path: tuple[int, ...] = ()
  started: int = 0
  requests: int = 0


BRANCH: contextvars.ContextVar[Branch] = contextvars.ContextVar("branch")


@dataclasses.dataclass
class Reading:
  """Given tokens that a model is asked about: for log-probabilities, or with a mask for gradients."""

  tokens: Sequence[int]
  mask: Sequence[bool] | None = None


@dataclasses.dataclass
class Pending:
  """A request of an episode, waiting to be served."""

  episode: int
  future: asyncio.Future
  model: Model = "policy"
  request: Request | None = None  # for samples
  reading: Reading | None = None  # for what a model says of given tokens
  pairs: Sequence[tuple[Task, Trajectory]] = ()  # for scores
  judged: concurrent.futures.Future | None = None  # these scores, if they were begun early


class EpisodeContext:
  """What an episode may ask for. One context per episode.

  Attributes:
    step: update that the batch is for.
    episode: its number among those of the step, which no other one has.
    memory: what the phase remembers of earlier batches, see `edits.Step`. Episodes run in any order,
      so they only read it, and edits write.
  """

  def __init__(self, rollouts, session, episode: int):
    """Args: the `engine.Rollouts`, its call that the episode runs in, and the episode's number."""
    self._rollouts, self._session, self.episode = rollouts, session, episode
    self.step, self.memory = session.step, rollouts.memory

  def rng(self, *salt: int) -> np.random.Generator:
    """Randomness for choices of the episode's own: the same for the same `config.seed`, step, episode and
    salt, and begun anew by each call."""
    return np.random.default_rng([self._rollouts.seed, self.step, self.episode, *salt])

  async def sample(self, prompt: Sequence[int], n: int = 1, *, train: bool = False,
                   max_tokens: int | None = None, temperature: float | None = None,
                   stop_strings: Sequence[str] | None = None, model: Model = "policy"
                   ) -> list[Trajectory]:
    """Samples `n` completions of a context of token ids.

    Args:
      prompt: context; any list of token ids, also one that holds earlier samples.
      train: whether the sampled tokens enter the loss.
      max_tokens, temperature, stop_strings: instead of the run's own.
      model: who completes: the policy, or the phase's frozen reference, whose samples are not
        trained on. An episode that asks the reference declares `@compose.needs("reference")`.

    Returns:
      Trajectories of prompt and completion, `text` being the completion's.

    Raises:
      ValueError: a request that cannot be served, or samples for training at a temperature other
        than the run's, at which the trainer computes their log-probabilities.
    """
    self._check_model(model)
    changes = dict(max_tokens=None if max_tokens is None else int(max_tokens),
                   temperature=None if temperature is None else float(temperature),
                   stop_strings=None if stop_strings is None else tuple(stop_strings))
    params = dataclasses.replace(self._session.sampling,
                                 **{k: v for k, v in changes.items() if v is not None})
    if train and model != "policy":
      raise ValueError(f"ctx.sample(train=True, model={model!r}): only the policy's own samples are "
                       "trained on; use train=False")
    if train and params.temperature != self._session.sampling.temperature:
      raise ValueError(f"ctx.sample(train=True, temperature={temperature}) differs from config."
                       f"rollout.temperature={self._session.sampling.temperature}, at which the "
                       "trainer works; change that one, or sample with train=False")
    branch = BRANCH.get()
    key = (*self._session.key, self.episode, *branch.path, branch.requests)
    branch.requests += 1
    request = Request(prompt=list(prompt), n=n, key=key, params=params)
    samples = await self._session.post(self.episode, request=request, model=model)
    self._rollouts.drawn += np.array([len(samples), sum(len(sample.tokens) for sample in samples)])
    return [self._trajectory(request, sample, train) for sample in samples]

  async def logprobs(self, prompt: Sequence[int], completion: Sequence[int], *,
                     model: Model = "reference") -> np.ndarray:
    """Log-probabilities of given tokens after a context, in nats at the run's temperature.
    [completion tokens]

    Args:
      prompt: context of token ids, at least one.
      completion: token ids, whoever wrote them.
      model: who is asked, as in `sample`. No gradient goes through the answer.

    Raises:
      ValueError: no context, or a model that the phase does not have.
    """
    self._check_model(model, reads=True)
    if not len(prompt):
      raise ValueError("ctx.logprobs: the context is empty; start it with a BOS token")
    reading = Reading([*map(int, prompt), *map(int, completion)])
    found = await self._session.post(self.episode, reading=reading, model=model)
    return found[len(prompt):]

  async def embedding_gradients(self, tokens: Sequence[int], mask: Sequence[bool], *,
                                model: Model = "reference") -> np.ndarray:
    """How the embeddings of tokens move the log-probability of some of them.
    [tokens, d_model]: d (sum of log p(token | those before) over the mask) / d (embeddings)

    Args:
      tokens: token ids.
      mask: whose log-probabilities are summed. [tokens]
      model: who is asked, as in `sample`.

    Raises:
      ValueError: no tokens, a mask of another length, or a model that the phase does not have.
    """
    self._check_model(model, reads=True)
    if len(mask) != len(tokens) or not len(tokens):
      raise ValueError(f"ctx.embedding_gradients: {len(tokens)} tokens, but a mask of {len(mask)}; "
                       "give as many of both, at least 1")
    reading = Reading(list(map(int, tokens)), np.asarray(mask, bool))
    return await self._session.post(self.episode, reading=reading, model=model)

  async def score(self, task: Task, completions: Sequence[Trajectory]) -> np.ma.MaskedArray:
    """Scores completions with the run's reward and records the evidence on each.

    Returns:
      One reward per completion; what could not be scored is masked, so that `argmax` and `mean`
      pass over it. [completions]
    """
    await self._session.post(self.episode, pairs=[(task, c) for c in completions])
    return np.ma.MaskedArray([c.reward for c in completions],
                             mask=[not c.scored for c in completions])

  def encode(self, text: str) -> list[int]:
    """Token ids of a piece of text, to be appended to a context."""
    return self._rollouts.tokenizer.encode(text)

  def solved(self, task: Task) -> Trajectory:
    """The task's own solution as a completion, with what ends answers, all of it under the loss mask.

    Raises:
      ValueError: the task has none.
    """
    if not task.solution:
      raise ValueError(f"task {task.id!r} has no solution to learn from; config.data.solution names "
                       "its field")
    tokenizer, end = self._rollouts.tokenizer, self._rollouts.end_id
    end = tokenizer.eos_id if end is None else end
    reply = [*tokenizer.encode(task.solution), end]  # of this solution, whatever was read with the task
    return supervised(dataclasses.replace(task, reply=reply, said=[]), tokenizer)

  def compared(self, task: Task) -> list[Trajectory]:
    """The answers that the task's row holds for comparison, in group 0, all of them under the loss mask
    and with their columns, `preference` among them. An episode that asks for them declares
    `@compose.needs("pairs")`.

    Raises:
      ValueError: the row holds none, or the phase reads none.
    """
    builder = self._rollouts.pairs
    found = builder and builder.to_comparison(task.row, f"task {task.id!r}")
    if not found:
      raise ValueError(f"ctx.compared: task {task.id!r} comes without answers to compare: put "
                       "@compose.needs(\"pairs\") on the episode, and name their fields in config.data")
    return compared(found, self._rollouts.tokenizer, group=0,
                    max_completion_tokens=builder.tasks.max_completion_tokens)

  def decode(self, tokens: Sequence[int]) -> str:
    """Text of token ids, such as a part of a completion."""
    return self._rollouts.tokenizer.decode(list(map(int, tokens)))

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

  def prompt(self, template: str, **fields: str) -> list[int]:
    """A filled template that stands alone: as `render`, behind BOS if the tokenizer has one, with which
    all prompts of the data begin."""
    bos = self._rollouts.tokenizer.bos_id
    return ([] if bos is None else [bos]) + self.render(template, **fields)

  def _check_model(self, model, reads=False):
    if reads and self._rollouts.likelihood is None:
      raise ValueError("these rollouts were made without a Likelihood, which answers what episodes "
                       "ask about given tokens: Rollouts(..., likelihood=Likelihood(config))")
    if model not in self._session.models:
      raise ValueError(f"the episode asked for model={model!r}" + compose.nearest(
          model, ("policy", "reference")))
    if self._session.models[model] is None:
      raise ValueError("the episode asks the reference, of which no parameters are kept here: put "
                       "@compose.needs(\"reference\") on it; evaluations have none")

  def _trajectory(self, request, sample, train):
    start, length = len(request.prompt), len(request.prompt) + len(sample.tokens)
    logprobs = np.zeros(length, np.float32)
    logprobs[start:] = sample.logprobs
    return Trajectory(
        tokens=np.concatenate([np.asarray(request.prompt, np.int32), sample.tokens]),
        loss_mask=(np.arange(length) >= start) & train, behaviour_logprobs=logprobs,
        prompt_length=start, finish=sample.finish,
        text=self._rollouts.text_of(sample, request.params))


def start_branch(loop, coroutine, *, context=None, **options):
  """Task factory: a task that an episode starts is a branch of the one that starts it."""
  parent = BRANCH.get(None)
  context = contextvars.copy_context() if context is None else context
  if parent is not None:
    context.run(BRANCH.set, Branch((*parent.path, parent.started)))
    parent.started += 1
  return asyncio.Task(coroutine, loop=loop, context=context, **options)
