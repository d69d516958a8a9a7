"""Traces that are mended at the point where they go wrong."""

import asyncio
import bisect
from collections.abc import Sequence
import dataclasses

import numpy as np

from jaxrl import compose
from jaxrl import rollouts
from jaxrl.batch import PREFERENCE
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rollouts.context import EpisodeContext


@compose.supplies(columns=(PREFERENCE, "repairs"))
async def repaired_trace(ctx: EpisodeContext, task: Task, *, triggers: Sequence[str], detector: str,
                         max_tokens: int, rounds: int = 3, good_from: float = 1.0, suffix: bool = True
                         ) -> list[Trajectory]:
  """A trace that ended badly, and the same with another turn where it went wrong (IPO,
  arXiv:2509.24393).

  A detector says where the first cue of failure stands, at token h. The trace is cut there, one of the
  triggers takes the place of the cue, and the policy goes on from it; if that ends badly too, the next
  cue is replaced, and so on. The mended trace is preferred, and the loss is on what follows the shared
  part:

    h = log pi(mended[h:] | x, trace[:h]) - log pi(trace[h:] | x, trace[:h]), of both models

  Args:
    ctx: serves samples and scores.
    task: the problem.
    triggers: texts that a trace may go on from, drawn uniformly.
    detector: `module:function` of a text -> index of the cue's first character, or None.
    max_tokens: of a trace.
    rounds: cues that are replaced, at most.
    good_from: smallest reward of a trace that needs no repair.
    suffix: False trains on all of both traces. The shared part cancels in h, so this changes only
      losses that are no function of h.

  Returns:
    The mended trace and the original, with the columns `preference`, 1 and 0, and `repairs`, the cues
    that were replaced. A trace that is good, or was never mended, is not trained on.

  Raises:
    ValueError: no triggers.
  """
  if not triggers or isinstance(triggers, str):
    raise ValueError(f"repaired_trace: triggers={triggers!r} has to list at least one text")
  find = compose.build(detector, rollouts, where="repaired_trace: detector")
  rng = ctx.rng(24393)
  trace, = await ctx.sample(task.prompt, train=True, max_tokens=max_tokens)
  await ctx.score(task, [trace])
  mended, first, searched, repairs = trace, 0, 0, 0
  while repairs < rounds and mended.scored and mended.reward < good_from:
    place = find(mended.text[searched:])
    if place is None:
      break
    cut = token_at(ctx, mended, searched + place)
    trigger = triggers[int(rng.integers(len(triggers)))]
    head = [*mended.tokens[:cut].tolist(), *ctx.encode(trigger)]
    left = len(task.prompt) + max_tokens - len(head)
    if left < 1:
      break
    before = mended.text[:searched + place] + trigger
    found, = await ctx.sample(head, max_tokens=left)
    mended = dataclasses.replace(found, prompt_length=len(task.prompt), text=before + found.text)
    await ctx.score(task, [mended])
    first, searched, repairs = first or cut, len(before), repairs + 1
  kept = repairs > 0 and mended.scored and mended.reward >= good_from
  pair = [mended, trace] if kept else [trace]
  if kept:
    mended.behaviour_logprobs[first:] = await ctx.logprobs(
        mended.tokens[:first], mended.tokens[first:], model="policy")
  for t, preference in zip(pair, (1.0, 0.0)):
    t.loss_mask = np.arange(len(t.tokens)) >= (first if suffix else t.prompt_length)
    t.columns = {PREFERENCE: preference, "repairs": float(repairs)}
    t.scored = t.scored and kept
  return pair


async def good_ratios(ctx: EpisodeContext, task: Task, trace: Trajectory, ends: Sequence[int], *,
                      samples: int = 32, good_from: float = 1.0) -> list[float]:
  """How often a trace ends well if it is begun anew from each of some of its tokens.

  Args:
    ctx: serves samples and scores.
    task: the problem.
    trace: an answer to it.
    ends: numbers of tokens of the completion that are kept.
    samples: continuations of each, those that cannot be scored included.
    good_from: smallest reward of a good one.

  Returns:
    Shares of the continuations, at each of `ends`; nan where none could be scored.
  """
  async def ratio(end):
    head = trace.tokens[:trace.prompt_length + end].tolist()
    found = await ctx.sample(head, n=samples)
    start = ctx.decode(head[trace.prompt_length:])
    whole = [dataclasses.replace(t, prompt_length=trace.prompt_length, text=start + t.text) for t in found]
    await ctx.score(task, whole)
    rewards = [t.reward for t in whole if t.scored]
    return float(np.mean(np.array(rewards) >= good_from)) if rewards else float("nan")
  return list(await asyncio.gather(*map(ratio, ends)))


def token_at(ctx: EpisodeContext, trace: Trajectory, character: int) -> int:
  """Index of the token that holds a character of a completion's text."""
  start, tokens = trace.prompt_length, trace.tokens.tolist()
  return start - 1 + bisect.bisect_right(range(len(tokens) - start + 1), character,
                                         key=lambda n: len(ctx.decode(tokens[start:start + n])))
