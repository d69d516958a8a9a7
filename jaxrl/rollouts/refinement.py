"""Second attempts: samples whose prompt holds a first attempt at the same task."""

import numpy as np

from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rewards import ok
from jaxrl.rollouts.context import EpisodeContext

PICKS = ("best", "random", "worst")


async def draft_then_refine(ctx: EpisodeContext, task: Task, *, drafts: int, samples: int,
                            pick: str = "best", train_drafts: bool = False) -> list[Trajectory]:
  """A group of answers that have all seen the best of a few drafts (iGRPO, arXiv:2602.09000).

    d_1 .. d_N ~ policy(. | q),    d* = argmax_i R(d_i),    q' = q + template(d*)
    o_1 .. o_G ~ policy(. | q')

  Only the o_j are trained on, given q', as one group. For drafts that are right with probability V,
  d* is right with probability 1 - (1 - V)^N. Among several best drafts the first is taken; as
  drafts are exchangeable, that is one of them uniformly at random.

  Args:
    ctx: serves samples and scores; `config.rollout.templates` has a "refine", which may use
      `{draft}`, the text of d*, and `{question}`.
    task: the problem; evaluations ask it without any draft.
    drafts: N. For the budget of a plain group, `drafts + samples` is its size.
    samples: G.
    pick: "best"; "random" and "worst" are controls that tell what the selection is worth.
    train_drafts: also train on the drafts, given q, as a group of their own.

  Returns:
    The o_j, with `draft_reward`, R(d*), and `copied`, whether o_j is d* once more, in their
    evidence, and then the drafts if they are trained on.

  Raises:
    ValueError: another `pick`, or no draft.
  """
  if pick not in PICKS:
    raise ValueError(f"draft_then_refine: pick={pick!r}; valid are {', '.join(map(repr, PICKS))}")
  if drafts < 1:
    raise ValueError(f"draft_then_refine: drafts={drafts} leaves nothing to refine; use at least 1, "
                     "or the episode 'group'")
  attempts = await ctx.sample(task.prompt, n=drafts, train=train_drafts)
  scores = await ctx.score(task, attempts)
  draft = attempts[_picked(scores, pick)]
  prompt = task.prompt + ctx.render("refine", draft=draft.text, question=task.question)
  refined = await ctx.sample(prompt, n=samples, train=True)
  await ctx.score(task, refined)
  for t in refined:
    t.evidence["copied"] = ok(t.text.strip() == draft.text.strip())
    if draft.scored:
      t.evidence["draft_reward"] = ok(draft.reward)
  for t in attempts:
    t.group = 1
  return refined + attempts if train_drafts else refined


def _picked(scores: np.ma.MaskedArray, pick: str) -> int:
  """Index of a draft; one that could not be scored only if none could."""
  if pick == "worst":
    return int(scores.argmin())
  # Drafts are exchangeable, so the first that has a score is a random one.
  return int(scores.argmax() if pick == "best" else np.argmin(np.ma.getmaskarray(scores)))
