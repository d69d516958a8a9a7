"""`jax.jit` whose programs the next start of a command need not trace.

JAX's compilation cache keeps what XLA has compiled, but to find it there JAX traces a Python function and
lowers it to StableHLO first: 0.9 of 3.6 s to the first update of `scripts/bench/startup.py`. Inside `kept_in`
the StableHLO is kept too (`jax.export`). It is found by a digest of all that tracing is given: the function
with what it closes over, the shapes and structure of its arguments, settings of libraries, which modules of
others are loaded. It is believed as long as all files are unchanged of the modules that were loaded when it
was made. A function that closes over anything of which no digest is made, such as a piece of one's own, is
traced at every start; so is one that cannot be exported.

Modules are taken to be what their files say: what a person has changed in memory, as in a notebook, is not
seen. So only processes that run one command keep programs, see `keep_traced` of `jaxrl.training.run`.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import functools
import inspect
import operator
import os
import pathlib
import pickle
import sys
import sysconfig
import tempfile
import time
from typing import Any
import zlib

import flax
import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from jaxrl import digests

FORMAT = 2  # of the files
SUFFIX = "-traced"  # of their names
READ_BY_LIBRARIES = ("CUDA", "FLAX", "JAX", "LIBTPU", "NVIDIA", "TF_", "TOKAMAX", "XLA")  # variables
INSTALLED = tuple(path + os.sep for path in {str(pathlib.Path(__file__).parent), *(
    sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))})  # changes no other code
JITTED = type(jax.jit(lambda: None))
_place: pathlib.Path | None = None  # where programs are kept, if they are
_known: tuple[tuple, tuple, dict[str, str]] = (), (), {}  # names, modules and files that were loaded last


@contextlib.contextmanager
def kept_in(directory: pathlib.Path) -> Iterator[None]:
  """Has programs of `jit` kept in a directory, if there is a single device."""
  global _place, _known
  before, _place = _place, directory if jax.device_count() == 1 else None
  _known = (), (), {}
  _state_of.cache_clear()
  try:
    yield
  finally:
    _place = before


def jit(function: Callable, *, static_argnames: tuple[str, ...] = (),
        count: collections.Counter[str] | None = None, **options: Any) -> Callable:
  """`jax.jit` of a function whose programs can be kept.

  Results are never weakly typed, as those of exported programs cannot be. Where programs are kept, the
  function cannot be differentiated or mapped from outside.

  Args:
    function: pure.
    static_argnames: keywords, whose values can be hashed; all other arguments are positional.
    count: counts programs, by the name of their function.
    options: others of `jax.jit`.
  """
  @functools.wraps(getattr(function, "func", function))
  def traced(*args, **static):
    if count is not None:
      count[_name_of(function)] += 1
    kept = _find(function, args, static)
    if kept:
      exported, results = kept
      return results.unflatten(exported.call(*jax.tree.leaves(args)))
    return jax.tree.map(_strong, function(*args, **static))
  traced.__signature__ = inspect.signature(function)  # without what `functools.partial` has given
  return jax.jit(traced, static_argnames=static_argnames, **options)


def eval_shape(function: Callable, *args: Any) -> Any:
  """`jax.eval_shape` of a function, pure and perhaps jitted, whose result can be kept as well.

  With the initializer's shapes and program kept, `second_start` of `scripts/bench/compare.py` took 2.7 s, not 3.0.
  """
  plain = function.__wrapped__ if isinstance(function, JITTED) else function
  leaves, structure = jax.tree.flatten(args)
  described = [(type(x).__name__, np.shape(x), str(getattr(x, "dtype", "")), getattr(x, "weak_type", None))
               for x in leaves]
  path = _path_of(f"shape_of_{_name_of(plain)}", plain, structure, described, {})
  if path is None:
    return jax.eval_shape(function, *args)
  if (found := _read(path)) is None:
    found = jax.eval_shape(function, *args)
    _write(path, lambda: found)
  return found


def _name_of(function):
  return getattr(function, "func", function).__name__


def _is_looked_into():
  """Whether somebody wants to see operations one by one."""
  return jax.config.jax_debug_nans or jax.config.jax_debug_infs or jax.config.jax_disable_jit


def _path_of(name, function, structure, described, static):
  """Where what is traced of a function is kept, None if it is not to be."""
  place = _place  # other threads may be at work when it ends
  if not place or _is_looked_into():
    return None
  try:
    key = digests.digest([_surroundings(), function, static, structure, repr(described)])
  except Exception:  # not only `Undescribed`: closures may hold values of any kind, and be without end
    return None
  return place / f"{name}-{key}{SUFFIX}"


def _find(function, args, static):
  """(program of flat arguments and results, structure of its results), None if it is not to be kept."""
  leaves, structure = jax.tree.flatten(args)
  kinds = [jax.typeof(x) for x in leaves]
  path = _path_of(_name_of(function), function, structure,
                  [(x.shape, str(x.dtype), x.weak_type, str(x.memory_space)) for x in kinds], static)
  if path is None:
    return None
  with contextlib.suppress(Exception):  # of many kinds: there is no file, or one of another version of JAX
    exported, results = _read(path)
    program = None if exported is None else export.deserialize(bytearray(exported))
    return program and (program, jax.tree.structure(results))
  program, results = _export(function, structure, kinds, static)
  _write(path, lambda: (None if program is None else bytes(program.serialize()),
                        results.unflatten(range(results.num_leaves))))
  return program and (program, results)


def _export(function, structure, kinds, static):
  """A program of flat arguments and results, None if there can be none, and the structure of its results."""
  results = []

  def flat(*leaves):
    found, as_returned = jax.tree.flatten(function(*structure.unflatten(leaves), **static))
    results[:] = [as_returned]
    return [_strong(x) for x in found]
  program = jax.jit(flat)
  arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in kinds]
  program.trace(*arguments)  # so that mistakes in the function are raised
  try:
    if any(x.memory_space != jax.memory.Space.Device for x in kinds):
      raise ValueError("exported programs take arrays of the device's own memory")
    return export.export(program)(*arguments), results[0]
  except Exception:  # of many kinds, for what this version of JAX does not export
    return None, results[0]


def _strong(x):
  return jnp.asarray(x, jnp.result_type(x)) if jax.typeof(x).weak_type else x


def _surroundings():
  """What else tracing can depend on, as text: versions, devices, settings, and code that is not ours.

  That which a config loads may change what ours does.
  """
  others = sorted((name, file) for name, file in _loaded().items() if not file.startswith(INSTALLED))
  settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(READ_BY_LIBRARIES)}
  return repr([FORMAT, sys.version, sys.prefix, sys.path, list(sys.flags), os.cpu_count(), jax.__version__,
               jax.devices()[0].device_kind, str(jax.sharding.get_abstract_mesh()),
               {name: str(x) for name, x in sorted(jax.config.values.items())},
               {name: str(getattr(flax.config, name)) for name in dir(flax.config) if name[0] != "_"
                and not callable(getattr(flax.config, name))}, settings, others])


def _loaded():
  """{name: file} of every module that has one. Some have made themselves, and name none that exists."""
  global _known
  loaded = sys.modules.copy()  # one by one they are not safe from what other threads load
  names, modules = tuple(loaded), tuple(loaded.values())
  before, same, found = _known
  if names != before or not all(map(operator.is_, modules, same)):  # it takes 5 ms, three times for every program
    files = {name: getattr(module, "__file__", None) for name, module in loaded.items()}
    found = {name: file for name, file in files.items() if isinstance(file, str) and os.path.isabs(file)}
    _known = names, modules, found
  return found


def _read(path):
  """What `_write` wrote; None if there is nothing, or nothing that holds any more."""
  try:
    files, content = pickle.loads(zlib.decompress(path.read_bytes()))
    loaded = _loaded()
    if any(_state_of(file) != state or loaded.get(name, file) != file
           for name, (file, state) in files.items()):
      return None
    os.utime(path)  # the least recently used go first, see `training.compilation.trim`
    return content
  except Exception:  # of many kinds, for a file of another version, or half of one
    return None


def _write(path, make):
  """Keeps what was made of all files that were loaded, with them; `make` gives it.

  Not if one of them has changed since this process began, which may have loaded it before.
  """
  with contextlib.suppress(Exception):  # a full disk, a class that cannot be pickled, modules that only pretend
    files = {name: (file, _state_of(file)) for name, file in _loaded().items()}
    if any(state is None or max(state[1:]) > _STARTED for _, state in files.values()):
      return
    content = zlib.compress(pickle.dumps((files, make())), 1)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=SUFFIX, delete=False) as file:
      try:
        file.write(content)
        file.flush()
        os.replace(file.name, path)
      except BaseException:
        os.unlink(file.name)
        raise


@functools.cache
def _state_of(file):
  """Size of a file, and when it and its entry in the directory were changed (ns); None if there is none."""
  try:
    found = os.stat(file)
  except OSError:
    return None
  return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _start():
  """When this process began, or shortly before, in ns since 1970."""
  try:
    ticks = int(pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
  except (OSError, AttributeError):  # not on Linux
    age = 60
  return time.time_ns() - int((age + 0.05) * 1e9)  # clocks of processes and files tick every 10 ms or so


_STARTED = _start()
