"""Work that a CPU does in several threads at once, which call one program.

XLA spreads every operation of a program over all cores, and those of a small model are too small for
that: two threads that do half of the work each are done sooner (`dpo` of `scripts/bench/compare.py` on
an Intel Xeon: 0.52 -> 0.36 s, against loops of one program).
"""

from collections.abc import Callable
from concurrent import futures
import functools
from typing import Any

import jax


class SideBySide:
  """A function whose work is done in parts, and put together:

    whole(state, batch, [part(state, batch, i, n) for i in range(n)])
  """

  def __init__(self, part: Callable, whole: Callable, count: Callable[[Any], int],
               mesh: jax.sharding.Mesh):
    """Of jitted functions; `count` tells from a batch how many parts there are to be."""
    self._part, self._whole, self._count, self._mesh = part, whole, count, mesh
    self._seen: set = set()

  def __call__(self, state: Any, batch: Any) -> Any:
    return self.begin(state, batch)()

  def begin(self, state: Any, batch: Any) -> Callable[[], Any]:
    """Starts all parts, and returns what waits for them and puts them together."""
    count = self._count(batch)
    shape = jax.tree.structure(batch), tuple((x.shape, x.dtype) for x in jax.tree.leaves(batch))
    starts = [futures.Future() for _ in range(count)]

    def one(index: int) -> Any:
      try:
        with jax.set_mesh(self._mesh):  # threads do not share it
          part = self._part(state, batch, index, count)
      except BaseException as error:
        starts[index].set_exception(error)
        raise
      starts[index].set_result(None)
      return jax.block_until_ready(part)
    running = []
    for index, start in enumerate(starts):
      running.append(_threads(count).submit(one, index))
      if shape not in self._seen:  # threads that come to a new shape together would all compile it
        start.result()
    futures.wait(starts)  # else what the caller does meanwhile would keep threads from their first step
    self._seen.add(shape)

    def finish():
      futures.wait(running)
      return self._whole(state, batch, [part.result() for part in running])
    return finish

  def trace(self, state: Any, batch: Any) -> list[jax.stages.Traced]:
    """The programs of a call, the one that returns its result last."""
    count = self._count(batch)
    part = self._part.trace(state, batch, 0, count)
    # Parts leave arrays where their inputs lie, as all of them do on one device.
    place = jax.NamedSharding(self._mesh, jax.P())
    found = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=place, weak_type=x.weak_type), part.out_info)
    return [part, self._whole.trace(state, batch, [found] * count)]


@functools.cache
def _threads(count: int) -> futures.ThreadPoolExecutor:
  """As many threads, which all functions with so many parts share."""
  return futures.ThreadPoolExecutor(count, thread_name_prefix="jaxrl-stream")


def begin(function: Callable, *args) -> Callable[[], Any]:
  """Starts a call, and returns what waits for its result; one that is not `SideBySide` is made now,
  of which JAX computes what it can later."""
  if hasattr(function, "begin"):
    return function.begin(*args)
  result = function(*args)
  return lambda: result


def trace(function: Callable, *args) -> list[jax.stages.Traced]:
  """The programs of a call of a jitted function, or of one that runs side by side."""
  return function.trace(*args) if isinstance(function, SideBySide) else [function.trace(*args)]
