"""The chain: pieces of credit in order, from rewards to one advantage per token."""

from collections.abc import Callable, Sequence
import functools
import inspect

import jax.numpy as jnp
from jaxtyping import AbstractArray, Array, Float

from jaxrl.batch import TokenBatch, to_tokens
from jaxrl.compose import name_of


def baseline(function: Callable) -> Callable:
  """Marks a piece as a baseline; a chain takes one at most."""
  function.is_baseline = True
  return function


def chain(pieces: Sequence[Callable]
          ) -> Callable[[TokenBatch, Float[Array, "sequences"]], Float[Array, "rows length"]]:
  """Composes pieces, first to last, into one function.

  A piece maps `(batch, values)` to values, one per sequence or one per token. When its second
  parameter has a jaxtyping annotation, such as `Float[Array, "sequences"]`, what it is given is
  checked against that.

  Args:
    pieces: as `compose.build` returns them; none leaves the rewards as they are.

  Returns:
    `advantages(batch, rewards)`: values per sequence are spread over their tokens at the end, and
    tokens off the loss mask get 0.

  Raises:
    ValueError: two baselines in the chain; from the returned function: a piece was given values per
      token where it takes them per sequence or the reverse, or returned another shape.
  """
  baselines = [name_of(p) for p in pieces if _is_baseline(p)]
  if len(baselines) > 1:
    raise ValueError(f"advantage lists {len(baselines)} baselines, {' and '.join(baselines)}, but "
                     "a reward is compared with one thing: keep one of them")

  def advantages(batch, rewards):
    values, source = jnp.asarray(rewards), "the rewards"
    _check_output(batch, values, source)
    for index, piece in enumerate(pieces):
      name = f"advantage[{index}] ({name_of(piece)})"
      _check_input(piece, name, values, source)
      values, source = piece(batch, values), name
      _check_output(batch, values, source)
    per_token = values if values.ndim == 2 else to_tokens(batch, values)
    return jnp.where(batch.loss_mask, per_token, 0)

  return advantages


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


def _check_output(batch, values, source):
  shapes = [batch.rewards.shape, batch.tokens.shape]
  if values.shape not in shapes:
    raise ValueError(f"the values from {source} have shape {list(values.shape)}; wanted is one per "
                     f"sequence, {list(shapes[0])}, or one per token, {list(shapes[1])}")
