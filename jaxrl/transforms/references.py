"""Projections off the gradients of other losses, which then stay as they are to first order."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import optax

from jaxrl.compose import begins, nearest
from jaxrl.transforms.start import PhaseStart

VARIANTS = ("orthogonal", "threshold", "plane")
TINY = 1e-5  # share of a gradient's norm below which what is left of it is rounding
ROUNDING = 1e-6  # of the largest squared singular value: no direction of its own in float32


class ReferenceGradients(NamedTuple):
  """State of `project_out_references`.

  Attributes:
    count: updates so far.
    batches: of every reference, those whose gradients are taken.
    basis: orthonormal directions, each a tree like the parameters; 0 where there are fewer.
  """

  count: Int[Array, ""]
  batches: tuple[tuple[Any, ...], ...]
  basis: tuple[Any, ...]


def _fill(state: ReferenceGradients, start: PhaseStart, *, references) -> ReferenceGradients:
  """Puts the reference data into the state."""
  del start
  return state._replace(batches=tuple(tuple(r.batches) for r in references))


@begins(_fill)
def project_out_references(*, references: Sequence[Any], every: int = 30, rank: int = 0,
                           variant: str = "orthogonal", scale: float = 1.0, per_tensor: bool = True,
                           on: str = "gradient") -> optax.GradientTransformationExtraArgs:
  """Removes from the gradient what would change reference losses to first order (OGPSA,
  arXiv:2602.07892).

    u_i = gradient of the loss of reference batch i at the parameters of every `every`-th update
    e_1, ..., e_k: an orthonormal basis of u_1, ..., u_n, for each tensor
    orthogonal  g - sum over j of <g, e_j> e_j
    threshold   the same over those j with <g, e_j> < 0; `scale` g where there is none
    plane       sum over j of <g, e_j> e_j, what the others remove: a negative control

  A step of plain gradient descent then changes the reference losses by O(rate^2). Adam rescales
  single numbers, which turns the step back towards e_j; `on="update"` projects after it.

  Args:
    references: in a config, mappings with what differs from the phase: `data` (fields of
      `config.data`), `kind` (sft, preference or reward), `objective`, `aggregation`, `examples` (the
      first so many of the train split, cut into `parts` batches, whose gradients are taken one by one).
    every: updates between new bases; 0 keeps the first for the whole phase.
    rank: k, directions kept: those with the most of the squared norms of all u_i (an SVD); 0 keeps
      all, by Gram-Schmidt.
    variant: one of `VARIANTS`.
    scale: of the gradient where "threshold" projects nothing.
    per_tensor: inner products are of single tensors; False takes all parameters as one vector.
    on: "gradient" or "update".

  State: k copies of the parameters in float32, and the reference data.

  Raises:
    ValueError: an unknown variant, or numbers out of range.
  """
  del on
  count = sum(len(r.batches) for r in references)
  if variant not in VARIANTS:
    raise ValueError(f"project_out_references: variant={variant!r}{nearest(variant, VARIANTS)}")
  if not count:
    raise ValueError("project_out_references: references is empty; name at least one, such as "
                     "dict(data=dict(train='task:addition'), objective=[dict(name='cross_entropy')])")
  if not 0 <= rank <= count or every < 0:
    raise ValueError(f"project_out_references: rank={rank} must be 0 to {count}, the number of "
                     f"reference batches, and every={every} at least 0")

  def init(params):
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    batches = tuple(tuple(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
                          for batch in r.batches) for r in references)
    return ReferenceGradients(jnp.zeros((), jnp.int32), batches,
                              tuple(jax.tree.map(jnp.copy, zeros) for _ in range(rank or count)))

  def update(updates, state, params=None, *, gradient_of, **_):
    del params

    def renewed():
      gradients = [gradient_of(r, batch) for r, batches in zip(references, state.batches, strict=True)
                   for batch in batches]
      return tuple(orthonormal(gradients, rank, per_tensor))
    due = state.count % every == 0 if every else state.count == 0
    basis = jax.lax.cond(due, renewed, lambda: state.basis)
    found = project(updates, basis, variant=variant, scale=scale, per_tensor=per_tensor)
    return found, state._replace(count=state.count + 1, basis=basis)
  return optax.GradientTransformationExtraArgs(init, update)


def project(updates: Any, basis: Sequence[Any], *, variant: str = "orthogonal", scale: float = 1.0,
            per_tensor: bool = True) -> Any:
  """The part of a tree off an orthonormal basis, or what `variant` makes of it; see
  `project_out_references`. Types stay, sums are in float32."""
  left = given = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
  any_removed = None
  for direction in basis:
    along = _inner(left, direction, per_tensor)
    if variant == "threshold":
      along = jax.tree.map(lambda a: jnp.minimum(a, 0), along)
      removed = jax.tree.map(lambda a: a < 0, along)
      any_removed = removed if any_removed is None else jax.tree.map(jnp.logical_or, any_removed,
                                                                     removed)
    left = _subtract(left, along, direction)
  if variant == "plane":
    left = jax.tree.map(jnp.subtract, given, left)
  elif variant == "threshold":
    left = jax.tree.map(lambda x, removed: jnp.where(removed, x, scale * x), left, any_removed)
  return jax.tree.map(lambda x, g: x.astype(g.dtype), left, updates)


def orthonormal(vectors: Sequence[Any], rank: int = 0, per_tensor: bool = True) -> list[Any]:
  """An orthonormal basis of trees, in float32.

  Args:
    vectors: trees of one structure.
    rank: directions, those of the largest singular values of all vectors side by side; 0 is one
      for each vector, by Gram-Schmidt in their order.
    per_tensor: of every tensor by itself; False takes a tree as one vector.

  Returns:
    As many trees. A direction that the ones before it have no part outside of, or that is not
    finite, is 0.
  """
  vectors = [jax.tree.map(lambda x: x.astype(jnp.float32), v) for v in vectors]
  if rank and rank < len(vectors):
    vectors = _leading(vectors, rank, per_tensor)
  basis: list[Any] = []
  for vector in vectors:
    before = _inner(vector, vector, per_tensor)
    for _ in range(2):  # once leaves what rounding has left
      for direction in basis:
        vector = _subtract(vector, _inner(vector, direction, per_tensor), direction)
    after = _inner(vector, vector, per_tensor)

    def unit(x, squared, whole):
      keep = (squared > TINY ** 2 * whole) & jnp.isfinite(squared)
      return jnp.where(keep, x / jnp.sqrt(jnp.where(keep, squared, 1)), 0)
    basis.append(jax.tree.map(unit, vector, after, before))
  return basis


def _leading(vectors, rank, per_tensor):
  """Combinations of vectors along their largest singular directions, by their inner products."""
  leaves, structure = jax.tree.flatten(vectors[0])
  columns = list(zip(*[jax.tree.leaves(v) for v in vectors], strict=True))  # of each tensor
  grams = [jnp.stack([jnp.stack([jnp.sum(a * b) for b in column]) for a in column])
           for column in columns]
  if not per_tensor:
    grams = [sum(grams)] * len(leaves)

  def mix_of(gram):  # [vectors, directions], falling; 0 where float32 has rounding left only
    values, vectors = jnp.linalg.eigh(gram)
    return jnp.where(values > ROUNDING * values[-1], vectors, 0)[:, ::-1]
  mixes = [mix_of(gram) for gram in grams]
  return [jax.tree.unflatten(structure, [sum(mix[i, j] * x for i, x in enumerate(column))
                                         for mix, column in zip(mixes, columns)])
          for j in range(rank)]


def _inner(a, b, per_tensor):
  """Inner products of two trees, at every tensor: its own, or that of all."""
  each = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
  if per_tensor:
    return each
  total = sum(jax.tree.leaves(each))
  return jax.tree.map(lambda _: total, each)


def _subtract(a, along, direction):
  return jax.tree.map(lambda x, c, e: x - c * e, a, along, direction)
