"""The decoder agrees with itself: packed and alone, scanned and unrolled, cached and not."""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.batch import Trajectory, pack
from jaxrl.models import (Decoder, DecoderConfig, KeyValues, LayerCache, Rows, init_parameters,
                          unbox)
from jaxrl.models import rope

PLAIN = DecoderConfig(vocab_size=31, layers=2, d_model=24, heads=4, kv_heads=2, d_ff=40,
                      qkv_bias=True, tie_embeddings=False)
WINDOWED = DecoderConfig(
    vocab_size=31, layers=2, d_model=24, heads=4, kv_heads=1, d_ff=40, head_dim=8, qk_norm=True,
    layer_types=("sliding", "full"), sliding_window=4, attention_soft_cap=2.0, norm_offset=True,
    post_norms=True, scale_embeddings=True, rope_local_theta=30.0, rope_theta=100.0,
    rope_scaling=(("rope_type", "linear"), ("factor", 2.0)), activation="gelu_tanh")

PARALLEL = DecoderConfig(
    vocab_size=31, layers=2, d_model=24, heads=3, kv_heads=3, d_ff=40, norm="layer", parallel_residual=True,
    rope_fraction=0.5, gated_mlp=False, qkv_bias=True, output_bias=True, mlp_bias=True, activation="gelu")
SPARSE = DecoderConfig(
    vocab_size=31, layers=2, d_model=24, heads=4, kv_heads=2, d_ff=40, pre_norms=False, post_norms=True,
    qk_norm=True, qk_norm_across_heads=True, mlp_types=("experts",), experts=6, experts_per_token=2,
    expert_d_ff=10, rope_scaling=(("rope_type", "yarn"), ("factor", 4.0),
                                  ("original_max_position_embeddings", 16)))
NAMES = {"plain": PLAIN, "windowed": WINDOWED, "parallel": PARALLEL, "sparse": SPARSE}
every = pytest.mark.parametrize("config", NAMES.values(), ids=NAMES)


def with_(config, **changes):
  return DecoderConfig(**{**vars(config), **changes})


@functools.cache
def parameters(config, seed=0):
  """Random everywhere, norms and biases too."""
  params = unbox(jax.jit(functools.partial(init_parameters, config))(jax.random.key(seed)))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), params)


def stacked(params, layers):
  """Parameters of unrolled layers as those of scanned ones."""
  inner = dict(params["params"])
  blocks = [inner.pop(f"blocks_{i}") for i in range(layers)]
  return {"params": {**inner, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}}


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens, positions, segment_ids):
  return Decoder(config).apply(params, tokens, positions, segment_ids)


def sequences(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 31, size=n) for n in lengths]


def alone(tokens):
  """Arguments of `run` for one sequence."""
  return np.asarray(tokens)[None], np.arange(len(tokens))[None], np.ones((1, len(tokens)), np.int32)


def one_per_row(sequences, rows, length):
  """Arguments of `run` with every sequence in its own padded row."""
  arrays = np.zeros((3, rows, length), np.int32)
  for row, tokens in enumerate(sequences):
    for array, values in zip(arrays, alone(tokens)):
      array[row, :len(tokens)] = values[0]
  return arrays


@every
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_packed_forward_equals_each_sequence_alone(config, lengths):
  params = parameters(config)
  trajectories = [Trajectory(tokens=t, loss_mask=np.zeros(len(t))) for t in sequences(lengths)]
  packed = pack(trajectories, row_length=16, min_rows=8)
  hidden, _ = run(config, params, packed.tokens, packed.positions, packed.segment_ids)
  expected, _ = run(config, params, *one_per_row([t.tokens for t in trajectories], 8, 16))
  for item, length in enumerate(lengths):
    np.testing.assert_allclose(hidden[packed.sequence_ids == item], expected[item, :length],
                               atol=1e-5)


def test_padding_equals_no_padding():
  params, [tokens] = parameters(WINDOWED), sequences([9])
  hidden, _ = run(WINDOWED, params, *one_per_row([tokens], 8, 16))
  expected, _ = run(WINDOWED, params, *alone(tokens))
  np.testing.assert_allclose(hidden[:1, :9], expected, atol=1e-5)


def test_a_window_hides_what_lies_before_it():
  config = with_(PLAIN, layers=1, layer_types=("sliding",), sliding_window=3)
  [tokens] = sequences([8])
  other = tokens.copy()
  other[2] = (other[2] + 1) % 31
  params = parameters(config)
  changed = np.abs(run(config, params, *alone(tokens))[0] - run(config, params, *alone(other))[0])
  assert (changed.max(axis=-1)[0] > 1e-6).tolist() == [False, False, True, True, True] + [False] * 3


@every
def test_scanned_layers_equal_unrolled_ones(config):
  params, [tokens] = parameters(config), sequences([10])
  expected, expected_kv = run(config, params, *alone(tokens))
  hidden, kv = run(with_(config, scan_layers=True), stacked(params, config.layers), *alone(tokens))
  np.testing.assert_allclose(hidden, expected, atol=1e-5)
  np.testing.assert_allclose(kv.keys, jnp.stack([x.keys for x in expected_kv]), atol=1e-5)


def gradients(config, params):
  [tokens] = sequences([10])
  target = np.random.default_rng(1).normal(size=(1, 10, config.d_model))

  @jax.jit
  def gradient(params):
    return jax.grad(lambda p: jnp.sum(target * run(config, p, *alone(tokens))[0]))(params)
  return gradient(params)


@pytest.mark.parametrize("scan_layers, policies", [(False, ("full",)), (True, ("dots", "full"))],
                         ids=["unrolled", "scanned"])
def test_remat_does_not_change_gradients(scan_layers, policies):
  config, params = WINDOWED, parameters(WINDOWED)
  if scan_layers:
    config, params = with_(config, scan_layers=True), stacked(params, 2)
  expected = gradients(config, params)
  for remat in policies:
    got = gradients(with_(config, remat=remat), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_dots_computes_fewer_products_again_than_full():
  """Projections are kept; what has batch dimensions, as attention has, is not."""
  config, [tokens] = WINDOWED, sequences([10])
  params = parameters(config)

  def products(remat):
    def loss(p):
      return jnp.sum(run(with_(config, remat=remat), p, *alone(tokens))[0] ** 2)
    return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general[")
  assert products("none") <= products("dots") < products("full")


IN_ORDER = np.array([0, 0, 0, 1, 1, 1]), Rows(lengths=np.array([7, 3]))
MIXED_UP = np.array([1, 0, 1, 1]), Rows(  # the only row of prompt 0 fills up its places
    lengths=np.array([7, 3]), row_of=np.array([[1, 1, 1], [3, 0, 2]]),
    cell_of=np.array([4, 0, 5, 3]))


@pytest.mark.parametrize("config, scan_layers, rows", [
    (PLAIN, False, IN_ORDER), (WINDOWED, False, IN_ORDER), (WINDOWED, True, IN_ORDER),
    (WINDOWED, False, MIXED_UP), (PARALLEL, True, IN_ORDER), (SPARSE, True, IN_ORDER)],
    ids=["plain", "windowed", "scanned", "any order", "parallel", "sparse"])
def test_decoding_equals_the_packed_forward_pass(config, scan_layers, rows):
  """Two prompts of different lengths, several samples each; windows reach across the border."""
  owners, rows = rows
  params = parameters(config)
  if scan_layers:
    config, params = with_(config, scan_layers=True), stacked(params, config.layers)
  prompts, steps, prefix = sequences([7, 3]), 6, 8
  continuations = np.random.default_rng(3).integers(0, 31, size=(len(owners), steps))
  _, prefilled = run(config, params, *one_per_row(prompts, 2, prefix))

  def empty(kv):
    layers, (_, kv_heads, length, width) = kv.keys.shape[:-4], kv.keys.shape[-4:]
    return LayerCache(
        KeyValues(kv.keys.swapaxes(-1, -2), kv.values),
        KeyValues(jnp.zeros((*layers, len(owners), kv_heads, width, steps)),
                  jnp.zeros((*layers, len(owners), kv_heads, steps, width))))

  def grown(cache, kv, index):
    suffix = cache.suffix
    return cache.replace(suffix=KeyValues(suffix.keys.at[..., index].set(kv.keys),
                                          suffix.values.at[..., index, :].set(kv.values)))

  @jax.jit
  def decode(tokens, index, cache):
    step = Decoder(config).apply(params, rows, index, len(tokens), method="decode_step")
    hidden, new = Decoder(config).apply(params, tokens, rows, step, cache, method="decode")
    if scan_layers:
      return hidden, grown(cache, new, index)
    return hidden, [grown(c, kv, index) for c, kv in zip(cache, new)]

  cache = empty(prefilled) if scan_layers else [empty(kv) for kv in prefilled]
  hidden = []
  for step in range(steps):
    out, cache = decode(continuations[:, step], jnp.int32(step), cache)
    hidden.append(out)
  hidden = np.stack(hidden, axis=1)  # [rows, steps, width]

  for row, owner in enumerate(owners):
    whole = np.concatenate([prompts[owner], continuations[row]])
    expected, _ = run(config, params, *one_per_row([whole], 1, 16))
    end = len(prompts[owner]) + steps
    np.testing.assert_allclose(hidden[row], expected[0, len(prompts[owner]):end], atol=2e-5)


def test_bfloat16_stays_close_to_float32():
  config = with_(PLAIN, dtype="bfloat16")
  params, [tokens] = parameters(PLAIN), sequences([12])
  expected, _ = run(PLAIN, params, *alone(tokens))
  hidden, kv = run(config, params, *alone(tokens))
  assert hidden.dtype == kv[0].keys.dtype == jnp.bfloat16
  assert np.abs(np.float32(hidden) - expected).max() < 0.05 * np.abs(expected).max()


def test_llama3_scaling_keeps_fast_and_slows_slow_rotations():
  scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=8192)
  plain, scaled = rope.frequencies(128, 5e5, {}), rope.frequencies(128, 5e5, scaling)
  wavelength = 2 * np.pi / plain
  ratio = plain / scaled
  np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1, rtol=1e-6)
  np.testing.assert_allclose(ratio[wavelength > 8192], 8, rtol=1e-6)
  between = ratio[(wavelength >= 8192 / 4) & (wavelength <= 8192)]
  assert len(between) and (np.diff(between) > 0).all() and between[0] >= 1 and between[-1] <= 8


@pytest.mark.parametrize("scaling, message", [
    (dict(rope_type="linear"), "of type 'linear' needs 'factor'"),
    (dict(rope_type="yarn", factor=2.0), "of type 'yarn' needs 'original_max_position_embeddings'"),
    (dict(rope_type="longrope", short_factor=(1.0, 2.0), long_factor=(), original_max_position_embeddings=9),
     "of type 'longrope' has 2 factors, but 4 pairs are rotated"),
    (dict(rope_type="dynamic", factor=2.0), "rope_type='dynamic' is none of linear, llama3, yarn, longrope")])
def test_rope_scaling_that_is_unknown_or_incomplete_is_refused(scaling, message):
  with pytest.raises(ValueError, match=message):
    rope.frequencies(8, 1e4, scaling)


@pytest.mark.parametrize("changes, message", [
    (dict(kv_heads=3), "kv_heads=3 does not divide heads=4"),
    (dict(d_model=26), "heads=4 does not divide d_model=26; set head_dim"),
    (dict(head_dim=7), "head_dim=7 with rope_fraction=1.0 would rotate 7 numbers"),
    (dict(rope_fraction=0.2), "would rotate 1 numbers"),
    (dict(norm="batch"), "norm='batch' is none of"),
    (dict(norm="layer", norm_offset=True), "norm_offset is of norm='rms'"),
    (dict(pre_norms=False), "set post_norms"),
    (dict(qk_norm_across_heads=True), "needs qk_norm=True"),
    (dict(mlp_types=("moe",)), "must be `dense` or `experts`"),
    (dict(mlp_types=("experts",), experts=2, experts_per_token=3, expert_d_ff=4), "experts_per_token=3 between"),
    (dict(mlp_types=("experts",), experts=2, experts_per_token=1, expert_d_ff=4, mlp_bias=True), "have no biases"),
    (dict(mlp_types=("dense", "experts"), experts=2, experts_per_token=1, expert_d_ff=4, scan_layers=True),
     "mixes two kinds: set scan_layers=False"),
    (dict(remat="some"), "remat='some' is none of"),
    (dict(activation="relu6"), "activation='relu6' is none of"),
    (dict(layer_types=("local",)), "must be `full` or `sliding`"),
    (dict(layer_types=("sliding",)), "sliding_window must be positive"),
    (dict(layers=0), "layers=0 must be positive"),
    (dict(kv_heads=0), "kv_heads=0 must be positive")])
def test_impossible_shapes_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    with_(PLAIN, **changes)
