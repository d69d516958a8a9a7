"""The layout of a phase's batches, changed where what was sampled fits another one better.

What a phase expects before its first batch serves responses of the longest length and of half of it. If most
are much shorter, or a few are long, most of such a batch is padding. So the loop shows its batches; where
another layout saves enough until the end of the phase, its programs are compiled while the policy samples
again, and batches have it from then on.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import threading

import jax

from jaxrl.batch import Layout, Trajectory
from jaxrl.training.learner import Learner
from jaxrl.training.rehearsal import Rehearsal
from jaxrl.training.shapes import Fitter, Shape

LEAST = 0.05  # of the work of an update, that another layout has to save
WORTH = 20  # updates, whose work it has to save until the end of the phase: to compile it costs less


class Fitting:
  """Shapes and programs for a phase whose responses become known.

  Batches 1, 2, 4, 8, ... of the phase are looked at, so that it soon compiles nothing more. What is decided
  depends on them and on the layout before, which checkpoints keep; so a run that continues decides the same.
  """

  def __init__(self, shape: Shape, learner: Learner, fitter: Fitter, rehearse: Callable[[Shape], Rehearsal]):
    """
    Args:
      shape, learner: what the phase begins with.
      fitter: knows other shapes.
      rehearse: traces the programs of a shape.
    """
    self._fitter, self._rehearse = fitter, rehearse
    self._sequences = shape.sequences
    self._known = {shape.layout: _done((shape, learner))}

  def now(self, layout: Layout) -> tuple[Shape, Learner]:
    """The shape of batches in a layout, and their programs; waits until these are compiled."""
    self._begin(layout)
    return self._known[layout].result()

  def look(self, trajectories: Sequence[Trajectory], layout: Layout, *, longest: int, batch: int, left: int
           ) -> tuple[Layout, float] | None:
    """Another layout for the batches to come, if it is worth its compilation, which then begins; and the
    share of the work of batches like this one that it saves.

    Args:
      trajectories: of a batch.
      layout: that it had.
      longest: tokens of the longest response so far.
      batch: its number in the phase, from 1.
      left: updates after those on it.
    """
    if batch & (batch - 1):
      return None
    layout, saved = self._fitter.best(layout, trajectories, longest)
    if saved < LEAST or saved * left < WORTH:
      return None
    self._begin(layout)
    return layout, saved

  def _begin(self, layout):
    """Begins to compile, unless it has begun before; several processes have to do it in one order."""
    if layout in self._known:
      return
    done = self._known[layout] = futures.Future()

    def make():
      try:
        shape = self._fitter.shape(layout, self._sequences)
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
