"""The parameters of a decoder as matrices: what maps inputs to outputs, whatever its axes."""

from collections.abc import Sequence

import jax
import numpy as np


def names_of(path: Sequence) -> tuple[str, ...]:
  """The names along a path of `jax.tree_util`, such as `("params", "blocks_0", "mlp", "up",
  "kernel")`."""
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def matrix_shape(names: Sequence[str], shape: Sequence[int]) -> tuple[int, int, int] | None:
  """How a parameter is seen as matrices `[layers, inputs, outputs]`; None if it is none. Those of
  experts count as layers.

  Args:
    names: along its path, see `names_of`.
    shape: its own; with `scan_layers` all layers are stacked in the first axis.
  """
  if names[-1] in ("embedding", "unembedding") and len(shape) == 2:
    return 1, *shape
  if names[-1] != "kernel":
    return None
  first = ("blocks" in names) + is_of_experts(names)
  layers, own = int(np.prod(shape[:first])), shape[first:]
  inputs = 2 if tuple(names[-3:-1]) == ("attention", "output") else 1
  return layers, int(np.prod(own[:inputs])), int(np.prod(own[inputs:]))


def is_of_experts(names: Sequence[str]) -> bool:
  """Whether a parameter holds the matrices of several experts, one after the other."""
  return "experts" in names and "router" not in names
