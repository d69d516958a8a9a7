"""The chain: pieces of credit in order, from rewards to one advantage per token."""

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import AbstractArray, Array, Float

from jaxrl.batch import TokenBatch, to_tokens
from jaxrl.compose import initial_of, is_whole, name_of, named, signals_of


class Credit(NamedTuple):
  """What a piece returns that has more to say than values.

  Attributes:
    values: one per sequence or one per token.
    signals: more arrays per token for objective terms and later pieces, such as `returns`.
    carried: what the piece remembers for the next batch, if it declared `compose.carries`.
    metrics: scalars to log.
  """

  values: Float[Array, "..."]
  signals: Mapping[str, Float[Array, "rows length"]] = {}
  carried: Any = None
  metrics: Mapping[str, Float[Array, ""]] = {}


def baseline(function: Callable) -> Callable:
  """Marks a piece as a baseline; a chain takes one at most."""
  function.is_baseline = True
  return function


def chain(pieces: Sequence[Callable]
          ) -> Callable[[TokenBatch, Float[Array, "sequences"]], Float[Array, "rows length"]]:
  """The advantages alone of `credit`, for pieces that remember nothing."""
  run = credit(pieces)
  return lambda batch, rewards: run(batch, rewards, {}).values


def credit(pieces: Sequence[Callable], terms: Sequence[Callable] = (),
           hint: Callable[[str], str] = lambda signal: "") -> Callable[..., Credit]:
  """Composes pieces, first to last, into one function.

  A piece maps `(batch, values)` to values, one per sequence or one per token, or to a `Credit`.
  One that declares `compose.carries` is called `(batch, values, carried)`. When the second
  parameter has a jaxtyping annotation, such as `Float[Array, "sequences"]`, what it is given is
  checked against that.

  Args:
    pieces: as `compose.build` returns them; none leaves the rewards as they are.
    terms: of the objective, some of which may want one advantage per sequence.
    hint: what else to say of a signal that is missing.

  Returns:
    `run(batch, rewards, carried) -> Credit`: values per sequence are spread over their tokens at the
    end, and tokens off the loss mask get 0; signals and metrics are those of all pieces; `carried`
    is by name of piece, as `initial_carried` makes it.

  Raises:
    ValueError: two baselines in the chain; from the returned function: a piece was given values per
      token where it takes them per sequence or the reverse, lacks a signal, or returned another
      shape; or a term wants one advantage per sequence, and the chain ends with one per token.
  """
  baselines = [name_of(p) for p in pieces if _is_baseline(p)]
  if len(baselines) > 1:
    raise ValueError(f"advantage lists {len(baselines)} baselines, {' and '.join(baselines)}, but "
                     "a reward is compared with one thing: keep one of them")
  initial_carried(pieces)

  def run(batch, rewards, carried):
    values, source = jnp.asarray(rewards), "the rewards"
    signals, metrics, carried = {}, {}, dict(carried)
    _check_output(batch, values, source)
    for index, piece in enumerate(pieces):
      name = f"config.advantage[{index}] ({name_of(piece)})"
      _check_input(piece, name, values, source)
      _check_signals(piece, name, batch, hint)
      own = (carried[name_of(piece)],) if initial_of(piece) else ()
      with named(name):
        found = piece(batch, values, *own)
      found = found if isinstance(found, Credit) else Credit(found)
      if own:
        carried[name_of(piece)] = _same_shapes(found.carried, own[0], name)
      _check_new(found.signals, signals, name, "signal")
      _check_new(found.metrics, metrics, name, "metric")
      signals, metrics = {**signals, **found.signals}, {**metrics, **found.metrics}
      batch, values, source = batch.with_signals(**found.signals), found.values, name
      _check_output(batch, values, source)
    _check_whole(terms, values, source)
    per_token = values if values.ndim == 2 else to_tokens(batch, values)
    return Credit(jnp.where(batch.loss_mask, per_token, 0), signals, carried, metrics)

  return run


def initial_carried(pieces: Sequence[Callable]) -> dict[str, Any]:
  """What the pieces of a chain remember before the first batch, by name of piece.

  Raises:
    ValueError: a piece that remembers something is there twice.
  """
  carrying = [piece for piece in pieces if initial_of(piece)]
  names = [name_of(piece) for piece in carrying]
  if repeated := [name for name in names if names.count(name) > 1]:
    raise ValueError(f"advantage lists {repeated[0]!r} {len(repeated)} times, but it remembers "
                     "something under its name: keep one of them")
  return {name: initial_of(piece)() for name, piece in zip(names, carrying)}


def _is_baseline(piece):
  while isinstance(piece, functools.partial):
    piece = piece.func
  return getattr(piece, "is_baseline", False)


def _check_input(piece, name, values, source):
  annotation = list(inspect.signature(piece).parameters.values())[1].annotation
  if not (isinstance(annotation, type) and issubclass(annotation, AbstractArray)):
    return
  if not isinstance(values, annotation):
    raise ValueError(f"{name} takes values [{annotation.dim_str}], but those from {source} are "
                     f"{values.dtype}{list(values.shape)}; pieces that work on sequences come "
                     "before pieces that work on tokens")


def _check_whole(terms, values, source):
  for index, term in enumerate(terms):
    if values.ndim == 2 and is_whole(term):
      raise ValueError(
          f"config.objective[{index}] ({name_of(term)}) weighs whole sequences and takes one "
          f"advantage for each, but {source} gives one per token: use level='token' or "
          "'sequence_token' of clipped_surrogate, or pieces of credit that work on sequences")


def _check_signals(piece, name, batch, hint):
  for signal in signals_of(piece):
    if signal not in batch.signals:
      raise ValueError(f"{name} needs the signal {signal!r}; the batch has "
                       f"{', '.join(batch.signals) or 'none'}. What a model says is computed when "
                       "the piece declares it with compose.needs; other signals come from episodes "
                       f"(Trajectory.signals) or from pieces that are listed before{hint(signal)}")


def _check_new(found, known, name, kind):
  for key in found:
    if key in known:
      raise ValueError(f"{name} gives the {kind} {key!r}, and so does a piece before it: keep one")


def _same_shapes(carried, before, name):
  shapes = [jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), c) for c in (carried, before)]
  if shapes[0] != shapes[1]:
    raise ValueError(f"{name} began with {shapes[1]} in its memory and returned {shapes[0]}: return "
                     "Credit(values, carried=...) with the same structure, shapes and types")
  return carried


def _check_output(batch, values, source):
  shapes = [batch.rewards.shape, batch.tokens.shape]
  if values.shape not in shapes:
    raise ValueError(f"the values from {source} have shape {list(values.shape)}; wanted is one per "
                     f"sequence, {list(shapes[0])}, or one per token, {list(shapes[1])}")
