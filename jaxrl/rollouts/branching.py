"""Trees of two levels: several answers behind each of several thoughts."""

import asyncio
from collections.abc import Sequence

import numpy as np

from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rewards import Criterion, ok, unscorable
from jaxrl.rollouts.context import EpisodeContext
from jaxrl.rollouts.prefixes import continued, sample_prefixes

THOUGHTS, ANSWERS = 0, 1  # groups of an episode


async def answers_to_thoughts(ctx: EpisodeContext, task: Task, *, samples: int, thoughts: int,
                              thought_tokens: int, boundary: str = "") -> list[Trajectory]:
  """K thoughts, M answers to each, and an advantage for either kind (GRPO-MA, arXiv:2509.24494).

    th_i ~ policy(. | q),    a_ij ~ policy(. | q, th_i),    V_i = mean_j R(th_i, a_ij)

  Thoughts are a group of rewards V_i, answers another of all K * M rewards R, so group pieces give
  them advantages of their own. Each thought is a sequence, trained on once and not M times; each
  answer is one whose prompt ends with its thought. Weights give either kind the same share under
  the aggregation "sequence_mean", whose loss for a task is then

    1/K sum_i 1/|th_i| sum_t loss_it  +  1/(K M) sum_ij 1/|a_ij| sum_t loss_ijt

  With thoughts fixed, the variance of a thought's advantage falls as 1/M; with M = 1 more thoughts
  do not lower it. A thought that ends by itself, or that does not come to its boundary, is a whole
  answer without branches: V_i is its own reward.

  Args:
    ctx: serves samples and scores; the reward sees thought and answer as one text.
    task: the problem.
    samples: K * M, answers to the task.
    thoughts: K; divides `samples`.
    thought_tokens: tokens of a thought, at most. Those of an answer are bounded by the run.
    boundary: text that ends a thought, such as "</think>"; empty ends it after `thought_tokens`.

  Returns:
    Thoughts, then answers; `tag_ids` are 1 in thoughts and 2 in answers.

  Raises:
    ValueError: `samples` is no multiple of `thoughts`.
  """
  if thoughts < 1 or samples < 1 or samples % thoughts:
    raise ValueError(f"answers_to_thoughts: samples={samples} are not the same number of answers "
                     f"to each of thoughts={thoughts}: make samples a multiple of thoughts")
  heads, is_open = await sample_prefixes(ctx, task.prompt, thoughts, max_tokens=thought_tokens,
                                         boundary=boundary, train=True)
  found = await asyncio.gather(*[ctx.sample(head.tokens.tolist(), n=samples // thoughts, train=True)
                                 for head, more in zip(heads, is_open) if more])
  found = iter(found)
  branches = [continued(head, next(found)) if more else [] for head, more in zip(heads, is_open)]
  answers = [t for branch in branches for t in branch]
  for t in answers:
    t.group = ANSWERS
  await ctx.score(task, answers + [h for h, more in zip(heads, is_open) if not more])
  for head, branch in zip(heads, branches):
    if branch:
      _value(head, branch)
  _weigh(heads, answers)
  return heads + answers


def _value(head: Trajectory, answers: Sequence[Trajectory]) -> None:
  """Gives a thought the mean reward, and the mean evidence, of its answers."""
  rewards = [t.reward for t in answers if t.scored]
  head.scored, head.reward = bool(rewards), float(np.mean(rewards)) if rewards else 0.0
  head.evidence = {label: _mean_evidence([t.evidence[label] for t in answers])
                   for label in answers[0].evidence}


def _mean_evidence(found: Sequence[Criterion]) -> Criterion:
  scores = [c.score for c in found if c.status == "ok"]
  return ok(float(np.mean(scores))) if scores else unscorable("no answer could be judged")


def _weigh(heads, answers):
  """Weights under which a mean over all sequences is the mean of thoughts plus that of answers."""
  kinds = [[t for t in kind if t.scored] for kind in (heads, answers)]
  for kind in kinds:
    for t in kind:
      t.weight = sum(map(len, kinds)) / len(kind)
