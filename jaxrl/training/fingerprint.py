"""A 32-bit fingerprint of an array's bits, the same however the array is laid out over devices.

Taken before a checkpoint is written and again after it is read, it shows that what came back is
what was saved, whatever happened to the files in between.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt


@jax.jit
def fingerprint(array: jax.Array) -> UInt[Array, ""]:
  """Fingerprint of one array; equal bits give equal fingerprints, one changed element never does.

    fingerprint = sum_i mix(word_i XOR mix(i + 1))  mod 2**32,

  where `mix` is the 32-bit finaliser of MurmurHash3 (a bijection, so a change of a single word
  always changes the sum) and `word_i` the bits of element i. The sum commutes, so that sharding and
  the order of reduction do not matter.

  Args:
    array: any shape, any dtype of whole bytes; may be sharded over devices of several processes, or lie
      in the memory of their hosts.

  Returns:
    A replicated uint32 scalar on the devices of `array`, not waited for.
  """
  if jax.typeof(array).memory_space != jax.memory.Space.Device:
    array = jax.device_put(array, jax.memory.Space.Device)
  words = _words(array)
  index = jnp.zeros(words.shape, jnp.uint32)
  for axis in range(words.ndim):
    stride = math.prod(words.shape[axis + 1:]) % 2**32
    index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
  return jnp.sum(_mix(words ^ _mix(index + 1)), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
  """The bits of every element as uint32; 64-bit types become a trailing axis of two words."""
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  if jnp.issubdtype(array.dtype, jnp.complexfloating):
    return jnp.stack([_words(array.real), _words(array.imag)])
  width = array.dtype.itemsize
  if width in (4, 8):
    return jax.lax.bitcast_convert_type(array, jnp.uint32)
  return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)


def _mix(word: jax.Array) -> jax.Array:
  word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
  word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
  return word ^ (word >> 16)
