"""Toy tasks as random-access data sets with disjoint splits."""

from collections.abc import Mapping
import hashlib
import inspect
from typing import Any
import zlib

import numpy as np

from jaxrl import compose
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.tasks import addition
from jaxrl.tasks import brackets
from jaxrl.tasks import copying
from jaxrl.tasks import corrected_addition
from jaxrl.tasks import countdown
from jaxrl.tasks import cues
from jaxrl.tasks import detours
from jaxrl.tasks import endings
from jaxrl.tasks import guarded_addition
from jaxrl.tasks import habits
from jaxrl.tasks import leanings
from jaxrl.tasks import letters
from jaxrl.tasks import modular_arithmetic
from jaxrl.tasks import noisy_addition
from jaxrl.tasks import preferred_addition
from jaxrl.tasks import principles
from jaxrl.tasks import rated_addition
from jaxrl.tasks import repeated_addition
from jaxrl.tasks import running_sum
from jaxrl.tasks import scratchpad_addition
from jaxrl.tasks import series
from jaxrl.tasks import societies
from jaxrl.tasks import sorting
from jaxrl.tasks import tastes
from jaxrl.tasks import transitions
from jaxrl.tasks import votes
from jaxrl.tasks import walks
from jaxrl.tasks import worked_sums

TASKS = dict(addition=addition, brackets=brackets, copying=copying,
             corrected_addition=corrected_addition, countdown=countdown, cues=cues, detours=detours,
             endings=endings, guarded_addition=guarded_addition, habits=habits, leanings=leanings,
             letters=letters, modular_arithmetic=modular_arithmetic, noisy_addition=noisy_addition,
             preferred_addition=preferred_addition, principles=principles,
             rated_addition=rated_addition, repeated_addition=repeated_addition,
             running_sum=running_sum, scratchpad_addition=scratchpad_addition, series=series,
             societies=societies, sorting=sorting, tastes=tastes, transitions=transitions, votes=votes,
             walks=walks, worked_sums=worked_sums)
SPLITS = ("train", "validation", "test")
DRAWS = 3000  # a split with one problem in 200 is then missed once in 3 million rows


class ToyDataset:
  """Rows of one split of one task; row `i` depends on (task, knobs, split, seed, i) alone.

  A hash of a problem's key, and nothing else, decides its split: 80% train, 10% validation, 10%
  test. So splits are disjoint for any seeds and sizes, and for different knobs too. Within a split
  rows are drawn with replacement from the task's own distribution.
  """

  def __init__(self, name: str, *, split: str, size: int, seed: int, knobs: Mapping[str, Any]):
    self.name, self.split, self.size, self.seed = name, split, size, seed
    self._task, self._knobs = TASKS[name], dict(knobs)
    self[0]  # bad knobs and an empty split show now, not in the middle of a run

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Row with `id`, `task`, `question`, `answer`, `solution` and the task's own fields."""
    if not 0 <= index < self.size:
      raise IndexError(f"row {index} of {self.size} of {self.where(index)}")
    rng = np.random.default_rng(
        [zlib.crc32(self.name.encode()), self.seed, SPLITS.index(self.split), int(index)])
    for _ in range(DRAWS):
      try:
        row = self._task.sample(rng, **self._knobs)
      except (ValueError, TypeError) as error:
        raise ValueError(f"task {self.name}: {error}") from error
      if _split_of(self.name, self._task.key(row)) == self.split:
        return dict(id=f"{self.name}-{self.split}-{self.seed}-{index}", task=self.name, **row)
    raise ValueError(
        f"task {self.name}: no problem of the {self.split} split in {DRAWS} draws with "
        f"{self._knobs or 'the default knobs'}; there are too few different problems to share out "
        "over the splits: choose harder knobs")

  def where(self, index: int) -> str:
    """Where a row stands, for error messages."""
    return f"{self.name}/{self.split}:{index}"


def open_task(name: str, *, split: str, size: int, seed: int, **knobs) -> ToyDataset:
  """Opens a split of a toy task.

  Args:
    name: one of `TASKS`.
    split: `train`, `validation` or `test`.
    size: number of rows.
    seed: 0 or more; other seeds give other rows of the same split.
    **knobs: keyword arguments of the task's `sample`.

  Raises:
    ValueError: unknown task, split or knob (with the nearest valid name), a knob out of its range,
      or knobs that leave the split without a problem.
  """
  if name not in TASKS:
    raise ValueError(f"there is no toy task {name!r}{compose.nearest(name, TASKS)}")
  if split not in SPLITS:
    raise ValueError(f"task {name}: there is no split {split!r}{compose.nearest(split, SPLITS)}")
  if size < 1 or seed < 0:
    raise ValueError(f"task {name}: size={size}, seed={seed}: use size >= 1 and seed >= 0")
  valid = [p.name for p in inspect.signature(TASKS[name].sample).parameters.values()
           if p.kind is p.KEYWORD_ONLY]
  for knob in knobs:
    if knob not in valid:
      raise ValueError(f"task {name} has no knob {knob!r}{compose.nearest(knob, valid)}")
  return ToyDataset(name, split=split, size=size, seed=seed, knobs=knobs)


def oracle(task: Task, completion: Trajectory) -> bool:
  """Whether the text of a completion solves a toy task; the name of this reward in a config is
  `jaxrl.tasks:oracle`.

  Raises:
    ValueError: the task's row is not of a toy task.
  """
  name = task.row.get("task")
  if name not in TASKS:
    raise ValueError(f"task {task.id!r} is not a toy task (its row has task={name!r}, and the "
                     f"oracle knows {', '.join(TASKS)}): choose another reward for this data")
  return TASKS[name].check(task.row, completion.text)


def _split_of(name, key):
  digest = hashlib.blake2b(f"{name}:{key}".encode(), digest_size=8).digest()
  share = int.from_bytes(digest, "little") % 10
  return "test" if share == 0 else "validation" if share == 1 else "train"
