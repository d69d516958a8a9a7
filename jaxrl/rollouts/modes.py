"""Answers that first decide how to go on: with a thought, or directly."""

from jaxrl import compose
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rollouts.context import EpisodeContext
from jaxrl.rollouts.prefixes import FIRST, SECOND, boundary_end

UNDECIDED, ON, OFF = 0, 1, 2  # `Trajectory.columns["mode"]`


@compose.supplies(columns=("mode",))
async def answer_in_mode(ctx: EpisodeContext, task: Task, *, samples: int, on: str, off: str
                         ) -> list[Trajectory]:
  """A group of answers, each of which says in which mode it is given (HiPO, arXiv:2509.23967).

  Args:
    ctx: serves samples.
    task: the problem.
    samples: answers to it.
    on, off: texts that decide for thinking and against it. The first of them in an answer counts;
      it ends the decision and belongs to it.

  Returns:
    The answers. `columns["mode"]` is 1 with thought, 2 without, 0 where neither text came;
    `tag_ids` are 1 up to the end of the decision and 2 behind it. Without one all is tagged 1: such
    an answer has to learn to decide.

  Raises:
    ValueError: an empty text, or one whose tokens the other begins with.
  """
  markers = {ON: ctx.encode(on), OFF: ctx.encode(off)}
  shorter, longer = sorted(markers.values(), key=len)
  if not shorter or longer[:len(shorter)] == shorter:
    raise ValueError(f"answer_in_mode: on={on!r} and off={off!r} do not tell modes apart: neither "
                     "may be empty or begin with the other")
  answers = await ctx.sample(task.prompt, n=samples, train=True)
  for t in answers:
    ends = {mode: boundary_end(t, marker) for mode, marker in markers.items()}
    ends = {mode: end - len(markers[mode]) for mode, end in ends.items() if end}
    mode = min(ends, key=ends.get) if ends else UNDECIDED
    decided = ends[mode] + len(markers[mode]) if ends else len(t.tokens)
    t.tag_ids[t.prompt_length:decided], t.tag_ids[decided:] = FIRST, SECOND
    t.columns["mode"] = float(mode)
  return answers
