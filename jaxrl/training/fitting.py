"""The layout of a phase's batches, changed where what was sampled fits another one better.

What a phase expects before its first batch serves responses of the longest length and of half of it. If most
are much shorter, or a few are long, most of such a batch is padding. So the loop shows its batches; where
another layout saves enough until the end of the phase, its programs are compiled while the policy samples
again, and batches have it from then on.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import threading

import jax

from jaxrl.batch import Layout, Trajectory
from jaxrl.training.learner import Learner
from jaxrl.training.rehearsal import Rehearsal
from jaxrl.training.shapes import Fitter, Shape

Fitted = tuple[int, ...]  # row and trunk length, rows per trunk, rows at a time, and rows that batches are padded to
LEAST = 0.05  # of the work of an update, that another layout has to save
WORTH = 50  # updates, whose work it has to save until the end of the phase: to compile it takes about 40 of the quickstart


class Fitting:
  """Shapes and programs for a phase whose responses become known.

  Batches 1, 2, 4, 8, ... of the phase are looked at, so that it soon compiles nothing more. What is decided
  depends on them and on what was decided before, which checkpoints keep; so a run that continues decides the
  same.
  """

  def __init__(self, shape: Shape, learner: Learner, fitter: Fitter, rehearse: Callable[[Shape], Rehearsal]):
    """
    Args:
      shape, learner: what the phase begins with.
      fitter: knows other shapes.
      rehearse: traces the programs of a shape.
    """
    self._fitter, self._rehearse = fitter, rehearse
    self._units = fitter.mesh.shape["data"] * fitter.mesh.shape["fsdp"]
    self._known = {(): _done((shape, learner))}

  def now(self, fitted: Fitted, least: Sequence[int]) -> tuple[Shape, Learner]:
    """A shape that was decided on, and its programs, traced; their first call waits for their compilation.

    Args:
      fitted: what `look` has returned; () is what the phase began with.
      least: `Progress.shape`.
    """
    self.begin(fitted, least)
    shape, learner = self._known[tuple(fitted)].result()
    return shape.at_least(*least), learner

  def look(self, trajectories: Sequence[Trajectory], shape: Shape, *, longest: Sequence[int], batch: int,
           left: int) -> tuple[Fitted, float] | None:
    """Another shape for the batches to come, if it is worth its compilation, and the share of work it saves.

    Args:
      trajectories: of a batch.
      shape: that it had.
      longest: as `shapes.longest_of`, of all batches so far.
      batch: its number in the phase, from 1.
      left: updates after those on it.
    """
    if batch & (batch - 1):
      return None
    found, saved = self._fitter.best(shape, trajectories, longest)
    if saved < LEAST or saved * left < WORTH:
      return None
    return (*dataclasses.astuple(found.layout), found.micro_batch_rows, found.rows), saved

  def begin(self, fitted: Fitted, least: Sequence[int]) -> None:
    """Begins to compile, unless it has begun before; several processes have to do it in one order.

    Args:
      fitted, least: as in `now`.
    """
    fitted = tuple(fitted)
    if fitted in self._known:
      return
    done = self._known[fitted] = futures.Future()
    *layout, micro, rows = fitted
    layout = Layout(*layout)
    unit = self._units * layout.rows_per_trunk  # perhaps of other devices than those that it was decided on
    shape = Shape(layout, -(-micro // unit) * unit, rows).at_least(*least)

    def make():
      try:
        rehearsal = self._rehearse(shape)
        rehearsal.compile()
        done.set_result((shape, rehearsal.learner))
      except BaseException as error:  # for who waits
        done.set_exception(error)
    if jax.process_count() > 1:
      make()
    else:
      threading.Thread(target=make, name="jaxrl-fit").start()


def _done(result):
  future = futures.Future()
  future.set_result(result)
  return future
