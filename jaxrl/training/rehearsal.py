"""The programs of a phase before there is data: traced, which finds mistakes, then compiled aside.

Tracing runs every piece once on abstract arrays, so that those which do not fit together fail before
anything is computed. What was traced is kept: while the first samples are drawn, a thread compiles
it (or reads it from disk), and the first update of the shape that was rehearsed finds it done.
"""

from concurrent import futures
from collections.abc import Callable
import threading
from typing import Any

import jax

from jaxrl import sharding
from jaxrl.batch import TokenBatch
from jaxrl.training import streams
from jaxrl.training.learner import Learner
from jaxrl.training.state import TrainState


class Aside:
  """Compiles in a thread.

  With several processes it does nothing: they may have to agree on the order of compilations.
  """

  def __init__(self):
    self._done: futures.Future | None = None

  def compile(self, compile: Callable[[], Any]) -> None:
    """Begins, unless it has begun before. Jitted functions know by themselves what was compiled."""
    if self._done or jax.process_count() > 1:
      return
    self._done = futures.Future()

    def run():
      try:
        compile()
      except Exception as error:  # will come again when the function is called, where it can be seen
        self._done.set_exception(error)
      else:
        self._done.set_result(None)
    threading.Thread(target=run, name="jaxrl-compile").start()

  def first(self, function: Callable, expected: Any = None) -> Callable:
    """The function, made to wait for what is being compiled: for a last argument of the shapes of
    `expected`, or for any. Another shape is another program."""
    def wait(args):
      if self._done and (expected is None or _shapes(args[-1]) == _shapes(expected)):
        futures.wait([self._done])
    return _Later(wait, function)


class _Later:
  """A function that waits for something else whenever it is called, see `streams.begin`."""

  def __init__(self, wait: Callable[[tuple], None], function: Callable):
    self._wait, self._function = wait, function

  def __call__(self, *args: Any) -> Any:
    return self.begin(*args)()

  def begin(self, *args: Any) -> Callable[[], Any]:
    """Waits, then starts the call."""
    self._wait(args)
    return streams.begin(self._function, *args)


class Rehearsal:
  """The programs of a phase, for one shape of batches.

  Attributes:
    learner: the functions of the phase; each waits for its compilation, if one is under way.
    state, batch: what they were traced with, abstract; the batch before it is prepared.
    signals, update: programs of `learner.Learner`'s functions, the one that returns the result last.
  """

  def __init__(self, learner: Learner, state: TrainState, batch: TokenBatch,
               mesh: jax.sharding.Mesh):
    """Traces the programs.

    Args:
      learner: compiled functions.
      state: abstract, as `state.abstract_state`.
      batch: a host batch of the shape that is expected, interleaved.
      mesh: that trains.

    Raises:
      Whatever a piece raises when it does not fit the others.
    """
    with jax.set_mesh(mesh):
      self.state, self.batch = state, _abstract(batch, mesh)
      self.signals = streams.trace(learner.signals, state, self.batch)
      with_signals = batch.with_signals(**self.signals[-1].out_info[0])
      self.update = streams.trace(learner.update, state, _abstract(with_signals, mesh))
    self._mesh, self._aside = mesh, Aside()
    self.learner = Learner(self._aside.first(learner.signals, batch),
                           self._aside.first(learner.update, with_signals), learner.measure)

  def compile(self) -> None:
    """Begins to compile in a thread, unless it has begun before."""
    def compile_all():
      with jax.set_mesh(self._mesh):
        for traced in (*self.signals, *self.update):
          traced.lower().compile()
    self._aside.compile(compile_all)


def _shapes(tree):
  return [x.shape for x in jax.tree.leaves(tree)]


def _abstract(batch: TokenBatch, mesh: jax.sharding.Mesh) -> TokenBatch:
  """Shapes, types and shardings of a batch that `sharding.put_batch` has moved to the mesh."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch,
                      sharding.batch_sharding(mesh)(batch))
