"""Shuffled, sharded, checkpointable streams of tasks, on Grain."""

from collections.abc import Callable
import sys
from typing import Any

import grain
import numpy as np

from jaxrl.batch import Task
from jaxrl.data.sources import Source


class TaskIterator:
  """An iterator over tasks, made by `tasks_pipeline`; its state is a small JSON-able dictionary."""

  def __init__(self, source: Source, prepare: Callable[[Source, int], Task | None],
               dataset: grain.MapDataset, patience: int, identity: dict[str, Any]):
    self._source, self._prepare = source, prepare
    self._patience, self._identity = patience, identity
    # Without threads and read-ahead, the state is that of what was handed out.
    self._rows = iter(dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

  def __iter__(self) -> "TaskIterator":
    return self

  def __next__(self) -> Task:
    for _ in range(self._patience):
      task = self._prepare(self._source, next(self._rows))
      if task is not None:
        return task
    raise ValueError(
        f"not one of {self._patience} rows was usable, {self._source.where(0)} among them: "
        "on_bad_row='fail' stops at the first one and says why")

  def get_state(self) -> dict[str, Any]:
    """What continues after the last item handed out; survives JSON."""
    return {"rows": dict(self._rows.get_state()), "identity": dict(self._identity)}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where `get_state` was taken.

    Raises:
      ValueError: the state is of a pipeline over other data, or with another seed or sharding.
    """
    saved = state.get("identity", {})
    changed = [f"{k} was {saved.get(k)} and is {v}" for k, v in self._identity.items()
               if saved.get(k) != v]
    if changed:
      raise ValueError(f"cannot continue reading from {self._source.where(0)} on: "
                       f"{', '.join(changed)}; continue with the same data and settings, or start "
                       "a new run")
    self._rows.set_state(dict(state["rows"]))


class _Order:
  """Row at each position of the stream: one permutation after the other, or the rows in order.

  One permutation is held at a time, eight bytes a row.

  Grain's own shuffle draws indices one by one from a cipher, which takes milliseconds each where
  there are few rows; and its epoch e with seed s is its epoch e - 1 with seed s + 1.
  """

  def __init__(self, rows: int, *, seed: int, shuffle: bool, repeat: bool):
    self._rows, self._seed, self._shuffle = rows, seed, shuffle
    self._length = sys.maxsize - sys.maxsize % rows if repeat else rows
    self._permutation = (-1, None)  # of which epoch, and the rows in its order

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, position: int) -> int:
    epoch, index = divmod(position, self._rows)
    if not self._shuffle:
      return index
    drawn, permutation = self._permutation
    if drawn != epoch:
      permutation = np.random.default_rng([self._seed, epoch]).permutation(self._rows)
      self._permutation = (epoch, permutation)
    return int(permutation[index])


def tasks_pipeline(source: Source, prepare: Callable[[Source, int], Task | None], *, seed: int,
                   shuffle: bool = True, repeat: bool = True, shard_index: int = 0,
                   shard_count: int = 1) -> TaskIterator:
  """Iterates over the tasks that `prepare` makes of the rows of a source.

  The order is drawn anew for every epoch, over all rows; shard `i` of `n` takes every n-th row of
  the stream from the i-th. So taken in turn the shards give the stream of a single reader, and
  together they read every row once an epoch. Everything runs in the calling thread.

  Args:
    source: rows by index.
    prepare: `TaskBuilder.read`, `TaskBuilder.read_solved` or any function of the source and an
      index; rows for which it returns None are passed over.
    seed: order of the rows, 0 to 2**32 - 1.
    shuffle: False keeps the order of the source.
    repeat: False ends after one epoch.
    shard_index, shard_count: the part of the rows that this process reads.

  Raises:
    ValueError: an impossible seed or shard; later, when an epoch has no row to hand out.
  """
  if not 0 <= seed < 2 ** 32:
    raise ValueError(f"seed={seed}: use 0 to 2**32 - 1")
  if not 0 <= shard_index < shard_count:
    raise ValueError(f"shard_index={shard_index} of shard_count={shard_count}: use 0 to "
                     f"{shard_count - 1}")
  if len(source) < shard_count:
    raise ValueError(f"{len(source)} rows cannot be shared out over {shard_count} processes: use "
                     "more data or fewer processes")
  order = _Order(len(source), seed=seed, shuffle=shuffle, repeat=repeat)
  dataset = grain.MapDataset.source(order)[shard_index::shard_count]
  # The last good row of one epoch and the first of the next can be nearly two epochs apart, and a
  # shard may miss the few good rows of one epoch altogether.
  patience = 2 * len(source) if repeat else len(dataset)
  identity = dict(source_rows=len(source), seed=seed, shuffle=shuffle, shard_index=shard_index,
                  shard_count=shard_count)
  return TaskIterator(source, prepare, dataset, patience, identity)
