"""Asynchronous rollouts: batches are sampled while the trainer still works on earlier ones.

The schedule is fixed; nothing is raced for. Batch b of a phase, on which the updates from b * u on
train (u is `config.rollout.updates`), is sampled with the parameters that update
max(0, b - s) * u starts from, s being `config.rollout.staleness`. So its samples are s * u updates
old when training on them begins, the first batches aside, and what a run computes depends on no
clock. Objective terms that divide by `behaviour_logprobs` correct for the difference of policies.

  trainer   | wait | batch 0 | batch 1 | batch 2 |        s = 1: batch b + 1 is sampled
  sampler   |  0   |    1    |    2    |    3    |        while batch b is trained on
"""

import collections
from collections.abc import Callable
from concurrent import futures
import dataclasses
import itertools
import queue
import threading
import time
from typing import Any

from jaxrl.training import stored
from jaxrl.training.supply import Supplied
from jaxrl.training.supply import Supply


class Ahead:
  """A supply that another one fills in a thread of its own, a fixed number of batches ahead.

  The thread makes one batch after the other, in order. What goes wrong in it is raised to the
  trainer in the place of the batch that it belongs to.

  At most `staleness + 1` copies of the parameters, and of the reference if there is one, exist at a
  time.
  """

  def __init__(self, supply: Supply, *, staleness: int, updates: int, steps: int,
               copy: Callable[[Any], Any]):
    """
    Args:
      supply: makes the batches.
      staleness: how many batches ahead of the trainer; at least 1.
      updates: of the trainer on each batch.
      steps: updates of the phase; no batch is made that none of them would use.
      copy: copies parameters to where they sample, complete when it returns, for the trainer gives
        its own away at the next update.
    """
    self.sampled = supply.sampled
    self._supply, self._staleness, self._updates, self._copy = supply, staleness, updates, copy
    self._batches = -(-steps // updates)
    self._ordered = 0  # batches given to the thread so far, in the whole phase
    self._pending: collections.deque[futures.Future] = collections.deque()  # not handed out yet
    self._jobs = queue.SimpleQueue()
    self._thread: threading.Thread | None = None
    self._handed_out: float | None = None  # when the last batch was
    self._position: dict | None = None  # of the supply before the batch that it failed to make

  def next(self, params: Any, step: int, reference: Any = None) -> Supplied:
    """The batch for update `step`; has another one made with a copy of `params` and `reference`."""
    began = time.perf_counter()
    batch = step // self._updates
    end = min(batch + self._staleness + 1, self._batches)
    if self._ordered < end:
      self._order(self._copy(params), None if reference is None else self._copy(reference), end)
    ready = time.perf_counter()
    supplied = self._pending.popleft().result()
    now = time.perf_counter()
    since = began if self._handed_out is None else self._handed_out
    self._handed_out = now
    return dataclasses.replace(supplied, metrics={
        **supplied.metrics, "staleness": min(batch, self._staleness) * self._updates,
        "copy_seconds": ready - began, "wait_seconds": now - ready,
        "wait_fraction": (now - ready) / max(now - since, 1e-9)})

  def prefetch(self) -> None:
    pass

  def get_state(self) -> dict:
    """Waits for the batches under way: they cannot be made again without their parameters, so they
    are part of the position, as NumPy arrays beside JSON-able values.

    One that could not be made, which the trainer has yet to be told, is not: who continues from here
    makes it anew, with the parameters of then.
    """
    made = list(itertools.takewhile(lambda future: future.exception() is None, self._pending))
    failed = len(made) < len(self._pending)
    return {"supply": self._position if failed else self._supply.get_state(),
            "ordered": self._ordered - len(self._pending) + len(made),
            "pending": [stored.to_state(future.result()) for future in made]}

  def set_state(self, state: dict) -> None:
    self._supply.set_state(state["supply"])
    self._ordered = state["ordered"]
    self._pending.clear()
    for batch in state["pending"]:
      future = futures.Future()
      future.set_result(stored.from_state(batch))
      self._pending.append(future)

  def close(self) -> None:
    """Drops the batches that were ordered, and waits for the thread to give up the one it is at."""
    for future in self._pending:
      future.cancel()
    self._supply.close()
    if self._thread is not None:
      self._jobs.put(None)
      self._thread.join()

  def _order(self, params, reference, end):
    """Has the thread make all batches before `end`, with copies of the parameters."""
    if self._thread is None:
      # A daemon, so that a second Ctrl-C while `close` waits ends the process.
      self._thread = threading.Thread(target=self._work, name="jaxrl rollouts", daemon=True)
      self._thread.start()
    for batch in range(self._ordered, end):
      self._pending.append(futures.Future())
      self._jobs.put((self._pending[-1], params, reference, batch * self._updates))
    self._ordered = end

  def _work(self):
    while self._make():
      pass

  def _make(self) -> bool:
    """Makes the next batch; False at the end. A method of its own, so that no variable keeps the
    parameters of a batch that is done."""
    job = self._jobs.get()
    if job is None:
      return False
    future, params, reference, step = job
    if not future.set_running_or_notify_cancel():
      return True
    position = self._supply.get_state()
    try:
      future.set_result(self._supply.next(params, step, reference))
      return True
    except BaseException as error:  # whatever it is, the trainer waits for it
      self._position = position
      future.set_exception(error)
      return False
