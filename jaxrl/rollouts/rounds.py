"""Long reasoning in short rounds, joined by summaries that the policy writes itself."""

import asyncio
import re

from jaxrl import compose
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rewards import ok
from jaxrl.rollouts.context import EpisodeContext

EFFICIENCY = ("none", "product", "sum")


@compose.supplies(columns=("share",))
async def summarised_rounds(ctx: EpisodeContext, task: Task, *, samples: int, rounds: int,
                            summary: str, conclusion: str, efficiency: str = "none",
                            credit_all: bool = True) -> list[Trajectory]:
  """Trajectories of several rounds, each of which has seen the last summary only (InftyThink+,
  arXiv:2602.06960).

    o^1 ~ policy(. | q),    o^(j+1) ~ policy(. | q, s_j),    s_j the summary in o^j

  A trajectory ends with a conclusion, after `rounds` rounds, or with a round that has neither
  summary nor conclusion. With n its rounds and R_task the reward of its last one, 0 unless that
  concludes:

    efficiency="none":     R = R_task
    efficiency="product":  R = R_task * R_eff,    R_eff = 1 - ((n - 1) / rounds)^2
    efficiency="sum":      R = R_task + R_eff, 0 without a conclusion; a control, which pays wrong
                           answers for being short

  Every round is a sequence of its own with the reward of its trajectory. Its column `share` is 1/n,
  so `center_by_group(weight="share")` and `scale_by_group_std(weight="share")` count trajectories,
  however many rounds they have.

  Args:
    ctx: serves samples and scores; `config.rollout.templates` has a "continue", which is written
      behind the prompt of the task and may use `{summary}` and `{question}`. A round has at most
      `config.rollout.max_tokens` tokens; one that is cut off there has failed.
    task: the problem.
    samples: G, trajectories.
    rounds: phi, at most so many in each.
    summary: regular expression with one group, found in a round that is to be continued.
    conclusion: regular expression found in a last round; it goes before `summary`.
    efficiency: "none", "product" or "sum".
    credit_all: False trains on last rounds only, a control that tells what credit for summaries is
      worth.

  Returns:
    The rounds of each trajectory in order, one trajectory behind the other. Last rounds hold the
    evidence of the reward, `rounds`, and `concluded`; earlier ones `handed_on`, the reward that
    their summary led to.

  Raises:
    ValueError: another `efficiency`, fewer than 1 round, or an expression that cannot be used.
  """
  _check(rounds, summary, conclusion, efficiency)

  async def go_on(first: Trajectory) -> list[Trajectory]:
    """The rounds behind a first one; the last of them may have failed."""
    written = [first]
    while len(written) < rounds and not _concludes(written[-1], conclusion):
      found = _found(written[-1], summary)
      if found is None:
        break
      prompt = task.prompt + ctx.render("continue", summary=found[1], question=task.question)
      written += await ctx.sample(prompt, train=True)
    return written

  firsts = await ctx.sample(task.prompt, n=samples, train=True)
  trajectories = await asyncio.gather(*map(go_on, firsts))
  await ctx.score(task, [written[-1] for written in trajectories])
  for written in trajectories:
    _reward(written, rounds, _concludes(written[-1], conclusion), efficiency)
    if not credit_all:
      for t in written[:-1]:
        t.loss_mask[:] = False
  return [t for written in trajectories for t in written]


def _reward(written, rounds, concluded, efficiency):
  """Gives all rounds of a trajectory its reward and their share in it."""
  last, n = written[-1], len(written)
  saved = 1 - ((n - 1) / rounds) ** 2
  reward = last.reward * saved if efficiency == "product" else last.reward + saved * (
      efficiency == "sum")
  reward = float(reward) if concluded and last.scored else 0.0
  scored = last.scored or not concluded  # without a conclusion there is nothing to judge
  for t in written:
    t.reward, t.scored, t.columns = reward, scored, {"share": 1 / n}
    if t is not last:
      t.evidence = {"handed_on": ok(reward)}
  last.evidence |= {"rounds": ok(n), "concluded": ok(float(concluded))}


def _found(t: Trajectory, pattern: str) -> re.Match | None:
  """Where an expression stands in a round that ended by itself."""
  return re.search(pattern, t.text) if t.finish == "stop" else None


def _concludes(t, conclusion):
  return _found(t, conclusion) is not None


def _check(rounds, summary, conclusion, efficiency):
  if efficiency not in EFFICIENCY:
    raise ValueError(f"summarised_rounds: efficiency={efficiency!r}; valid are "
                     f"{', '.join(map(repr, EFFICIENCY))}")
  if rounds < 1:
    raise ValueError(f"summarised_rounds: rounds={rounds}; a trajectory has at least 1")
  for name, pattern, groups in (("summary", summary, 1), ("conclusion", conclusion, 0)):
    try:
      compiled = re.compile(pattern)
    except re.error as error:
      raise ValueError(f"summarised_rounds: {name}={pattern!r} is no regular expression: {error}"
                       ) from error
    if not pattern or compiled.groups < groups:
      raise ValueError(f"summarised_rounds: {name}={pattern!r} needs text to find"
                       f"{' and one group, the summary' if groups else ''}")
