"""Groups with somebody else's answer among them."""

from jaxrl import compose
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rollouts.context import EpisodeContext


@compose.supplies(columns=("expert",))
async def group_and_expert(ctx: EpisodeContext, task: Task, *, samples: int) -> list[Trajectory]:
  """Answers of the policy, and the task's own solution beside them (rePIRL, arXiv:2602.07832).

  Args:
    ctx: serves samples.
    task: the problem, with a solution.
    samples: of the policy.

  Returns:
    Group 0, the samples, with `columns["expert"]` 0; group 1, the solution, with 1. The latter was not
    drawn: its behaviour log-probabilities are what the policy says of it.

  Raises:
    ValueError: a task without a solution.
  """
  group = await ctx.sample(task.prompt, n=samples, train=True)
  expert = ctx.solved(task)
  expert.group, start = 1, expert.prompt_length
  expert.behaviour_logprobs[start:] = await ctx.logprobs(
      expert.tokens[:start], expert.tokens[start:], model="policy")
  for t in (*group, expert):
    t.columns = {"expert": float(t is expert)}
  return [*group, expert]
