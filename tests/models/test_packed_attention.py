"""The fused kernel (here Tokamax's own fallback for CPUs) against the one that writes scores."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import sharding
from jaxrl.models import DecoderConfig
from jaxrl.models import packed_attention
from jaxrl.models.packed_attention import PackedRows

UNITS, KV, GROUP, WIDTH = 3, 2, 2, 8


def make(rng, trunk, rows, length):
  """Queries, keys, values and units whose rows hold ragged segments and padding; one is empty."""
  ids = np.zeros((UNITS, rows, length), np.int32)
  positions = np.zeros_like(ids)
  trunks = rng.integers(1, trunk + 1, UNITS) if trunk else np.zeros(UNITS, int)
  for unit, row in np.ndindex(UNITS, rows):
    cuts = np.sort(rng.choice(np.arange(1, length), 2, replace=False))
    for segment, (start, end) in enumerate(zip([0, cuts[0]], cuts)):
      ids[unit, row, start:end] = segment + 1
      positions[unit, row, start:end] = trunks[unit] + np.arange(end - start)
  ids[-1] = positions[-1] = 0
  trunk_ids = np.arange(trunk) < trunks[:, None]
  positions = np.concatenate([np.tile(np.arange(trunk), (UNITS, 1)), positions.reshape(UNITS, -1)], 1)
  ids = np.concatenate([trunk_ids, ids.reshape(UNITS, -1)], 1)
  packed = PackedRows(jnp.int32(positions), jnp.int32(ids), trunk, rows)
  size = trunk + rows * length
  q = rng.normal(size=(UNITS, size, KV, GROUP, WIDTH)).astype(np.float32)
  k, v = (rng.normal(size=(UNITS, size, KV, WIDTH)).astype(np.float32) for _ in range(2))
  return (q, k, v), packed


@pytest.mark.parametrize("trunk, rows, length", [(0, 1, 24), (0, 2, 17), (9, 3, 16), (5, 1, 33)])
@pytest.mark.parametrize("window, cap", [(None, 0.0), (4, 0.0), (None, 2.0)])
def test_fused_equals_xla_in_values_and_gradients(trunk, rows, length, window, cap):
  pytest.importorskip("tokamax")
  arrays, packed = make(np.random.default_rng(trunk + length), trunk, rows, length)
  cotangent = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)
  cotangent *= np.asarray(packed.segment_ids != 0)[:, :, None, None, None]
  window = None if window is None else jnp.int32(window)

  def results(kernel):
    def attend(*arrays):
      return packed_attention.attend(*arrays, packed, window=window, soft_cap=cap, kernel=kernel)
    out, pull = jax.vjp(attend, *arrays)
    seen = np.asarray(packed.segment_ids != 0)
    return (np.asarray(out)[seen], *pull(cotangent))
  for fused, plain in zip(results("fused"), results("xla"), strict=True):
    np.testing.assert_allclose(fused, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length, longest", [(300, 33), (300, 64), (257, 65), (200, 199), (400, 1)])
@pytest.mark.parametrize("falling", [False, True])
def test_a_limit_of_segments_changes_the_work_and_nothing_else(length, longest, falling):
  """Rows that are full of segments up to the limit, some of just that length, in any place or in order."""
  rng = np.random.default_rng(length + longest)
  ids, positions = (np.zeros((UNITS, length), np.int32) for _ in range(2))
  for unit in range(UNITS):
    start, segment, size = 0 if falling else int(rng.integers(0, 7)), 0, longest
    while start < length:
      segment += 1
      if falling:
        size = int(rng.integers(max(1, size - 9), size + 1)) if start else size
      else:
        size = longest if rng.random() < 0.5 else int(rng.integers(1, longest + 1))
      ids[unit, start:start + size] = segment if falling or rng.random() < 0.9 else 0
      positions[unit, start:start + size] = np.arange(len(ids[unit, start:start + size]))
      start += size
  q = rng.normal(size=(UNITS, length, KV, GROUP, WIDTH)).astype(np.float32)
  k, v = (rng.normal(size=(UNITS, length, KV, WIDTH)).astype(np.float32) for _ in range(2))
  seen = jnp.asarray(ids != 0)[:, :, None, None, None]

  def loss(longest, *arrays):
    packed = PackedRows(jnp.asarray(positions), jnp.asarray(ids), longest=longest, falling=falling)
    out = packed_attention.attend(*arrays, packed)
    return jnp.sum(jnp.where(seen, out, 0) ** 2), out
  results = [jax.jit(jax.value_and_grad(lambda *a, n=n: loss(n, *a), argnums=(0, 1, 2), has_aux=True)).lower(
      q, k, v).compile() for n in (0, longest)]
  (_, everything), whole = results[0](q, k, v)
  (_, limited), parts = results[1](q, k, v)
  np.testing.assert_allclose(np.where(seen, limited, 0), np.where(seen, everything, 0), rtol=1e-5, atol=1e-6)
  for a, b in zip(parts, whole):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
  flops = [result.cost_analysis()["flops"] for result in results]
  assert flops[1] < 0.75 * flops[0] if longest < length / 4 else flops[1] <= flops[0]


def rows_of_falling_segments(length, longest):
  """Every way to fill a row with segments of at most `longest` tokens that become no longer."""
  if not length:
    yield []
  for first in range(min(length, longest), 0, -1):
    for others in rows_of_falling_segments(length - first, first):
      yield [first, *others]


@pytest.mark.parametrize("longest", range(1, 7))
def test_the_first_key_is_the_earliest_that_any_row_has(longest):
  length = 18
  first = np.full(length, length)
  for sizes in rows_of_falling_segments(length, longest):
    starts = np.cumsum([0, *sizes[:-1]])
    first = np.minimum(first, np.repeat(starts, sizes))
  whole = length - longest + 1  # what follows may be cut off
  found = [packed_attention._first_key(token, longest, True) for token in range(length)]
  np.testing.assert_array_equal(found[:whole], first[:whole])
  assert np.all(np.array(found) <= first)
  assert [packed_attention._first_key(token, longest, False) for token in range(length)] == [
      max(0, token + 1 - longest) for token in range(length)]


def test_devices_of_a_mesh_share_the_work_of_the_fused_kernel():
  pytest.importorskip("tokamax")
  arrays, packed = make(np.random.default_rng(3), 4, 2, 8)
  # Four units, as two devices of `data` and two of `fsdp` split them.
  arrays = [np.concatenate([x, x[:1]]) for x in arrays]
  packed = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), packed)

  def loss(kernel, q, k, v):
    out = packed_attention.attend(q, k, v, packed, kernel=kernel)
    return jnp.sum(jnp.where((packed.segment_ids != 0)[:, :, None, None, None], out, 0) ** 2)
  expected = jax.grad(lambda *a: loss("xla", *a), argnums=(0, 1, 2))(*arrays)
  with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
    step = jax.jit(jax.grad(lambda *a: loss("fused", *a), argnums=(0, 1, 2)))
    got, text = step(*arrays), step.lower(*arrays).compile().as_text()
  for fused, plain in zip(got, expected, strict=True):
    np.testing.assert_allclose(fused, plain, rtol=1e-5, atol=1e-5)
  scores = [tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
  of_rows = {shape for shape in scores if shape[-1] == 12 and 8 in shape[-2:]}  # keys, queries
  assert of_rows and all(np.prod(shape) <= 2 * 2 * 8 * 12 for shape in of_rows)  # of one unit


def test_an_unknown_kernel_is_refused():
  with pytest.raises(ValueError, match="config.model: attention='flash' is none of"):
    DecoderConfig(vocab_size=8, attention="flash")
