"""A float32 master of parameters of a smaller type, kept by their optimiser.

A bfloat16 has 8 bits, so a step of less than 1/512 of a weight rounds to nothing, as most of Adam's at a
learning rate of 1e-5 do. With a master the steps add up in float32,

    master <- master + update(gradient, moments, master),      parameters = round(master),

and moments, clipping and transformations are of float32 too. Parameters that are float32 already, such as
adapters, have no copy: they are their own master.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Master(NamedTuple):
  """State of `with_master`.

  Attributes:
    master: float32 copies of the parameters of other types, `optax.MaskedNode` in place of float32 ones.
    inner: state of the optimiser, made of the master.
  """

  master: Any
  inner: Any


def with_master(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """The optimiser of a float32 master of the parameters.

  Its updates are those of the master. `step` takes the parameters from the state, as rounding them is no sum.
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def init(params):
    # Boxes of logical axes stay around what is made of them, so the master is sharded like parameters.
    master = jax.tree.map(lambda p: optax.MaskedNode() if _is_full(p) else jax.tree.map(_full, p), params,
                          is_leaf=_is_box)
    return Master(master, optimizer.init(jax.tree.map(_full, params)))

  def update(gradient, state, params, **extra):
    master = jax.tree.map(lambda p, m: p if _is_full(p) else m, params, state.master)
    updates, inner = optimizer.update(jax.tree.map(_full, gradient), state.inner, master, **extra)
    master = optax.apply_updates(master, updates)
    kept = jax.tree.map(lambda p, m: optax.MaskedNode() if _is_full(p) else m, params, master)
    return updates, Master(kept, inner)
  return optax.GradientTransformationExtraArgs(init, update)


def step(optimizer: optax.GradientTransformation, gradient: Any, opt_state: Any, params: Any, **extra: Any
         ) -> tuple[Any, Any]:
  """Parameters and state of the optimiser after one update.

  Args:
    gradient: float32. An optimiser without a master is given it in the types of the parameters.
    extra: of `optimizer.update`.
  """
  if not isinstance(opt_state, Master):
    gradient = jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, params)
  updates, opt_state = optax.with_extra_args_support(optimizer).update(gradient, opt_state, params, **extra)
  if not isinstance(opt_state, Master):
    return optax.apply_updates(params, updates), opt_state

  def moved(p, u, m):
    return optax.apply_updates(p, u) if _is_full(p) else m.astype(p.dtype)
  return jax.tree.map(moved, params, updates, opt_state.master), opt_state


def split(opt_state: Any) -> tuple[Any, Any]:
  """What else an optimiser's state holds, and the master in it, () if there is none."""
  return (opt_state.inner, opt_state.master) if isinstance(opt_state, Master) else (opt_state, ())


def _full(x):
  return x.astype(jnp.float32)


def _is_full(x):
  return (x.unbox() if _is_box(x) else x).dtype == jnp.float32


def _is_box(x):
  return hasattr(x, "unbox")
