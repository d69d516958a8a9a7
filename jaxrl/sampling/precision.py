"""Weights and caches in fewer bits, for sampling only.

What is sampled then comes from a slightly different model than the one that is trained: the log-
probability of a token under both differs, which the trainer logs (`logprob_gap`) and losses with an
importance ratio correct for, as they use the log-probabilities of the sampler.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl.models.cached_attention import KeyValues
from jaxrl.models.matrices import is_of_experts

DTYPES = ("", "float32", "bfloat16", "int8")  # "" is the model's own


def quantise(x: Array, axes: tuple[int, ...]) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
  """Integers from -127 to 127 and what to multiply them with; the error is at most scale / 2.

  Args:
    x: numbers.
    axes: those over which one scale holds. They are left out of the scales.
  """
  x = x.astype(jnp.float32)
  scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True), 1e-30) / 127
  return jnp.round(x / scale).astype(jnp.int8), jnp.squeeze(scale, axes)


@functools.partial(jax.jit, static_argnames="dtype")
def reduced(params, *, dtype: str):
  """Variables of a `Decoder` with its matrices in another precision.

  Args:
    params: of `Decoder`.
    dtype: one of `DTYPES`. With `int8` each output channel of a kernel has a scale of its own;
      embeddings, which are read as rows, become bfloat16.

  Returns:
    `{"params": ...}`, and `"scales"` with `int8`. Norms and biases stay as they are.
  """
  if not dtype:
    return {"params": params}
  scales = {}

  def one(path, x):
    names = [key.key for key in path]
    if names[-1] not in ("kernel", "embedding", "unembedding") or names[0].endswith("_head"):
      return x
    if dtype != "int8":
      return x.astype(dtype)
    if names[-1] != "kernel":
      return x.astype(jnp.bfloat16)
    inputs = 2 if names[-2] == "output" else 1  # heads and their width
    stacked = (names[0] == "blocks") + is_of_experts(names)  # layers, experts in front
    integers, scale = quantise(x, tuple(range(stacked, stacked + inputs)))
    at = scales
    for name in names[:-1]:
      at = at.setdefault(name, {})
    at[names[-1]] = scale
    return integers

  params = jax.tree_util.tree_map_with_path(one, params)
  return {"params": params, "scales": scales} if scales else {"params": params}


def stored(new: KeyValues, dtype: str) -> KeyValues:
  """Keys and values in the precision of the cache, which is one of `DTYPES`."""
  if not dtype:
    return new
  if dtype != "int8":
    return jax.tree.map(lambda x: x.astype(dtype), new)
  (keys, key_scales), (values, value_scales) = (quantise(x, (-1,)) for x in (new.keys, new.values))
  return KeyValues(keys, values, key_scales, value_scales)
