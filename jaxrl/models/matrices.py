"""The parameters of a decoder as matrices: what maps inputs to outputs, whatever its axes."""

from collections.abc import Sequence

import jax
import numpy as np


def names_of(path: Sequence) -> tuple[str, ...]:
  """The names along a path of `jax.tree_util`, such as `("params", "blocks_0", "mlp", "up",
  "kernel")`."""
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def matrix_shape(names: Sequence[str], shape: Sequence[int]) -> tuple[int, int, int] | None:
  """How a parameter is seen as matrices `[layers, inputs, outputs]`; None if it is none.

  Args:
    names: along its path, see `names_of`.
    shape: its own; with `scan_layers` all layers are stacked in the first axis.
  """
  if names[-1] in ("embedding", "unembedding") and len(shape) == 2:
    return 1, *shape
  if names[-1] != "kernel":
    return None
  layers = shape[0] if "blocks" in names else 1
  own = shape[1:] if "blocks" in names else shape
  inputs = 2 if tuple(names[-3:-1]) == ("attention", "output") else 1
  return layers, int(np.prod(own[:inputs])), int(np.prod(own[inputs:]))
