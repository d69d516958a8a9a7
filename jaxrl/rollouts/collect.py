"""A training batch of groups: rollouts, with bounded resampling of groups that teach nothing."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax

from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rollouts.engine import Rollouts


@dataclasses.dataclass
class Collected:
  """Trajectories of one batch, and how they came about."""

  trajectories: list[Trajectory]
  tasks: dict[str, Task]
  groups: int  # groups sampled, kept or not
  effective_groups: int  # groups among them whose rewards differ


def collect(rollouts: Rollouts, params: Any, next_tasks: Callable[[int], list[Task]], *,
            prompts: int, base_key: jax.Array, key: tuple[int, ...], step: int,
            filter_zero_variance: bool = False, max_resample: int = 0) -> Collected:
  """Collects the groups of `prompts` tasks.

  Args:
    next_tasks: draws that many tasks from the data.
    filter_zero_variance: drop groups whose scored rewards are all equal, and draw new tasks for
      them, at most `max_resample` times (dynamic sampling of DAPO, arXiv:2503.14476, eq. 11, with
      a bound). If no group differs at all the last round is kept: its advantages are 0.
  """
  kept, tasks, sampled, effective, episodes = [], {}, 0, 0, 0
  for _ in range(1 + (max_resample if filter_zero_variance else 0)):
    drawn = next_tasks(prompts - len(kept))
    tasks |= {t.id: t for t in drawn}
    groups = {}
    for t in rollouts.run(params, drawn, base_key=base_key, key=key, step=step,
                          first_episode=episodes):
      groups.setdefault(t.group, []).append(t)
    episodes += len(drawn)
    sampled += len(groups)
    differing = [g for g in groups.values() if len({t.reward for t in g if t.scored}) > 1]
    effective += len(differing)
    kept += differing if filter_zero_variance else list(groups.values())
    if len(kept) >= prompts:
      break
  if not kept:
    kept = list(groups.values())
  return Collected([t for g in kept for t in g], tasks, sampled, effective)
