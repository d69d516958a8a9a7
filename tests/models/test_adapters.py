"""Adapters beside matrices: against NumPy in float64, and against a plain model with merged matrices."""

import dataclasses
import functools

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.batch import Trajectory, pack
from jaxrl.models import DecoderConfig, adapters, critic_from_policy, init_parameters, model_outputs, unbox
from jaxrl.models.adapters import A, B, Adapter
from jaxrl.sampling import Request, Sampler, SamplingParams

TWO = (Adapter("first", rank=2, alpha=3.0, targets="query|output|down", layers=(1,)),
       Adapter("second", rank=3, alpha=2.0, targets="attention", rank_stabilized=True))
SCALES = {"first": 3 / 2, "second": 2 / 3 ** 0.5}  # by hand
BASE = DecoderConfig(vocab_size=11, layers=2, d_model=16, heads=2, kv_heads=1, d_ff=24)
BATCH = pack([Trajectory([1, 5, 3, 2, 7, 7], np.arange(6) > 0), Trajectory([4, 6, 10], np.arange(3) > 0)])
both_layouts = pytest.mark.parametrize("scan", [False, True], ids=["layers", "scan"])


# Most of the time of these tests is XLA's.
jitted = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 1})


@jitted
def drawn(decoder):
  return unbox(init_parameters(decoder, jax.random.key(0)))


@jitted
def logprobs(decoder, params):
  return model_outputs(decoder, params, BATCH).logprobs


@functools.cache
def setup(scan):
  """Decoder with adapters, new parameters, and the same with adapters that act."""
  decoder = dataclasses.replace(BASE, scan_layers=scan, adapters=TWO)
  params = drawn(decoder)
  flat = traverse_util.flatten_dict(params)
  for path, x in flat.items():
    if path[-1] == B:
      noise = np.random.default_rng(x.size).normal(size=x.shape) * 0.3
      if scan and path[-2] == "first":
        noise[0] = 0  # not one of its layers
      flat[path] = jnp.asarray(noise, jnp.float32)
  return decoder, params, traverse_util.unflatten_dict(flat)


def merged_by_hand(flat, path, matrices):
  """Float64 kernel W + sum of scale * A B, of every layer of a stack."""
  stack = np.asarray(flat[path], np.float64)
  stack = stack if "blocks" in path else stack[None]
  for name, scale in SCALES.items():
    if (*path[:-1], name, A) in matrices:
      a, b = (np.asarray(matrices[(*path[:-1], name, half)], np.float64) for half in (A, B))
      a, b = (x if "blocks" in path else x[None] for x in (a, b))
      stack = stack + scale * np.stack([np.tensordot(x, y, 1) for x, y in zip(a, b)])
  return stack.reshape(flat[path].shape)


@both_layouts
def test_new_adapters_leave_the_base_and_what_it_computes_as_they_are(scan):
  decoder, params, _ = setup(scan)
  plain = dataclasses.replace(BASE, scan_layers=scan)
  base = drawn(plain)
  flat, expected = traverse_util.flatten_dict(params), traverse_util.flatten_dict(base)
  assert all(np.array_equal(flat[path], x) for path, x in expected.items())
  mine = {path for path in flat if path not in expected}
  assert all(path[-1] in (A, B) for path in mine) and len(mine) == (14 if scan else 22)
  np.testing.assert_array_equal(logprobs(decoder, params),
                                logprobs(plain, base))


@both_layouts
def test_the_adapted_model_is_that_of_merged_matrices(scan):
  decoder, _, params = setup(scan)
  plain = dataclasses.replace(BASE, scan_layers=scan)
  merged, flat = adapters.merged(params, TWO), traverse_util.flatten_dict(params)
  for path, x in traverse_util.flatten_dict(merged).items():
    expected = merged_by_hand(flat, path, flat) if path[-1] == "kernel" else flat[path]
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)
  found = logprobs(decoder, params)
  np.testing.assert_allclose(found, logprobs(plain, merged), atol=1e-5)
  assert np.abs(found - logprobs(decoder, adapters.off(params))).max() > 0.1


@both_layouts
def test_gradients_are_those_of_the_merged_matrices_by_the_chain_rule(scan):
  """W' = W + s A B, so dA = s dW' B^T and dB = s A^T dW', where dW' is that of a plain model."""
  decoder, _, params = setup(scan)
  plain = dataclasses.replace(BASE, scan_layers=scan)

  def loss(config, params):
    return jnp.sum(jnp.sin(model_outputs(config, params, BATCH).logprobs))
  part = adapters.trained(params, TWO)
  slope_of = jitted(jax.grad(lambda config, part: loss(config, adapters.joined(params, part)), argnums=1))
  found = slope_of(decoder, part)
  of_kernels = traverse_util.flatten_dict(jitted(jax.grad(loss, argnums=1))(plain, adapters.merged(params, TWO)))
  flat, seen = traverse_util.flatten_dict(params), 0
  for path, x in traverse_util.flatten_dict(found).items():
    if path[-1] != A:
      continue
    slope = np.asarray(of_kernels[(*path[:-2], "kernel")], np.float64)
    a, b = (np.asarray(flat[(*path[:-1], half)], np.float64) for half in (A, B))
    got = x, traverse_util.flatten_dict(found)[(*path[:-1], B)]
    for layer in range(2) if scan else (None,):
      pick = (lambda x: x) if layer is None else (lambda x, layer=layer: np.asarray(x)[layer])
      rank, flat_a = pick(a).shape[-1], pick(a).reshape(-1, pick(a).shape[-1])
      flat_slope, flat_b = pick(slope).reshape(len(flat_a), -1), pick(b).reshape(rank, -1)
      for mine, expected in ((pick(got[0]), flat_slope @ flat_b.T), (pick(got[1]), flat_a.T @ flat_slope)):
        expected = SCALES[path[-2]] * expected
        np.testing.assert_allclose(np.asarray(mine).reshape(expected.shape), expected,
                                   atol=1e-5 * max(np.abs(expected).max(), 1e-2))
        seen += np.abs(expected).max() > 1e-3
  assert seen >= 20
  names = {path[1] for path in flat if path[-2] == "first"}
  assert names == ({"blocks"} if scan else {"blocks_1"})
  if scan:  # nothing moves A and B of a layer that an adapter leaves out, which begin as 0
    at_start = adapters.joined(part, {"params": adapters.without_other_layers(part["params"], TWO)})
    for path, x in traverse_util.flatten_dict(slope_of(decoder, at_start)).items():
      assert path[-2] != "first" or not np.any(x[0]) and np.any(x[1]), path


@both_layouts
def test_what_is_trained_is_named(scan):
  decoder, params, _ = setup(scan)
  params = {**params, "critic": params["params"]}
  params["params"] = {**params["params"], "value_head": {"kernel": jnp.ones(3)}}
  part = traverse_util.flatten_dict(adapters.trained(params, TWO, ("second",)))
  own = {path[-2] for path in part if path[0] == "params"}
  assert own == {"second", "value_head"} and any(path[0] == "critic" for path in part)
  assert adapters.trained(params, ()) is params
  critic = critic_from_policy(decoder, {**params, "critic": {"embedding": 0, "blocks" if scan else "blocks_1": 0}})
  same = adapters.merged(params["params"], TWO)["blocks" if scan else "blocks_1"]
  jax.tree.map(np.testing.assert_array_equal, critic["critic"]["blocks" if scan else "blocks_1"], same)


@pytest.mark.parametrize("scan, weights, bound", [(True, "", 1e-4), (False, "int8", 0.1)])
def test_the_sampler_uses_adapters(scan, weights, bound):
  decoder, _, params = setup(scan)
  requests = [Request((1, 5, 3), 4, (0,), SamplingParams(max_tokens=6))]
  samples = Sampler(decoder, weights_dtype=weights).sample(params["params"], requests, jax.random.key(1))[0]
  batch = pack([Trajectory([1, 5, 3, *s.tokens], np.arange(3 + len(s.tokens)) > 2) for s in samples])
  plain = dataclasses.replace(BASE, scan_layers=scan)
  run = jitted(model_outputs)
  expected = np.asarray(run(plain, adapters.merged(params, TWO), batch).logprobs)
  gaps = np.abs(expected[np.asarray(batch.loss_mask)] - np.concatenate([s.logprobs for s in samples]))
  assert gaps.max() < bound
  without = np.asarray(run(plain, adapters.merged(adapters.off(params), TWO), batch).logprobs)
  assert np.abs(without - expected)[np.asarray(batch.loss_mask)].max() > 0.3


@pytest.mark.parametrize("specs, message", [
    ({"Default": {}}, "an adapter is called by a word"),
    ({"kernel": {}}, "other than kernel, bias, scale, blocks, base"),
    ({"default": 8}, "config.model.adapters.default=8, but it is a section"),
    ({"default": {"rnak": 8}}, "config.model.adapters.default has no field 'rnak'; did you mean 'rank'"),
    ({"default": {"rank": 0}}, "config.model.adapters.default.rank=0 must be a whole number, at least 1"),
    ({"default": {"alpha": -1.0}}, "default.alpha=-1.0 must be a positive number"),
    ({"default": {"targets": "("}}, "default.targets='(' is no regular expression"),
    ({"default": {"layers": "01"}}, "default.layers='01' must list numbers of layers"),
    ({"default": {"rank_stabilized": 1}}, "default.rank_stabilized=1 must be True or False")])
def test_settings_that_make_no_adapter_are_refused(specs, message):
  with pytest.raises(ValueError) as error:
    adapters.read(specs)
  assert message in str(error.value)


def test_layers_and_targets_that_are_not_there_are_refused():
  with pytest.raises(ValueError, match=r"adapters.a.layers names \[2\], but there are layers 0 to 1"):
    dataclasses.replace(BASE, adapters=(Adapter("a", layers=(0, 2)),))
  decoder, params, _ = setup(False)
  with pytest.raises(ValueError, match=r"adapters.a.targets='gates' matches no matrix; there are attention.key, "):
    adapters.check_targets((*TWO, Adapter("a", targets="gates")), params)
