"""Episodes that ship with jaxrl: coroutines from a task to trajectories."""

from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rollouts.context import EpisodeContext


async def group(ctx: EpisodeContext, task: Task, *, samples: int) -> list[Trajectory]:
  """A group of independent answers to one prompt (GRPO, RLOO, REINFORCE)."""
  return await ctx.sample(task.prompt, n=samples, train=True)
