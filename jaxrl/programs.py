"""`jax.jit` whose programs the next start of a command need not trace.

JAX's compilation cache keeps what XLA has compiled, but to find it there JAX traces a Python function and
lowers it to StableHLO first: 0.9 of 3.6 s to the first update of `scripts/bench/startup.py`. Inside `kept_in`
the StableHLO is kept too (`jax.export`). It is found by a digest of all that tracing is given: the function
with what it closes over, its options, the shapes and structure of its arguments, JAX's configuration. It
is believed as long as all files are unchanged of the modules that were loaded when it was made. A function
that closes over anything of which no digest is made, such as a piece of one's own, is traced at every start;
so is one that cannot be exported.

What was changed in memory (a function put in the place of another one of a module) is not seen. So only
processes that run one command keep programs: see `keep_traced` of `jaxrl.training.run`.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import os
import pathlib
import pickle
import sys
import tempfile
import threading
import time
from typing import Any
import zlib

import jax
from jax import export
import jax.numpy as jnp

from jaxrl import digests

FORMAT = 1  # of the files
SUFFIX = "-traced"  # of their names
_place: pathlib.Path | None = None  # where programs are kept, if they are


@contextlib.contextmanager
def kept_in(directory: pathlib.Path) -> Iterator[None]:
  """Has programs of `jit` kept in a directory, if there is a single device."""
  global _place
  before, _place = _place, directory if jax.device_count() == 1 else None
  _state_of.cache_clear()
  try:
    yield
  finally:
    _place = before


class jit:  # noqa: N801, written as `jax.jit`
  """A jitted function, whose programs can be kept.

  Static arguments are keywords, all others are not. Results are never weakly typed, as those of exported
  programs cannot be.
  """

  def __init__(self, function: Callable, *, static_argnames: tuple[str, ...] = (),
               count: collections.Counter[str] | None = None, **options: Any):
    """
    Args:
      function: pure.
      static_argnames: keywords, whose values can be hashed.
      count: counts programs by the name of their function.
      options: others of `jax.jit`.
    """
    self.__name__ = getattr(function, "func", function).__name__
    self._function, self._options, self._count = function, options, count

    @functools.wraps(getattr(function, "func", function))
    def traced(*args, **static):
      self._counts()
      return jax.tree.map(_strong, function(*args, **static))
    self._traced = jax.jit(traced, static_argnames=static_argnames, **options)
    self._programs: dict[Any, Callable | None] = {}  # by what tracing is given; None if not to be kept
    self._lock = threading.Lock()

  def __call__(self, *args: Any, **static: Any) -> Any:
    program = self._program(args, static)
    return program(*args) if program else self._traced(*args, **static)

  def trace(self, *args: Any, **static: Any) -> jax.stages.Traced:
    """As that of `jax.jit`."""
    program = self._program(args, static)
    return program.trace(*args) if program else self._traced.trace(*args, **static)

  def lower(self, *args: Any, **static: Any) -> jax.stages.Lowered:
    """As that of `jax.jit`."""
    return self.trace(*args, **static).lower()

  def _program(self, args, static):
    """The jitted function of a kept program, which takes no static arguments; None if there is none."""
    if _place is None:
      return None
    leaves, structure = jax.tree.flatten(args)
    given = (_place, structure, tuple(map(_described, leaves)), tuple(sorted(static.items())),
             jax.sharding.get_abstract_mesh())
    if given not in self._programs:
      with self._lock:
        if given not in self._programs:
          self._programs[given] = self._find(args, static, given)
    return self._programs[given]

  def _find(self, args, static, given):
    place, *of_arguments, mesh = given
    try:
      key = digests.digest([_surroundings(), str(mesh), self._function, self._options, of_arguments])
    except digests.Undescribed:
      return None
    path = place / f"{self.__name__}-{key}{SUFFIX}"
    if found := _read(path):
      self._counts()
    else:
      self._traced.trace(*args, **static)  # so that what is wrong with the function is raised
      try:
        found = _export(self._traced, args, static)
      except Exception:  # of many kinds, for what this version of JAX does not export
        return None
      _write(path, *found)
    exported, results = found

    def program(*args):
      return results.unflatten(exported.call(*jax.tree.leaves(args)))
    program.__name__ = self.__name__
    return jax.jit(program, **self._options)

  def _counts(self):
    if self._count is not None:
      self._count[self.__name__] += 1


def _strong(x):
  return jnp.asarray(x, jnp.result_type(x)) if jax.typeof(x).weak_type else x


def _described(leaf):
  """What tracing knows of an argument."""
  if not hasattr(leaf, "dtype"):
    return type(leaf).__name__
  memory = getattr(getattr(leaf, "sharding", None), "memory_kind", None)
  return tuple(leaf.shape), str(leaf.dtype), getattr(leaf, "weak_type", False), memory


def _surroundings():
  """What else tracing can depend on. Files of different installations are not confused, either."""
  return [FORMAT, sys.version, sys.prefix, __file__, jax.__version__, os.cpu_count(),
          jax.devices()[0].device_kind, {name: str(x) for name, x in sorted(jax.config.values.items())}]


def _export(traced, args, static):
  """A program whose arguments and results are flat, and the structure of its results."""
  exported = export.export(traced)(*args, **static)
  arguments = jax.tree.structure((tuple(exported.in_avals), {}))
  flat = jax.tree.structure(list(exported.out_avals))
  return dataclasses.replace(exported, in_tree=arguments, out_tree=flat), exported.out_tree


def _read(path):
  """What `_write` wrote; None if there is nothing, or nothing that holds any more."""
  try:
    files, results, exported = pickle.loads(zlib.decompress(path.read_bytes()))
    if any(_state_of(name) != state for name, state in files.items()):
      return None
    found = export.deserialize(bytearray(exported)), jax.tree.structure(results)
    os.utime(path)  # the least recently used go first, see `training.compilation.trim`
    return found
  except Exception:  # of many kinds, for a file of another version, or half of one
    return None


def _write(path, exported, results):
  """Keeps a program, unless a file has changed since this process began, which may have loaded it before."""
  names = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
  files = {name: _state_of(name) for name in names if isinstance(name, str)}
  if any(state and state[1] > _STARTED for state in files.values()):
    return
  with contextlib.suppress(Exception):  # a full disk, results of a class that cannot be pickled
    content = zlib.compress(pickle.dumps(
        (files, results.unflatten(range(results.num_leaves)), bytes(exported.serialize()))), 1)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=SUFFIX, delete=False) as file:
      try:
        file.write(content)
        file.flush()
        os.replace(file.name, path)
      except BaseException:
        os.unlink(file.name)
        raise


@functools.cache
def _state_of(name):
  """Size of a file, and when it was changed (ns); None if there is none."""
  try:
    found = os.stat(name)
  except OSError:
    return None
  return found.st_size, found.st_mtime_ns


def _start():
  """When this process began, or before, in ns since 1970."""
  try:
    ticks = int(pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
  except (OSError, AttributeError):  # not on Linux
    age = 60
  return time.time_ns() - int((age + 1) * 1e9)


_STARTED = _start()
