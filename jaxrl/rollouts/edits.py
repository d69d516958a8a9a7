"""Edits: what `config.rollout.edits` may list, each `(step, *, ...) -> trajectories`.

An edit sees all scored trajectories of a batch at once, before they are packed: it may set rewards
from whole groups, take sequences out, add some of earlier batches, or remember something of prompts
in `step.memory`, which checkpoints keep.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from jaxrl import compose
from jaxrl.batch import Task, Trajectory


@dataclasses.dataclass
class Step:
  """A batch as an edit sees it.

  Attributes:
    trajectories: scored, in the order of their groups.
    tasks: by id; `Trajectory.task_id` says which one each answers.
    index: update of the phase that the batch is for.
    memory: what edits and episodes of the phase remember: JSON-able values, and NumPy arrays
      anywhere among them. Changed in place; the run's checkpoints keep it.
    metrics: scalars to log; an edit may add some.
    decode: token ids to text.
    sampled: all scored trajectories of the batch, also of groups that `filter_zero_variance` dropped
      and that no edit gives back; by default the same as `trajectories`.
  """

  trajectories: list[Trajectory]
  tasks: Mapping[str, Task]
  index: int
  memory: dict[str, Any]
  metrics: dict[str, float]
  decode: Any = None
  sampled: list[Trajectory] | None = None

  def __post_init__(self):
    self.sampled = self.trajectories if self.sampled is None else self.sampled

  def groups(self) -> list[list[Trajectory]]:
    """The trajectories by group, in order."""
    found: dict[int, list[Trajectory]] = {}
    for t in self.trajectories:
      found.setdefault(t.group, []).append(t)
    return list(found.values())


def keep(step: Step, *, at_least: float = -float("inf"), below: float = float("inf")
         ) -> list[Trajectory]:
  """Takes sequences out whose reward is not in [at_least, below): they leave statistics, losses and
  their denominators (PSR and NSR, arXiv:2506.01347, keep right and wrong answers only)."""
  return [dataclasses.replace(t, scored=t.scored and at_least <= t.reward < below)
          for t in step.trajectories]


def apply(edits, step: Step) -> list[Trajectory]:
  """Runs edits in order; each sees what the one before it returned.

  Raises:
    ValueError: an edit that returned no list of trajectories.
  """
  for edit in edits:
    found = compose.at(edit, step.index)(step)
    name = getattr(edit, "func", edit).__name__
    if not isinstance(found, list) or not all(isinstance(t, Trajectory) for t in found):
      raise ValueError(f"the edit {name!r} of config.rollout.edits returned "
                       f"{type(found).__name__}, not a list of Trajectory")
    step.trajectories = found
  return step.trajectories
