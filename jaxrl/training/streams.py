"""Work that a CPU does in several threads at once, which call one program.

XLA spreads every operation of a program over all cores, and those of a small model are too small for
that: two threads that do half of the work each are done sooner (`dpo` of `scripts/bench/compare.py` on
an Intel Xeon: 0.52 -> 0.36 s, against loops of one program).
"""

from collections.abc import Callable
from concurrent import futures
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
    count = self._count(batch)
    shape = jax.tree.structure(batch), tuple((x.shape, x.dtype) for x in jax.tree.leaves(batch))

    def one(index: int) -> Any:
      with jax.set_mesh(self._mesh):  # threads do not share it
        return jax.block_until_ready(self._part(state, batch, index, count))
    if shape in self._seen:
      with futures.ThreadPoolExecutor(count) as pool:
        parts = list(pool.map(one, range(count)))
    else:  # threads that come to a new shape together would all compile it
      parts = [one(index) for index in range(count)]
      self._seen.add(shape)
    return self._whole(state, batch, parts)

  def trace(self, state: Any, batch: Any) -> list[jax.stages.Traced]:
    """The programs of a call, the one that returns its result last."""
    count = self._count(batch)
    part = self._part.trace(state, batch, 0, count)
    # Parts leave arrays where their inputs lie, as all of them do on one device.
    place = jax.NamedSharding(self._mesh, jax.P())
    found = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=place, weak_type=x.weak_type), part.out_info)
    return [part, self._whole.trace(state, batch, [found] * count)]


def trace(function: Callable, *args) -> list[jax.stages.Traced]:
  """The programs of a call of a jitted function, or of one that runs side by side."""
  return function.trace(*args) if isinstance(function, SideBySide) else [function.trace(*args)]
