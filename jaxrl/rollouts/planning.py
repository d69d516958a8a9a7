"""Answers in two parts: a short plan, and its execution."""

import asyncio
import collections
import re

from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.evaluation.voting import vote
from jaxrl.rollouts.context import EpisodeContext
from jaxrl.rollouts.prefixes import FIRST, SECOND, boundary_end, continued, sample_prefixes


async def plan_then_execute(ctx: EpisodeContext, task: Task, *, samples: int, boundary: str
                            ) -> list[Trajectory]:
  """A group of answers whose `tag_ids` tell plan from execution (E2C, arXiv:2509.23946).

  Args:
    ctx: serves samples.
    task: the problem.
    samples: answers to it.
    boundary: text that ends the plan and belongs to it. In an answer without it nothing is tagged.

  Returns:
    The answers; `tag_ids` are 1 in plans and 2 in executions.

  Raises:
    ValueError: an empty boundary.
  """
  marker = _marker(ctx, boundary, "plan_then_execute")
  answers = await ctx.sample(task.prompt, n=samples, train=True)
  for t in answers:
    if end := boundary_end(t, marker):
      t.tag_ids[t.prompt_length:end] = FIRST
      t.tag_ids[end:] = SECOND
  return answers


async def execute_distinct_plans(ctx: EpisodeContext, task: Task, *, plans: int, plan_tokens: int,
                                 boundary: str, answer: str, executions: int = 8
                                 ) -> list[Trajectory]:
  """Several plans, each kind of which is executed once, and a vote (E2C, arXiv:2509.23946).

  Costs `plans` plans and at most `executions` executions, where self-consistency executes all.
  Equal texts are one kind of plan (the paper clusters embeddings); its execution votes with the
  number of its plans.

  Args:
    ctx: serves samples.
    task: the problem.
    plans: K.
    plan_tokens: tokens of a plan, at most; a longer one is not executed.
    boundary: text that ends a plan.
    answer: regular expression with one group, whose last match in an execution is its answer; an
      execution without a match does not vote.
    executions: kinds that are executed, the most frequent ones.

  Returns:
    One trajectory, not trained on: the first execution with the answer that won, else the first
    execution, else the first plan.

  Raises:
    ValueError: an empty boundary.
  """
  _marker(ctx, boundary, "execute_distinct_plans")
  heads, is_open = await sample_prefixes(ctx, task.prompt, plans, max_tokens=plan_tokens,
                                         boundary=boundary)
  kinds = collections.Counter(head.text for head, more in zip(heads, is_open) if more)
  chosen = kinds.most_common(executions)
  firsts = [next(h for h in heads if h.text == text) for text, _ in chosen]
  found = await asyncio.gather(*[ctx.sample(head.tokens.tolist()) for head in firsts])
  executed = [continued(head, one)[0] for head, one in zip(firsts, found)]
  answers = [_answer(t.text.removeprefix(head.text), answer) for t, head in zip(executed, firsts)]
  winner = vote(answers, [count for _, count in chosen])
  if not executed:
    return heads[:1]
  return [executed[answers.index(winner)]]


def _marker(ctx, boundary, name):
  if not boundary:
    raise ValueError(f"{name}: boundary='' ends no plan; give the text that does, such as "
                     "'</EXPLORATION>'")
  return ctx.encode(boundary)


def _answer(text, pattern):
  matches = re.findall(pattern, text)
  return matches[-1].strip() if matches else None
