"""Answers whose reasoning is of use to somebody else."""

import asyncio
import dataclasses

import numpy as np

from jaxrl import compose
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rewards import ok
from jaxrl.rollouts.context import EpisodeContext
from jaxrl.rollouts.prefixes import boundary_end, continued


@compose.needs("reference")
async def transferable_answers(ctx: EpisodeContext, task: Task, *, samples: int, boundary: str,
                               max_tokens: int, low: float = 0.3, high: float = 0.9,
                               receivers: int = 1, answer_weight: float = 1.0,
                               transfer_weight: float = 0.5, temperature: float = 0.7,
                               hide_answer: bool = True) -> list[Trajectory]:
  """A group whose thoughts a frozen model must be able to finish (RLTR, arXiv:2602.08489).

    y_i ~ policy(. | q),   u_i ~ Uniform[low, high],   z_ij ~ reference(. | q, thought_i[:u_i])
    R_i = answer_weight * r(y_i) + transfer_weight * mean_j r(thought_i[:u_i], z_ij)

  A thought is what comes before the boundary; its cut is at floor(u_i * its tokens), so the answer
  itself is never handed on. `transfer_weight=0` is plain GRPO. The reference is the policy that the
  phase began with, or what `config.reference` makes of it; only training asks it.

  Args:
    ctx: serves samples of both models, and scores.
    task: the problem.
    samples: of the policy.
    boundary: text that ends a thought, such as "</think>". An answer without it has no thought to
      hand on.
    max_tokens: tokens of a part of a thought and what the reference adds to it, at most.
    low, high: shares of the thought that cuts are drawn from.
    receivers: continuations of each thought.
    answer_weight, transfer_weight: of the two parts of the reward.
    temperature: of the reference.
    hide_answer: a part of a thought that contains `task.answer` earns nothing by transfer, so that
      giving it away early does not pay.

  Returns:
    The group. Evidence beside the reward's own: `transfer`, and `given_away`, whether the part that
    was handed on contained the answer.

  Raises:
    ValueError: shares out of order, or a number below 1.
  """
  if not 0 <= low <= high <= 1:
    raise ValueError(f"transferable_answers: low={low}, high={high}; cuts are shares of a thought, "
                     "0 <= low <= high <= 1")
  if receivers < 1 or samples < 1:
    raise ValueError(f"transferable_answers: samples={samples}, receivers={receivers}; use at least 1")
  group = await ctx.sample(task.prompt, n=samples, train=True)
  await ctx.score(task, group)
  # Cuts depend on step, episode and place in the group alone, as samples do.
  shares = ctx.rng().uniform(low, high, samples)
  heads = [_part_of_thought(ctx, t, share, boundary) if t.scored else None
           for t, share in zip(group, shares)]
  given_away = [head is not None and bool(task.answer) and task.answer in head.text
                for head in heads]
  asked = [head is not None and len(head.tokens) - head.prompt_length < max_tokens
           and not (hide_answer and away) for head, away in zip(heads, given_away)]
  finished = iter(await asyncio.gather(*[
      _finish(ctx, task, head, receivers, max_tokens, temperature)
      for head, wanted in zip(heads, asked) if wanted]))
  for t, wanted, away in zip(group, asked, given_away):
    transfer = next(finished) if wanted else 0.0
    if transfer is None:
      t.scored = False
    elif t.scored:
      t.reward = answer_weight * t.reward + transfer_weight * transfer
      t.evidence |= {"transfer": ok(transfer), "given_away": ok(float(away))}
  return group


def _part_of_thought(ctx, t, share, boundary):
  """The beginning of an answer's thought, None without a thought."""
  end = boundary_end(t, ctx.encode(boundary))
  if end is None:
    return None
  thought = end - len(ctx.encode(boundary)) - t.prompt_length
  cut = t.prompt_length + int(share * thought)
  return dataclasses.replace(
      t, tokens=t.tokens[:cut], loss_mask=np.zeros(cut, bool), tag_ids=t.tag_ids[:cut],
      turn_ids=t.turn_ids[:cut], behaviour_logprobs=t.behaviour_logprobs[:cut],
      text=ctx.decode(t.tokens[t.prompt_length:cut]), evidence={}, reward=0.0)


async def _finish(ctx, task, head, receivers, max_tokens, temperature):
  """Mean reward of what the reference makes of a thought; None where none can be judged."""
  left = max_tokens - (len(head.tokens) - head.prompt_length)
  found = await ctx.sample(head.tokens.tolist(), n=receivers, max_tokens=left,
                           temperature=temperature, model="reference")
  scores = await ctx.score(task, continued(head, found))
  return float(scores.mean()) if scores.count() else None
