"""A training batch of groups: rollouts, with bounded resampling of groups that teach nothing."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax

from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rollouts.engine import EpisodeFailure
from jaxrl.rollouts.engine import GROUPS_PER_EPISODE
from jaxrl.rollouts.engine import Rollouts


@dataclasses.dataclass
class Collected:
  """Trajectories of one batch, and how they came about."""

  trajectories: list[Trajectory]
  sampled: list[Trajectory]  # kept or not
  tasks: dict[str, Task]
  groups: int  # groups sampled, kept or not
  effective_groups: int  # groups among them whose rewards, or scores of `filter_by`, differ


def collect(rollouts: Rollouts, params: Any, next_tasks: Callable[[int], list[Task]], *,
            prompts: int, base_key: jax.Array, key: tuple[int, ...], step: int,
            filter_zero_variance: bool = False, filter_by: str = "", max_resample: int = 0,
            reference: Any = None) -> Collected:
  """Collects the groups of `prompts` tasks.

  Args:
    next_tasks: draws that many tasks from the data; the same task may come again.
    prompts: tasks wanted.
    base_key, key, step, reference: as in `Rollouts.run`.
    filter_zero_variance: drop groups whose scored rewards are all equal, and draw as many tasks
      again until `prompts` of them are left, at most `max_resample` times (dynamic sampling of
      DAPO, arXiv:2503.14476, eq. 11, with a bound). Rounds are of one size, so that none compiles
      anything new; what the last brings too many is dropped. If no group differs at all the last
      round is kept: its advantages are 0. A sequence alone is no comparison, such as a known solution
      beside samples: it stays if another group of its episode does.
    filter_by: criterion whose scores have to differ, such as DAPO's accuracy where the reward holds a
      punishment for length too; empty for the reward.

  Raises:
    EpisodeFailure: no episode returned anything, or as in `Rollouts.run`.
  """
  kept, latest, sampled, tasks, total, effective, episodes = [], [], [], {}, 0, 0, 0
  for _ in range(1 + (max_resample if filter_zero_variance else 0)):
    drawn = next_tasks(prompts)
    tasks |= {t.id: t for t in drawn}
    groups = _by_group(rollouts.run(params, drawn, base_key=base_key, key=key, step=step,
                                    first_episode=episodes, reference=reference))
    latest = groups or latest
    episodes += len(drawn)
    sampled += [t for g in groups for t in g]
    total += len(groups)
    differing = {_episode(g) for g in groups if _differs(g, filter_by)}
    effective += sum(_differs(g, filter_by) for g in groups)
    kept += [g for g in groups if not filter_zero_variance or _differs(g, filter_by)
             or len(g) == 1 and _episode(g) in differing]
    if len({_episode(g) for g in kept}) >= prompts:
      break
  if not latest:
    raise EpisodeFailure(f"step {step}: none of {episodes} episodes returned a trajectory; the "
                         "function in config.rollout.episode must return what is to be trained on")
  wanted = sorted({_episode(g) for g in kept})[:prompts]
  kept = [g for g in kept if _episode(g) in wanted]
  return Collected([t for g in kept or latest for t in g], sampled, tasks, total, effective)


def _by_group(trajectories):
  groups = {}
  for t in trajectories:
    groups.setdefault(t.group, []).append(t)
  return list(groups.values())


def _differs(group, by):
  if not by:
    return len({t.reward for t in group if t.scored}) > 1
  found = [t.evidence[by] for t in group if t.scored and by in t.evidence]
  return len({criterion.score for criterion in found if criterion.status == "ok"}) > 1


def _episode(group):
  return group[0].group // GROUPS_PER_EPISODE
