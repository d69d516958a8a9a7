"""Edits: what `config.rollout.edits` may list, each `(step, *, ...) -> trajectories`.

An edit sees all scored trajectories of a batch at once, before they are packed: it may set rewards
from whole groups, take sequences out, add some of earlier batches, or remember something of prompts
in `step.memory`, which checkpoints keep.
"""

from collections.abc import Mapping
import dataclasses
import inspect
from typing import Any

import numpy as np

from jaxrl import compose
from jaxrl.batch import PREFERENCE, Task, Trajectory

MISMATCHED = "mismatched"  # the signal of answers to other prompts
TIES = {"first": 0, "shortest": -1, "longest": 1}  # what a token counts among equals


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
    seed: of the run, for random choices.
  """

  trajectories: list[Trajectory]
  tasks: Mapping[str, Task]
  index: int
  memory: dict[str, Any]
  metrics: dict[str, float]
  decode: Any = None
  sampled: list[Trajectory] | None = None
  seed: int = 0

  def __post_init__(self):
    self.sampled = self.trajectories if self.sampled is None else self.sampled

  def groups(self) -> list[list[Trajectory]]:
    """The trajectories by group, in order."""
    found: dict[int, list[Trajectory]] = {}
    for t in self.trajectories:
      found.setdefault(t.group, []).append(t)
    return list(found.values())


def is_edit(function: Any) -> bool:
  """Whether a function takes a `Step` first, by that name."""
  return inspect.isfunction(function) and next(iter(inspect.signature(function).parameters), "") == "step"


def keep(step: Step, *, at_least: float = -float("inf"), below: float = float("inf")
         ) -> list[Trajectory]:
  """Takes sequences out whose reward is not in [at_least, below): they leave statistics, losses and
  their denominators (PSR and NSR, arXiv:2506.01347, keep right and wrong answers only)."""
  return [dataclasses.replace(t, scored=t.scored and at_least <= t.reward < below)
          for t in step.trajectories]


@compose.supplies(columns=(PREFERENCE,))
def best_and_worst(step: Step, *, gap: float = 0.0, ties: str = "first") -> list[Trajectory]:
  """Of every group the sample with the largest reward, preferred to that with the smallest.

  So rollouts become pairs for the losses of `objectives.preference` (online DPO with best and worst of
  n, as in arXiv:2401.10020, section 2.4). Sequences without a reward are not compared. Groups whose
  sequences have the column `preference` already, known pairs beside samples, stay as they are.

  Args:
    step: the batch.
    gap: what the rewards of a pair have to differ by more than. Other groups are dropped, those of
      equal rewards always.
    ties: which one is taken where several have that reward: "first", "shortest" or "longest".

  Returns:
    Pairs, the preferred sequence first, with `columns["preference"]` 1 and 0. A batch without any holds
    one that is not trained on. Metrics: `pairs`, `dropped_groups` (share of those of samples) and
    `reward_gap` (mean over pairs).

  Raises:
    ValueError: another tie-break, or a gap below 0.
  """
  if ties not in TIES or not gap >= 0:
    raise ValueError(f"best_and_worst: ties={ties!r}, gap={gap}; ties are "
                     f"{', '.join(map(repr, TIES))}, and the gap is at least 0")
  pairs, gaps, sampled = [], [], 0
  for group in step.groups():
    if all(PREFERENCE in t.columns for t in group):
      pairs += group
      continue
    sampled += 1
    scored = [t for t in group if t.scored]
    ends = [max(scored, key=lambda t: (sign * t.reward, TIES[ties] * len(t.tokens)), default=None)
            for sign in (1, -1)]
    if scored and ends[0].reward - ends[1].reward > gap:
      gaps.append(ends[0].reward - ends[1].reward)
      pairs += [_with_preference(t, p) for t, p in zip(ends, (1.0, 0.0))]
  step.metrics |= {"pairs": len(gaps), "dropped_groups": 1 - len(gaps) / max(sampled, 1),
                   "reward_gap": float(np.mean(gaps)) if gaps else 0.0}
  # An empty batch would have no columns.
  return pairs or [dataclasses.replace(_with_preference(t, 0.5), scored=False)
                   for t in step.trajectories[:2]]


def _with_preference(t, preference):
  return dataclasses.replace(t, columns={**t.columns, PREFERENCE: preference})


@compose.supplies(MISMATCHED)
def mismatch_answers(step: Step) -> list[Trajectory]:
  """Adds the answers of every group to the prompt of the one before it, which nobody rates: what
  `objectives.kto` estimates its KL with, see `data.mismatched`. It comes after `best_and_worst`."""
  groups, found = step.groups(), []
  for t in step.trajectories:
    signals = {**t.signals, MISMATCHED: np.zeros(len(t.tokens))}
    found.append(dataclasses.replace(t, signals=signals))
  free = 1 + max(t.group for t in found)
  for own, others in zip(groups, [*groups[1:], *groups[:1]]):
    prompt = own[0].tokens[:own[0].prompt_length]
    for t in others:
      answer = t.tokens[t.prompt_length:]
      mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
      signals = {**dict.fromkeys(t.signals, np.zeros(len(mask))), MISMATCHED: mask}
      found.append(Trajectory(
          np.concatenate([prompt, answer]), mask, group=free, scored=False, task_id=own[0].task_id,
          prompt_length=len(prompt), text=t.text, finish=t.finish, columns=dict(t.columns),
          signals=signals))
      free += 1
  return found


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
