"""`{name, kwargs}` -> function: how a config names a piece.

A name is looked up in one package (`jaxrl.advantages`) or, written `package.module:function`,
anywhere on the import path, so that a new piece needs no edit of this package.
"""

from collections.abc import Callable, Mapping
import difflib
import functools
import importlib
import inspect
from types import ModuleType
from typing import Any

LISTED = 40  # valid names in an error message at most


def needs(*signals: str) -> Callable[[Callable], Callable]:
  """Declares the signals (`entropy`, `reference_logprobs`, ...) that a piece reads."""
  def mark(function):
    function.signals = signals
    return function
  return mark


def signals_of(piece: Callable) -> tuple[str, ...]:
  """The signals that a piece, bare or built, declared with `needs`."""
  while isinstance(piece, functools.partial):
    piece = piece.func
  return getattr(piece, "signals", ())


def name_of(piece: Callable) -> str:
  """The name of a piece, bare or built."""
  while isinstance(piece, functools.partial):
    piece = piece.func
  return piece.__name__


def nearest(name: str, valid) -> str:
  """`; did you mean X?` or the list of what is valid, for the end of an error message."""
  valid = sorted(map(str, valid))
  close = difflib.get_close_matches(name, valid, n=1)
  if close:
    return f"; did you mean {close[0]!r}?"
  more = f" and {len(valid) - LISTED} more" if len(valid) > LISTED else ""
  return f"; valid are {', '.join(valid[:LISTED]) or 'none'}{more}"


def pieces(module: ModuleType) -> dict[str, Callable]:
  """The public functions of a package, by name."""
  return {k: v for k, v in vars(module).items()
          if callable(v) and not k.startswith("_")
          and getattr(v, "__module__", "").startswith(module.__name__)}


def build(spec: str | Mapping[str, Any], module: ModuleType, *, where: str = "config") -> Callable:
  """Looks a piece up and binds the keyword arguments of its spec.

  Args:
    spec: `dict(name=..., **kwargs)`, or the name alone.
    module: package that plain names are looked up in.
    where: path of the spec in the config, for error messages.

  Returns:
    `functools.partial(function, **kwargs)`; positional arguments stay open.

  Raises:
    ValueError: unknown name, unknown or missing keyword argument, with the nearest valid name.
  """
  spec = {"name": spec} if isinstance(spec, str) else dict(spec)
  name = spec.pop("name", None)
  if not isinstance(name, str):
    raise ValueError(f"{where} needs a name: dict(name=..., ...), got {spec}")
  function = _find(name, module, where)
  parameters = inspect.signature(function).parameters.values()
  keywords = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
  for key in spec:
    if key not in (names := [p.name for p in keywords]):
      raise ValueError(f"{where}: {name} has no argument {key!r}{nearest(key, names)}")
  missing = [p.name for p in keywords if p.default is p.empty and p.name not in spec]
  if missing:
    raise ValueError(f"{where}: {name} needs {', '.join(missing)}; "
                     f"write dict(name={name!r}, {missing[0]}=...)")
  return functools.partial(function, **spec)


def _find(name, module, where):
  if ":" in name:
    path, attribute = name.split(":", 1)
    try:
      function = getattr(importlib.import_module(path), attribute)
    except ModuleNotFoundError as error:
      raise ValueError(f"{where}: cannot import {path!r} of {name!r} ({error}); the directory that "
                       "jaxrl is started in is on the import path") from error
    except AttributeError as error:
      raise ValueError(f"{where}: module {path!r} has no {attribute!r}") from error
    if not callable(function):
      raise ValueError(f"{where}: {name!r} is not a function but a {type(function).__name__}")
    return function
  valid = pieces(module)
  if name not in valid:
    raise ValueError(f"{where}: {module.__name__} has no {name!r}{nearest(name, valid)}; a "
                     "function of your own is named 'module:function'")
  return valid[name]
