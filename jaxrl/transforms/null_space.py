"""Updates that leave alone the output directions which earlier training has moved."""

from collections.abc import Callable
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from jaxrl.compose import begins
from jaxrl.models.matrices import matrix_shape, names_of
from jaxrl.transforms.start import PhaseStart

HALVINGS = 6  # of the interval in which the widest ratio is looked for


class NullSpace(NamedTuple):
  """State of `project_onto_null_space`, in float32 and by path of parameter.

  Attributes:
    taken: of every matrix `[inputs, outputs]`, in an array like it: orthonormal output directions
      that are left alone, one to a row, then rows of 0.
    limit: largest spectral norm of what the phase adds to it. [layers]
    moved: what the phase has added so far; empty without limits.
  """

  taken: Any
  limit: Any
  moved: Any


def _begin(state: NullSpace, start: PhaseStart, *, ratio, since, clip, metric, tolerance, parameters
           ) -> NullSpace:
  """Decomposes what has changed, and looks for the ratio if a metric shall decide it."""
  before = start.parameters_of(since)
  parts = jax.jit(lambda old, new: _decompose(old, new, parameters))(before, start.params)
  if not max(float(s.max()) for _, s, _ in parts.values()) > 0:
    raise ValueError("project_onto_null_space: no parameter differs from those that training began "
                     f"with (since={since!r}): put the phase after another one, or start from a run "
                     "that has trained")
  if metric:
    replaced = jax.jit(lambda old, new, parts, r: _with_future_use(old, new, parts, r, parameters))

    def measure(share):
      params = start.params if not share else replaced(before, start.params, parts, share)
      found = start.measure(params)
      if metric not in found:
        raise ValueError(f"project_onto_null_space: metric={metric!r} is not measured on validation "
                         f"data; there are {', '.join(sorted(found))}")
      return found[metric]
    ratio = widest(measure, tolerance)

  def taken(name, like):
    _, s, directions = parts[name]
    keep = jnp.arange(s.shape[-1]) < protected(s.shape[-1], ratio)
    rows = jnp.zeros(_shape(name, like.shape), jnp.float32)
    rows = rows.at[:, :s.shape[-1]].set(jnp.where(keep[:, None], directions, 0))
    return rows.reshape(like.shape)
  return state._replace(
      taken={name: taken(name, x) for name, x in state.taken.items()},
      limit={name: _limit(clip, parts[name][1][:, 0]) for name in state.limit})


def _limit(clip, norm):
  """Of a matrix that earlier training did not move, such as a new head, there is none."""
  return jnp.where(norm > 0, clip * norm, jnp.inf)


@begins(_begin)
def project_onto_null_space(*, ratio: float = 0.8, since: str = "", clip: float = 0.0,
                            metric: str = "", tolerance: float = 0.01,
                            parameters: str = "kernel|embedding", on: str = "update"
                            ) -> optax.GradientTransformation:
  """Keeps updates of matrices off the output directions of earlier training (OrthAlign,
  arXiv:2509.24610), with full parameters in place of adapters.

    dW1 = U S V^T: what has changed since, outputs x inputs;   U_c: its first c columns
    c = q - floor(ratio q),  q = min(outputs, inputs)
    dW <- (I - U_c U_c^T) dW,      then scaled so that ||sum of dW||_2 <= clip ||dW1||_2

  The part of a layer's output along U_c is then the same for every input; the output is not. On the
  gradient that holds for plain gradient descent only: Adam rescales single numbers, so 'update',
  after the optimiser, is the default. Parameters that are no matrices stay as they are.

  Args:
    ratio: share of the directions that is free, 0 to 1: the trailing ones.
    since: workdir of the run whose last parameters the change is measured from; "" is what the latest
      training before this phase began with: this run, or in its first phase that of `config.start`.
    clip: limit of the whole phase's change of a matrix, relative to the earlier one; 0 is none. It
      takes the singular values of every matrix in every update.
    metric: validation metric of the phase before (in the first phase: of its own) that decides the
      ratio: the largest one, to 1/64, at which giving the free singular values the mean of the others
      changes the metric by no more than `tolerance`. "" is the fixed `ratio`.
    parameters: pattern of the names of matrices that are trained; others stay as they are.
    on: "update", or "gradient" with `clip=0`.

  State: a copy of the matrices in float32, two with `clip`.

  Raises:
    ValueError: numbers out of range, or a pattern that does not compile.
  """
  del since, metric
  if on == "gradient" and clip:
    raise ValueError(f"project_onto_null_space: clip={clip} bounds what updates add up to, and on='gradient' "
                     "comes before the optimiser makes them: use on='update', or clip=0")
  if not 0 <= ratio <= 1 or clip < 0 or tolerance < 0:
    raise ValueError(f"project_onto_null_space: ratio={ratio} must be 0 to 1, and clip={clip} and "
                     f"tolerance={tolerance} at least 0")
  try:
    re.compile(parameters)
  except re.error as error:
    raise ValueError(f"project_onto_null_space: parameters={parameters!r}: {error}") from error

  def init(params):
    # Boxes of logical axes stay around what is made of them, so the state is sharded like matrices.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    boxed = {".".join(names_of(path)): x for path, x in jax.tree_util.tree_leaves_with_path(
        zeros, is_leaf=_is_box)}
    matrices = {name: x for name, x in boxed.items() if _shape(name, _unboxed(x).shape, parameters)}
    if not matrices:
      raise ValueError(f"project_onto_null_space: parameters={parameters!r} matches no matrix that is trained, so "
                       "nothing would move; of a model with adapters none is")
    layers = {name: _shape(name, _unboxed(x).shape)[0] for name, x in matrices.items()}
    return NullSpace(
        matrices, {name: jnp.zeros(n) for name, n in layers.items()} if clip else {},
        jax.tree.map(jnp.copy, matrices) if clip else {})

  def update(updates, state, params=None):
    del params
    moved = dict(state.moved)

    def one(path, u):
      name = ".".join(names_of(path))
      if name not in state.taken:
        return jnp.zeros_like(u)
      shape = _shape(name, u.shape)
      free = off_rows(u.astype(jnp.float32).reshape(shape), state.taken[name].reshape(shape))
      if name in moved:
        before = moved[name].reshape(shape)
        after = clip_spectral(before + free, state.limit[name])
        moved[name], free = after.reshape(u.shape), after - before
      return free.reshape(u.shape).astype(u.dtype)
    found = jax.tree_util.tree_map_with_path(one, updates)
    return found, state._replace(moved=moved)
  return optax.GradientTransformation(init, update)


def protected(size: int, ratio: float) -> int:
  """How many of `size` directions are left alone: all but the trailing share of `ratio`."""
  return size - int(ratio * size + 1e-9)


def off_rows(update: Float[Array, "layers inputs outputs"], rows: Float[Array, "layers rows outputs"]
             ) -> Float[Array, "layers inputs outputs"]:
  """The update without its part along orthonormal rows, of which those beyond min(inputs, outputs)
  are 0."""
  rows = rows[:, :min(update.shape[1:])]
  exact = jax.lax.Precision.HIGHEST
  for _ in range(2):  # once leaves what rounding has left
    along = jnp.einsum("lio,lro->lir", update, rows, precision=exact)
    update = update - jnp.einsum("lir,lro->lio", along, rows, precision=exact)
  return update


def clip_spectral(change: Float[Array, "layers inputs outputs"], limit: Float[Array, "layers"]
                  ) -> Float[Array, "layers inputs outputs"]:
  """The change, scaled down to a spectral norm of at most `limit`."""
  norm = jnp.linalg.svd(change, compute_uv=False)[:, 0]
  return change * jnp.minimum(1, limit / jnp.maximum(norm, 1e-30))[:, None, None]


def widest(measure: Callable[[float], float], tolerance: float) -> float:
  """The largest share, to 1 / 2^HALVINGS, whose measure is within `tolerance` of that of 0.

  It halves an interval, so the difference should not fall where the share rises.
  """
  exact, low, high = measure(0.0), 0.0, 1.0
  for _ in range(HALVINGS):
    middle = (low + high) / 2
    if abs(measure(middle) - exact) <= tolerance:
      low = middle
    else:
      high = middle
  return low


def _decompose(old, new, parameters):
  """Of every matrix: left factor [layers, inputs, q], singular values [layers, q], output
  directions [layers, q, outputs] of what has changed."""
  parts = {}
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new),
                          strict=True):
    name = ".".join(names_of(path))
    if shape := _shape(name, a.shape, parameters):
      change = (b.astype(jnp.float32) - a.astype(jnp.float32)).reshape(shape)
      parts[name] = jnp.linalg.svd(change, full_matrices=False)
  return parts


def _with_future_use(old, new, parts, ratio, parameters):
  """Parameters whose changes have the mean of the protected singular values in place of free ones."""
  def one(path, a, b):
    name = ".".join(names_of(path))
    if name not in parts:
      return b
    left, s, directions = parts[name]
    size = s.shape[-1]
    taken = jnp.arange(size) < jnp.maximum(size - jnp.floor(ratio * size + 1e-6), 1)
    mean = jnp.sum(jnp.where(taken, s, 0), -1, keepdims=True) / jnp.sum(taken)
    s = jnp.where(taken, s, mean)
    change = jnp.einsum("lir,lr,lro->lio", left, s, directions)
    return (a.astype(jnp.float32) + change.reshape(a.shape)).astype(b.dtype)
  return jax.tree_util.tree_map_with_path(one, old, new)


def _shape(name, shape, parameters=""):
  """`[layers, inputs, outputs]` of a parameter, None if it is no matrix or not one of these."""
  return matrix_shape(name.split("."), shape) if re.search(parameters, name) else None


def _is_box(x):
  return hasattr(x, "unbox")


def _unboxed(x):
  return x.unbox() if _is_box(x) else x
