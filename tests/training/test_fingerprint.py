"""The fingerprint of an array: its formula in whole numbers, and every bit counts."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.training.fingerprint import fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint32", "bool",
                                   "complex64"])
def test_it_notices_every_single_flipped_bit(dtype):
  rng = np.random.default_rng(1)
  raw = np.array(jnp.asarray(rng.normal(size=(2, 3)) > 0 if dtype == "bool" else
                             rng.normal(size=(2, 3)) * 9).astype(dtype))
  base, seen = int(fingerprint(jnp.asarray(raw))), set()
  flips = [(i, bit) for i in range(raw.nbytes) for bit in ([0] if dtype == "bool" else range(8))]
  for index, bit in flips:
    changed = bytearray(raw.tobytes())
    changed[index] ^= 1 << bit
    seen.add(int(fingerprint(jnp.asarray(np.frombuffer(changed, raw.dtype).reshape(2, 3)))))
  assert base not in seen and len(seen) == len(flips)


def test_it_is_its_formula():
  def mix(word):
    word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
    word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
    return word ^ (word >> 16)
  array = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
  words = [int(word) for word in array.view(np.uint32).ravel()]
  expected = sum(mix(word ^ mix(i + 1)) for i, word in enumerate(words))
  assert int(fingerprint(jnp.asarray(array))) == expected % 2**32
