"""Digests of Python values, equal from process to process: of functions with what they close over, too."""

from collections.abc import Callable
import dataclasses
import enum
import functools
import hashlib
import struct
import sys
import types
from typing import Any

import jax
import numpy as np

# Functions and classes of other packages are refused: what those have read when they were loaded, or keep
# in globals, is not part of a digest.
HOMES = ("builtins", "collections", "flax", "functools", "jax", "jaxlib", "jaxrl", "ml_dtypes", "numpy",
         "optax")
PLAIN = (type(None), type(...), bool, int, float, complex, str, bytes)


class Undescribed(TypeError):
  """A value holds something that no digest is made of."""


def digest(value: Any) -> str:
  """A text that two values share only if they are built alike from equal parts.

  Of numbers, text, containers, arrays, dataclasses, structures of trees, meshes, shardings, and of functions
  and classes of `HOMES`: by name if a module holds them under one, else functions by their code, defaults and
  closure. Names stand for what the modules say now: their files are not part of it.

  Raises:
    Undescribed: there is anything else in it.
  """
  feed = _Feed()
  feed(value)
  return feed.hash.hexdigest()


class _Feed:
  """Hands values to a hash, each with its kind and its length, so that no two are written alike."""

  def __init__(self):
    self.hash = hashlib.sha256()
    self._met: dict[int, tuple[int, Any]] = {}  # by id: how many before; the value, which keeps its id

  def __call__(self, value: Any) -> None:
    kind = type(value)
    if kind in PLAIN:
      self._write(kind.__name__, struct.pack("<d", value) if kind is float else repr(value).encode())
    elif id(value) in self._met:
      self._write("again", str(self._met[id(value)][0]).encode())
    else:
      self._met[id(value)] = len(self._met), value
      name = _name(value)
      if name:
        self._write("name", name.encode())
      else:
        self._parts(kind, _parts(value))

  def _parts(self, kind, parts):
    self._write("parts", f"{kind.__module__}:{kind.__qualname__} {len(parts)}".encode())
    for part in parts:
      self(part)

  def _write(self, kind, content):
    self.hash.update(f"{kind} {len(content)}\n".encode())
    self.hash.update(content)


def _name(value):
  """`module:name` under which a module of `HOMES` holds the value, "" if none does."""
  module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
  if not isinstance(module, str) or not isinstance(name, str) or not _at_home(module):
    return ""
  if isinstance(value, types.FunctionType) and not _at_home(value.__globals__.get("__name__")):
    return ""  # somebody else's, put in the place of ours
  found = sys.modules.get(module)
  for part in name.split("."):
    found = getattr(found, part, None)
  known = found is value or (isinstance(value, type) and module == "builtins")  # that of None, say
  return f"{module}:{name}" if known else ""


def _at_home(module):
  return isinstance(module, str) and module.split(".")[0] in HOMES


def _parts(value):
  """What the digest of a value is made of."""
  kind = type(value)
  if _at_home(kind.__module__):
    for kinds, parts in _KINDS:
      if isinstance(value, kinds):
        return parts(value)
    if dataclasses.is_dataclass(value):
      return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
  raise Undescribed(f"no digest is made of {kind.__module__}.{kind.__qualname__}")


def _of_function(value):
  # Not its own word for where it is from, which `functools.wraps` gives to other people's functions.
  module = value.__globals__.get("__name__")
  if not _at_home(module) or vars(sys.modules.get(module, object)) is not value.__globals__:
    raise Undescribed(f"no digest is made of functions of {module}")
  return [module, value.__code__, value.__defaults__, value.__kwdefaults__,
          [cell.cell_contents for cell in value.__closure__ or ()], vars(value)]


def _of_code(value):
  return [value.co_qualname, value.co_firstlineno, value.co_code, value.co_consts, value.co_names,
          value.co_varnames, value.co_freevars, value.co_cellvars, value.co_flags, value.co_argcount,
          value.co_posonlyargcount, value.co_kwonlyargcount]


def _of_array(value):
  if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) or value.dtype == object:
    raise Undescribed(f"no digest is made of an array of {value.dtype}")
  array = np.asarray(value)
  return [str(array.dtype), array.shape, getattr(value, "weak_type", False), array.tobytes()]


def _of_structure(value):
  return ["leaf" if value.node_data() is None else list(value.node_data()), *value.children()]


def _of_mesh(value):
  return [value.axis_names, value.devices.shape, [str(kind) for kind in value.axis_types],
          [(device.platform, device.device_kind, device.id) for device in value.devices.flat]]


_KINDS: tuple[tuple[Any, Callable[[Any], list]], ...] = (
    (enum.Enum, lambda x: [x.name]),
    ((tuple, list), list),
    (dict, lambda x: list(x.items())),
    ((set, frozenset), lambda x: sorted(map(digest, x))),
    (types.FunctionType, _of_function),
    (types.MethodType, lambda x: [x.__func__, x.__self__]),
    (types.CodeType, _of_code),
    (functools.partial, lambda x: [x.func, x.args, x.keywords, vars(x)]),
    (np.dtype, lambda x: [str(x)]),
    ((np.ndarray, np.generic, jax.Array), _of_array),
    (type(jax.tree.structure(0)), _of_structure),
    (jax.sharding.Mesh, _of_mesh),
    (jax.NamedSharding, lambda x: [x.mesh, str(x.spec), x.memory_kind]),
)
