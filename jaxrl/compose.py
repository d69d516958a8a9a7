"""`{name, kwargs}` -> function: how a config names a piece.

A name is looked up in one package (`jaxrl.advantages`) or, written `package.module:function`,
anywhere on the import path, so that a new piece needs no edit of this package.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import difflib
import functools
import importlib
import inspect
import numbers
from types import ModuleType
from types import UnionType
import typing
from typing import Any

from jaxrl import schedule

LISTED = 40  # valid names in an error message at most


def needs(*signals: str | Callable[..., Sequence[str]]) -> Callable[[Callable], Callable]:
  """Declares the signals (`entropy`, `reference_logprobs`, ...) that a piece reads.

  Args:
    signals: names as in `models.outputs.MODEL_SIGNALS`. In an objective term a plain name is of the
      policy as it is being updated, `old_NAME` of the policy that the batch began with, `reference_NAME`
      of the frozen reference, and `MODEL_NAME` of a model of `config.frozen`. In a credit chain the
      policy is always that which the batch began with. Where names depend on the piece's keywords, a
      function of those:
      `needs(lambda estimator: ("entropy",) if estimator == "full" else ())`.
  """
  def mark(function):
    function.signals = signals
    return function
  return mark


def takes_whole(condition: Callable[..., bool] = lambda: True) -> Callable[[Callable], Callable]:
  """Declares that a term is defined for one advantage per sequence only.

  Args:
    condition: a function of those of the term's keywords that it depends on.
  """
  def mark(function):
    function.whole = condition
    return function
  return mark


def by_sequence(function: Callable) -> Callable:
  """Declares that the diagnostics of a term are of sequences, whatever their lengths.

  They are averaged over the sequences of the batch, others over its loss tokens. Such terms compare
  sequences, so the rollouts of a group are packed into one row.
  """
  function.by_sequence = True
  return function


def of_pairs(function: Callable) -> Callable:
  """Declares `by_sequence`, and that a group of any other size than two has no loss."""
  function.of_pairs = True
  return by_sequence(function)


def is_of_pairs(piece: Callable) -> bool:
  """Whether a term, bare or built, declared `of_pairs`."""
  return getattr(_bare(piece), "of_pairs", False)


def is_by_sequence(piece: Callable) -> bool:
  """Whether a term, bare or built, declared `by_sequence`."""
  return getattr(_bare(piece), "by_sequence", False)


def is_whole(piece: Callable) -> bool:
  """Whether a term, bare or built, takes one advantage per sequence only, see `takes_whole`."""
  condition = getattr(_bare(piece), "whole", None)
  return condition is not None and _with_keywords(condition, piece)


def ranges(function: Callable[..., Mapping[str, tuple[float, float]]]) -> Callable[[Callable], Callable]:
  """Declares which numbers a term can do with, so that rows with others are refused where they are read.

  Args:
    function: of those keywords of the term that it asks for: least and greatest by column.
  """
  def mark(term):
    term.ranges = function
    return term
  return mark


def ranges_of(pieces: Sequence[Callable]) -> dict[str, tuple[float, float]]:
  """What all of some terms, bare or built, can do with, by column; see `ranges`."""
  found: dict[str, tuple[float, float]] = {}
  for piece in pieces:
    if (function := getattr(_bare(piece), "ranges", None)) is None:
      continue
    for name, (low, high) in _with_keywords(function, piece).items():
      least, greatest = found.get(name, (low, high))
      found[name] = max(least, low), min(greatest, high)
  return found


def orders(function: Callable[..., tuple[str, int]]) -> Callable[[Callable], Callable]:
  """Declares by which column a term orders the answers to a question, if not by `preference`.

  Args:
    function: of those keywords of the term that it asks for: the column, and 1 where more of it is
      better or -1 where less is.
  """
  def mark(term):
    term.orders = function
    return term
  return mark


def order_of(pieces: Sequence[Callable]) -> tuple[str, int] | None:
  """What the first of some terms, bare or built, declared with `orders`; None if none did."""
  declared = [piece for piece in pieces if hasattr(_bare(piece), "orders")]
  return _with_keywords(_bare(declared[0]).orders, declared[0]) if declared else None


def carries(initial: Callable[..., Any]) -> Callable[[Callable], Callable]:
  """Declares that a piece remembers something from batch to batch, as part of every checkpoint.

  Args:
    initial: makes what it begins with, a pytree of arrays whose shapes never change, from those
      keywords of the piece that it asks for.
  """
  def mark(function):
    function.initial = initial
    return function
  return mark


def prepares(function: Callable) -> Callable[[Callable], Callable]:
  """Declares what an objective term reads that depends on all sequences of a batch.

  Args:
    function: called once per batch, `function(batch, *, ...)` with those keywords of the term that it
      asks for; the batch has the signals that the term declared. It returns signals per token by
      name. If the term declared `carries`, it is called `function(batch, memory, *, ...)` and
      returns `(signals, memory)`.
  """
  def mark(term):
    term.prepare = function
    return term
  return mark


def prepared(piece: Callable, batch: Any, memory: Any) -> tuple[dict[str, Any], Any]:
  """The signals that a built term wants of a whole batch, and its memory afterwards."""
  prepare = getattr(_bare(piece), "prepare", None)
  if prepare is None:
    return {}, memory
  if initial_of(piece) is None:
    return _with_keywords(functools.partial(prepare, batch), piece), memory
  return _with_keywords(functools.partial(prepare, batch, memory), piece)


def is_prepared(piece: Callable) -> bool:
  """Whether a term, bare or built, declared `prepares`."""
  return hasattr(_bare(piece), "prepare")


def begins(function: Callable) -> Callable[[Callable], Callable]:
  """Declares what a transformation of gradients looks up before the first update of a phase.

  Args:
    function: called once, on the host, `function(state, start, *, ...)` with those keywords of the
      piece that it asks for, with the piece's own state and a `transforms.start.PhaseStart`. It returns
      the state to begin with, whose shapes are those of the first.
  """
  def mark(piece):
    piece.begin = function
    return piece
  return mark


def begun(piece: Callable, state: Any, start: Any) -> Any:
  """The state that a built transformation begins with; as it is, for one that declared nothing."""
  begin = getattr(_bare(piece), "begin", None)
  return state if begin is None else _with_keywords(functools.partial(begin, state, start), piece)


def initial_of(piece: Callable) -> Callable[[], Any] | None:
  """What makes the first memory of a piece, None for one without."""
  initial = getattr(_bare(piece), "initial", None)
  return initial and functools.partial(_with_keywords, initial, piece)


def signals_of(piece: Callable) -> tuple[str, ...]:
  """The signals that a piece, bare or built, declared with `needs`."""
  names = []
  for signal in getattr(_bare(piece), "signals", ()):
    names += [signal] if isinstance(signal, str) else _with_keywords(signal, piece)
  return tuple(names)


def name_of(piece: Callable) -> str:
  """The name of a piece, bare or built."""
  return _bare(piece).__name__


def labels_of(pieces: Sequence[Callable]) -> list[str]:
  """A label for each piece of a list: its name, with `_2`, `_3`, ... for its second and third use."""
  names = [name_of(piece) for piece in pieces]
  uses = [names[:i].count(name) + 1 for i, name in enumerate(names)]
  return [name if n == 1 else f"{name}_{n}" for name, n in zip(names, uses)]


def nearest(name: str, valid, *, all_of_them: bool = False) -> str:
  """`; did you mean X?` or the list of what is valid, for the end of an error message; both on demand."""
  valid = sorted(map(str, valid))
  close = difflib.get_close_matches(name, valid, n=1)
  guess = f"; did you mean {close[0]!r}?" if close else ";"
  if close and not all_of_them:
    return guess
  shown = valid if all_of_them else valid[:LISTED]
  more = f" and {len(valid) - len(shown)} more" if len(valid) > len(shown) else ""
  return f"{guess} valid are {', '.join(shown) or 'none'}{more}"


def pieces(module: ModuleType, kind: Callable[[Callable], bool] = callable) -> dict[str, Callable]:
  """The public functions of a package, by name, that are of a kind."""
  return {k: v for k, v in vars(module).items()
          if callable(v) and not k.startswith("_")
          and getattr(v, "__module__", "").startswith(module.__name__) and kind(v)}


def build(spec: str | Mapping[str, Any], module: ModuleType, *, where: str = "config",
          given: Mapping[str, Any] | None = None, kind: Callable[[Callable], bool] = callable) -> Callable:
  """Looks a piece up and binds the keyword arguments of its spec.

  Args:
    spec: `dict(name=..., **kwargs)`, or the name alone.
    module: package that plain names are looked up in.
    where: path of the spec in the config, for error messages.
    given: more keyword arguments, for a function that takes them and a spec that does not set them.
    kind: which functions of the package plain names may mean.

  Returns:
    `functools.partial(function, **kwargs)`; positional arguments stay open.

  Raises:
    ValueError: unknown name, with all valid ones, unknown or missing keyword argument, or something
      else where there has to be a number.
  """
  spec = {"name": spec} if isinstance(spec, str) else dict(spec)
  name = spec.pop("name", None)
  if not isinstance(name, str):
    raise ValueError(f"{where} needs a name: dict(name=..., ...), got {spec}")
  function = _find(name, module, where, kind)
  parameters = inspect.signature(function).parameters.values()
  keywords = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
  spec = {**{p.name: given[p.name] for p in keywords if p.name in (given or ())}, **spec}
  for key in spec:
    if key not in (names := [p.name for p in keywords]):
      raise ValueError(f"{where}: {name} has no argument {key!r}{nearest(key, names)}")
  missing = [p.name for p in keywords if p.default is p.empty and p.name not in spec]
  if missing:
    raise ValueError(f"{where}: {name} needs {', '.join(missing)}; "
                     f"write dict(name={name!r}, {missing[0]}=...)")
  built = {key: schedule.read(value, f"{where}.{key}") for key, value in spec.items()}
  for p in keywords:
    if p.name in built and not _is_what_it_takes(p.annotation, built[p.name]):
      raise ValueError(f"{where}.{p.name}={built[p.name]!r}, but {name} takes a number there")
  return functools.partial(function, **built)


def _is_what_it_takes(annotation, value):
  """Whether a value is a number, or a schedule of one, if the annotation says number (or None)."""
  union = isinstance(annotation, UnionType)
  kinds = typing.get_args(annotation) if union else (annotation,)
  of_numbers = all(kind in (int, float, type(None)) for kind in kinds)
  if not of_numbers or (value is None and type(None) in kinds):
    return True
  number = isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value
  return number or isinstance(value, schedule.Schedule)


def at(piece: Callable, step: Any) -> Callable:
  """A built piece with its scheduled numbers as they are at an update."""
  if not isinstance(piece, functools.partial):
    return piece
  return functools.partial(piece.func, *piece.args, **{
      key: value(step) if isinstance(value, schedule.Schedule) else value
      for key, value in piece.keywords.items()})


@contextlib.contextmanager
def named(where: str):
  """Says in errors of what is run inside where in the config it stands.

  Raises:
    ValueError: raised inside, with `where` in front.
  """
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def supplies(*signals: str, columns: Sequence[str] = ()) -> Callable[[Callable], Callable]:
  """Declares what the trajectories of an episode or an edit hold beside what all of them do.

  Args:
    signals: keys of `Trajectory.signals`.
    columns: keys of `Trajectory.columns`.
  """
  def mark(function):
    function.supplied = (signals, tuple(columns))
    return function
  return mark


def supplied_by(piece: Callable) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The signals and columns that a piece, bare or built, declared with `supplies`."""
  return getattr(_bare(piece), "supplied", ((), ()))


def _bare(piece):
  while isinstance(piece, functools.partial):
    piece = piece.func
  return piece


def _with_keywords(function, piece):
  """Calls a function with those keywords of a piece, set or default, that it asks for."""
  keywords = {name: p.default for name, p in inspect.signature(piece).parameters.items()}
  return function(**{name: keywords[name] for name in inspect.signature(function).parameters})


def _find(name, module, where, kind):
  if ":" in name:
    path, attribute = name.split(":", 1)
    try:
      home = importlib.import_module(path)
      function = getattr(home, attribute)
    except ModuleNotFoundError as error:
      raise ValueError(f"{where}: cannot import {path!r} of {name!r} ({error}); the directory that "
                       "jaxrl is started in is on the import path") from error
    except AttributeError as error:
      raise ValueError(f"{where}: module {path!r} has no {attribute!r}"
                       f"{nearest(attribute, pieces(home), all_of_them=True)}") from error
    if not callable(function):
      raise ValueError(f"{where}: {name!r} is not a function but a {type(function).__name__}")
    return function
  valid = pieces(module, kind)
  if name not in valid:
    raise ValueError(f"{where}: {module.__name__} has no {name!r}{nearest(name, valid, all_of_them=True)}; a "
                     "function of your own is named 'module:function'")
  return valid[name]
