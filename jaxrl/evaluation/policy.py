"""How well a policy solves problems: greedily, on average over samples, and in k tries."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.evaluation.pass_at_k import pass_at_k
from jaxrl.evaluation.voting import vote
from jaxrl.rollouts import Rollouts
from jaxrl.rollouts import group
from jaxrl.rollouts.engine import GROUPS_PER_EPISODE

GREEDY, SAMPLED = 0, 1  # last integer of the PRNG key of either kind
GREEDY_METRICS = ("greedy_accuracy", "greedy_tokens", "unscored")


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Metrics by name, and the greedy answers behind them."""

  metrics: dict[str, float]
  answers: list[Trajectory]


def evaluate(rollouts: Rollouts, params: Any, tasks: Sequence[Task], *, correct: str, samples: int,
             k: int, temperature: float, base_key: jax.Array, key: tuple[int, ...],
             episode: Callable[..., Coroutine[Any, Any, list[Trajectory]]] | None = None,
             step: int = 0) -> Evaluation:
  """Evaluates a policy on tasks.

  Args:
    rollouts: supplies sampler, tokenizer, scorer, templates and limits; its own episode is not used.
    correct: criterion that counts as solved at a score of 1.
    samples: draws per task for the sampled metrics; 0 leaves them out.
    k: of pass@k, at most `samples`.
    temperature: of the draws.
    base_key, key: randomness, see `Rollouts.run`.
    episode: how a task is answered, once for each answer: the last trajectory that it returns is
      the answer, and the tokens of all count. None asks the plain question.
    step: update at which its scheduled numbers are read.

  Returns:
    `greedy_accuracy`, `sampled_accuracy`, `pass_at_<k>`, `majority_accuracy` (of the completion that
    most samples of a task agree on, word for word), `distinct_right` (different right completions
    among the samples of a task), the mean number of greedy tokens `greedy_tokens` and the share
    `unscored` of greedy answers that the criterion could not judge. Those are left out of the
    accuracies, as are tasks with fewer than k judged samples of pass@k.
  """
  def run(n, temperature, kind):
    """Answers with the index of their task, and the tokens that were written for each."""
    ask = episode or functools.partial(group, samples=n)
    session = Rollouts(ask, rollouts.sampler, rollouts.tokenizer, rollouts.scorer,
                       templates=rollouts.templates, likelihood=rollouts.likelihood,
                       report=rollouts.report, max_failure_rate=rollouts.max_failure_rate,
                       end_id=rollouts.end_id,
                       sampling=dataclasses.replace(rollouts.sampling, temperature=temperature,
                                                    top_k=0, top_p=1.0, min_p=0.0))
    asked = [task for task in tasks for _ in range(n)] if episode else tasks
    found: dict[Any, list[Trajectory]] = {}
    for i, t in enumerate(session.run(params, asked, base_key=base_key, key=(*key, kind),
                                     step=step)):
      number = t.group // GROUPS_PER_EPISODE
      found.setdefault((number, None if episode else i), []).append(t)
    return [(number // n if episode else number, ts[-1],
             sum(len(t.tokens) - t.prompt_length for t in ts)) for (number, _), ts in found.items()]

  greedy = run(1, 0.0, GREEDY)
  answers = [t for _, t, _ in greedy]
  judged = [t for t in answers if is_judged(t, correct)]
  metrics = {
      "greedy_accuracy": _mean([is_correct(t, correct) for t in judged]),
      "greedy_tokens": _mean([tokens for _, _, tokens in greedy]),
      "unscored": 1.0 - len(judged) / len(answers) if answers else float("nan"),
  }
  if samples:
    groups: dict[int, list[bool]] = {}
    texts: dict[int, list[str]] = {}
    for index, t, _ in run(samples, temperature, SAMPLED):
      if is_judged(t, correct):
        groups.setdefault(index, []).append(is_correct(t, correct))
        texts.setdefault(index, []).append(t.text.strip())
    metrics["majority_accuracy"] = _mean([
        g[texts[i].index(vote(texts[i]))] for i, g in groups.items()])
    metrics["distinct_right"] = _mean([
        len({text for text, right in zip(texts[i], g) if right}) for i, g in groups.items()])
    metrics["sampled_accuracy"] = _mean([np.mean(g) for g in groups.values()])
    metrics[f"pass_at_{k}"] = _mean([pass_at_k(len(g), sum(g), k) for g in groups.values()
                                     if len(g) >= k])
  return Evaluation(metrics, answers)


def is_judged(trajectory: Trajectory, criterion: str) -> bool:
  """Whether a criterion has anything to say; what it cannot judge is not wrong."""
  return trajectory.evidence[criterion].status == "ok"


def is_correct(trajectory: Trajectory, criterion: str) -> bool:
  """Whether a criterion gave (at least) its full score of 1."""
  return trajectory.evidence[criterion].score >= 1.0


def sample_rows(trajectories: Sequence[Trajectory], tasks: Mapping[str, Task],
                **more: Sequence[Any]) -> list[dict[str, Any]]:
  """What a run writes down about trajectories, one JSON-able row each; those of tasks that are not
  there, replayed from earlier batches, without question and answer."""
  rows = []
  for i, t in enumerate(trajectories):
    task = tasks.get(t.task_id)
    rows.append(dict(
        task=t.task_id, prompt=task.question if task else None, answer=task.answer if task else None,
        completion=t.text, finish=t.finish, tokens=len(t.tokens) - t.prompt_length,
        reward=t.reward if t.scored else None,
        criteria={name: dataclasses.asdict(c) for name, c in t.evidence.items()},
        **{name: values[i] for name, values in more.items()}))
  return rows


def _mean(values):
  return float(np.mean(values)) if len(values) else float("nan")
