"""Groups whose answers have to fit into a length that changes over the updates."""

from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rewards import ok
from jaxrl.rollouts.context import EpisodeContext


async def capped_group(ctx: EpisodeContext, task: Task, *, samples: int, max_tokens: float
                       ) -> list[Trajectory]:
  """A group of answers that stop at a cap, usually a schedule's (SIRI, arXiv:2509.25176).

    L = round(max_tokens),    r(y) = what the reward says of the first L tokens of y

  There is no other penalty of length: an answer that does not come within L tokens is wrong, so
  where some answers of a group fit and others do not, the short ones have the better advantage. The
  cap is data to the sampler's programs; they are compiled for its power of two, from 16 to 64.

  Args:
    ctx: serves samples and scores.
    task: the problem; evaluations have the run's own limit, `config.rollout.max_tokens`.
    samples: answers to it.
    max_tokens: L before rounding; one of the cycles of `jaxrl.schedule` in the paper. Between two
      integers it stays there when rounded.

  Returns:
    The answers, with the evidence `length_cap`, which is L.

  Raises:
    ValueError: a cap below one token.
  """
  cap = round(float(max_tokens))
  if cap < 1:
    raise ValueError(f"capped_group: max_tokens={float(max_tokens):g} at update {ctx.step} leaves "
                     "no room for an answer; keep both ends of the schedule at 1 or more")
  answers = await ctx.sample(task.prompt, n=samples, train=True, max_tokens=cap)
  await ctx.score(task, answers)
  for t in answers:
    t.evidence["length_cap"] = ok(cap)
  return answers
