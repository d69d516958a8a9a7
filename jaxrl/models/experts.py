"""Mixtures of experts: which MLPs a token is sent to, and their sum (arXiv:1701.06538).

No expert has a capacity, so no token is dropped. Tokens are sorted by expert and each expert multiplies
its own (`jax.lax.ragged_dot`), whose number is not known when the program is compiled. Accelerators have
a kernel for that; XLA's CPU backend multiplies all tokens with all experts and hides what is not wanted.
There is no loss that balances the load of experts, as `transformers` has none unless it is asked for one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl import sharding
from jaxrl.models import products


def route(logits: Float[Array, "units length experts"], count: int, *, normalise: bool
          ) -> tuple[Int[Array, "units length count"], Float[Array, "units length count"]]:
  """The experts of each token and their weights, in float32: the largest of `softmax(logits)`.

  Args:
    count: experts per token.
    normalise: divide the weights by their sum.
  """
  weights, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), count)
  return chosen, weights / jnp.sum(weights, axis=-1, keepdims=True) if normalise else weights


def mixture(x: Float[Array, "units length width"], chosen: Int[Array, "units length count"],
            weights: Float[Array, "units length count"], gate: Float[Array, "experts width inner"],
            up: Float[Array, "experts width inner"], down: Float[Array, "experts inner width"], *,
            activation: Callable[[Array], Array]) -> Float[Array, "units length width"]:
  """Sum over the chosen experts e of `weight_e * down_e(activation(gate_e(x)) * up_e(x))`.

  On a mesh every device sorts its own rows, and has a share of the inner width of every expert.
  """
  def on_device(x, chosen, weights, gate, up, down):
    (*_, width), count = x.shape, chosen.shape[-1]
    owners = chosen.reshape(-1)
    order = jnp.argsort(owners)
    sizes = jnp.bincount(owners, length=gate.shape[0]).astype(jnp.int32)

    def sorted_by(index, rows):  # a permutation, whose gradient is one too
      return rows.at[index].get(unique_indices=True)

    def product(rows, kernels):
      return jax.lax.ragged_dot(rows, kernels, sizes)
    rows = sorted_by(order, jnp.broadcast_to(x[..., None, :], (*chosen.shape, width)).reshape(-1, width))
    out = product(products.gated(activation, product(rows, gate), product(rows, up)), down)
    out = sorted_by(jnp.argsort(order), out).reshape(*chosen.shape, width)
    return jnp.sum(out * weights[..., None], axis=-2)[None]  # one share of the sum

  by_row = ("rows", None, None)
  shares = sharding.on_each_device(
      on_device, (by_row, by_row, by_row, (None, None, "mlp"), (None, None, "mlp"), (None, "mlp", None)),
      ("mlp", *by_row))(x, chosen, weights, gate, up, down)
  return jnp.sum(shares, axis=0)
