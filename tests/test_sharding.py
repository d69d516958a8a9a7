"""Meshes change where arrays are and nothing else. The suite has 8 virtual CPU devices."""

import dataclasses
import functools
import importlib.util
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import sharding
from jaxrl.batch import Trajectory, pack
from jaxrl.models import DecoderConfig, init_parameters, model_outputs, unbox

CONFIG = DecoderConfig(vocab_size=50, layers=2, d_model=32, heads=4, kv_heads=2, d_ff=48,
                       scan_layers=True, tie_embeddings=False, qkv_bias=True,
                       heads_on_top=(("value", 1),))
OPTIMIZER = optax.adamw(1e-3)


def mesh_of(*shape):
  return sharding.make_mesh(*shape, devices=jax.devices()[:np.prod(shape)])


def init(key):
  params = init_parameters(CONFIG, key)
  return dict(params=params, optimizer=OPTIMIZER.init(params), step=jnp.int32(0))


def batch_of(rows):
  rng = np.random.default_rng(0)
  lengths = rng.integers(2, 13, size=rows)
  return pack([Trajectory(tokens=rng.integers(0, 50, size=n), loss_mask=np.arange(n) > 0,
                          behaviour_logprobs=-4 * rng.random(n), reward=rng.random(),
                          group=i // 4) for i, n in enumerate(lengths)],
              row_length=16, rows_multiple=8)


def loss(params, batch):
  """Uses everything that a loss can: tokens, per-sequence statistics, a ratio, entropy, values."""
  outputs = model_outputs(CONFIG, params, batch, signals=("entropy", "values"), vocabulary_chunk=16)
  advantages = (batch.rewards - batch.rewards.mean())[jnp.maximum(batch.sequence_ids, 0)]
  ratio = jnp.exp(outputs.logprobs - batch.behaviour_logprobs)
  per_token = -ratio * advantages - 0.1 * outputs.entropy + (outputs.values - advantages) ** 2
  return jnp.sum(jnp.where(batch.loss_mask, per_token, 0)) / batch.loss_mask.sum()


@functools.cache
def state_on(shape):
  shardings = sharding.shardings_of(jax.eval_shape(init, jax.random.key(0)), mesh_of(*shape))
  return jax.jit(lambda key: unbox(init(key)), out_shardings=shardings)(jax.random.key(0))


@functools.cache
def gradients_on(shape):
  mesh, params = mesh_of(*shape), state_on((1, 1, 1))["params"]
  shardings = sharding.shardings_of(jax.eval_shape(init, jax.random.key(0)), mesh)["params"]
  with jax.set_mesh(mesh):
    gradients = jax.jit(jax.grad(loss))(jax.device_put(params, shardings),
                                        sharding.put_batch(batch_of(12), mesh))
  return jax.tree.map(np.asarray, gradients)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_gradients_equal_those_of_one_device(shape):
  expected, gradients = gradients_on((1, 1, 1)), gradients_on(shape)
  scale = max(np.abs(g).max() for g in jax.tree.leaves(expected))
  for got, right in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected)):
    assert np.linalg.norm(got - right) <= 1e-5 * np.linalg.norm(right) + 1e-7 * scale


@pytest.mark.parametrize("how", [dict(), dict(remat="full"), dict(scan_layers=False)], ids=str)
def test_gradients_through_states_of_a_layer_equal_those_of_one_device(how):
  config, found = dataclasses.replace(CONFIG, **how), []
  make = functools.partial(init_parameters, config)
  params = unbox(jax.jit(make)(jax.random.key(0)))

  def loss(params, batch):
    states = model_outputs(config, params, batch, signals=("hidden@1",), logprobs=False).layers["hidden@1"]
    return jnp.sum(jnp.where(batch.loss_mask[..., None], states, 0) ** 2)
  for shape in ((1, 1, 1), (2, 2, 2)):
    mesh = mesh_of(*shape)
    placed = jax.device_put(params, sharding.shardings_of(jax.eval_shape(make, jax.random.key(0)), mesh))
    with jax.set_mesh(mesh):
      found.append(jax.device_get(jax.jit(jax.grad(loss))(placed, sharding.put_batch(batch_of(12), mesh))))
  jax.tree.map(lambda got, right: np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4), *found[::-1])
  blocks = found[0]["params"]
  first, second = (jax.tree.map(lambda x: x[i], blocks["blocks"]) if config.scan_layers else
                   blocks[f"blocks_{i}"] for i in (0, 1))
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(first["mlp"]))
  assert not any(g.any() for g in jax.tree.leaves(second)), "nothing after that layer matters"


def test_initial_state_does_not_depend_on_the_mesh():
  jax.tree.map(np.testing.assert_array_equal, state_on((2, 2, 2)), state_on((1, 1, 1)))


@pytest.mark.parametrize("shape, parts", [((8, 1, 1), 1), ((2, 2, 2), 4), ((1, 4, 2), 8)])
def test_bytes_per_device_shrink(shape, parts):
  mesh = mesh_of(*shape)
  shardings = sharding.shardings_of(jax.eval_shape(init, jax.random.key(0)), mesh)
  abstract = unbox(jax.eval_shape(init, jax.random.key(0)))
  state = jax.tree.map(lambda x, s: jax.device_put(np.zeros(x.shape, x.dtype), s), abstract,
                       shardings)
  on_device = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
  whole = sum(x.nbytes for x in jax.tree.leaves(state))
  assert whole / parts <= on_device < whole / parts * 1.1  # norms, biases and heads are not split


def test_optimiser_state_follows_its_parameters():
  shardings = sharding.shardings_of(jax.eval_shape(init, jax.random.key(0)), mesh_of(2, 2, 2))
  moments = shardings["optimizer"][0]
  assert moments.mu == moments.nu == shardings["params"]
  assert moments.count.spec == shardings["step"].spec == jax.P()


def test_moments_of_another_rank_are_replicated():
  def make(key):
    return optax.adafactor(1e-3, min_dim_size_to_factor=8).init(init_parameters(CONFIG, key))
  abstract = jax.eval_shape(make, jax.random.key(0))
  shardings = sharding.shardings_of(abstract, mesh_of(2, 2, 2))
  for moment in ("v_row", "v_col", "v"):
    assert getattr(shardings[0], moment)["params"]["embedding"].is_fully_replicated
  assert jax.tree.structure(shardings) == jax.tree.structure(unbox(abstract))


def test_batches_are_split_by_rows_and_sequence_arrays_are_everywhere():
  batch = sharding.put_batch(batch_of(12).with_signals(advantages=np.zeros((8, 16))),
                             mesh_of(2, 2, 2))
  assert batch.tokens.addressable_shards[0].data.shape == (2, 16)
  assert batch.signals["advantages"].sharding == batch.tokens.sharding
  assert batch.rewards.sharding.is_fully_replicated


def test_a_batch_that_does_not_divide_is_refused():
  batch = jax.tree.map(lambda x: x[:6] if x.ndim == 2 else x, batch_of(12))
  with pytest.raises(ValueError, match="6 rows does not divide .* = 4: .* rows_multiple=4"):
    sharding.put_batch(batch, mesh_of(2, 2, 2))


@pytest.mark.parametrize("setting, shape", [
    ({}, (8, 1, 1)), (dict(fsdp=4), (2, 4, 1)), (dict(data=2, fsdp=-1, tensor=2), (2, 2, 2))])
def test_minus_one_is_what_the_others_leave(setting, shape):
  assert tuple(sharding.make_mesh(**setting).shape.values()) == shape


@pytest.mark.parametrize("setting, remedy", [
    (dict(fsdp=3), "data=2 --config.mesh.fsdp=4 --config.mesh.tensor=1"),
    (dict(data=3, fsdp=2), "data=4 --config.mesh.fsdp=2 --config.mesh.tensor=1"),
    (dict(tensor=16), "data=1 --config.mesh.fsdp=1 --config.mesh.tensor=8"),
    (dict(data=-1, fsdp=-1), "does not divide 8 devices"),
    (dict(data=0), "does not divide 8 devices")])
def test_impossible_meshes_are_refused_with_the_nearest_possible_one(setting, remedy):
  with pytest.raises(ValueError, match=remedy):
    sharding.make_mesh(**setting)


def test_models_that_do_not_divide_are_refused_with_a_remedy():
  config = DecoderConfig(vocab_size=101, layers=1, d_model=30, heads=6, kv_heads=2, head_dim=8,
                         d_ff=60)
  with pytest.raises(ValueError) as error:
    sharding.check_divisible(config, mesh_of(1, 4, 2))
  assert str(error.value).splitlines() == [
      "config.model.d_model=30 does not divide over mesh.fsdp=4: use --config.mesh.fsdp=2",
      "config.model.vocab_size=101 does not divide over mesh.tensor=2: use "
      "--config.model.vocab_size=102 (unused ids at its end) or --config.mesh.tensor=1"]
  sharding.check_divisible(CONFIG, mesh_of(1, 4, 2))


def test_unknown_axes_and_undividable_parameters_are_named():
  with pytest.raises(ValueError, match="'wavelength'.* have no rule"):
    sharding.partition_spec(("wavelength", None))
  with pytest.raises(ValueError, match=r"\['key'\].* axis 'kv_heads' does not divide .* = 4"):
    sharding.shardings_of(jax.eval_shape(functools.partial(init_parameters, CONFIG),
                                         jax.random.key(0)), mesh_of(1, 2, 4))


def test_constrain_leaves_alone_what_does_not_divide():
  x = jnp.ones((6, 4))
  assert sharding.constrain(x, "rows", None) is x  # no mesh in context
  mesh = mesh_of(2, 2, 2)
  with jax.set_mesh(mesh):
    odd = jax.jit(lambda x: sharding.constrain(x, "rows", "vocab"))(x)
    even = jax.jit(lambda x: sharding.constrain(x, "rows", "vocab"))(jnp.ones((8, 4)))
  np.testing.assert_array_equal(odd, x)
  assert even.addressable_shards[0].data.shape == (2, 2)


# -------------------------------------------------------------------------------------- processes

ONE_OF_TWO = """
import jax, numpy as np
from jaxrl import sharding
from jaxrl.batch import Trajectory, pack
assert sharding.start_distributed() and sharding.start_distributed()
mesh = sharding.make_mesh()
batch = pack([Trajectory(tokens=np.arange(4) + i, loss_mask=np.zeros(4)) for i in range(4)])
placed = sharding.put_batch(batch, mesh)
np.testing.assert_array_equal(sharding.to_host(placed).tokens, batch.tokens)
print(jax.process_count(), mesh.shape["data"], len(placed.tokens.addressable_shards),
      int(jax.jit(lambda b: b.tokens.sum())(placed)), flush=True)
"""


def test_two_processes_join_and_share_a_batch():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  processes = []
  for index in range(2):
    environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
                   "JAX_PROCESS_ID": str(index), "JAX_PLATFORMS": "cpu",
                   "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes.append(subprocess.Popen([sys.executable, "-c", ONE_OF_TWO], env=environment,
                                      text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
  for process in processes:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error[-2000:]
    assert out.split()[-4:] == ["2", "4", "2", str(sum(range(4)) * 4 + 4 * sum(range(4)))]


@pytest.mark.parametrize("environment", [
    {}, dict(SLURM_JOB_ID="7", SLURM_NTASKS="8"), dict(SLURM_STEP_NUM_TASKS="1"),
    dict(TPU_WORKER_HOSTNAMES="localhost"),
    dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="1", JAX_PROCESS_ID="0")])
def test_one_process_starts_alone(environment, monkeypatch):
  monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("started"))
  assert not sharding.start_distributed(environment)


@pytest.mark.parametrize("environment", [
    dict(SLURM_STEP_NUM_TASKS="2"), dict(OMPI_COMM_WORLD_SIZE="4"),
    dict(MEGASCALE_NUM_SLICES="2", TPU_WORKER_HOSTNAMES="a"),
    dict(TPU_WORKER_HOSTNAMES="a,b", JAX_COORDINATOR_ADDRESS="a:1")])
def test_clusters_that_jax_knows_are_left_to_it(environment, monkeypatch):
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
  assert sharding.expects_processes(environment)
  sharding.start_distributed(environment)
  assert calls == [((), {"heartbeat_timeout_seconds": sharding.HEARTBEAT_SECONDS})]


def no_cluster(*_, **__):
  raise ValueError("coordinator_address should be defined.")  # as JAX says it


def no_metadata(*_, **__):
  raise ConnectionError("metadata.google.internal")  # one of requests' is an OSError too


@pytest.fixture
def tpu_host(monkeypatch, tmp_path):
  """A machine with a TPU and nothing in its environment that tells of other hosts."""
  (tmp_path / "accel0").touch()
  monkeypatch.setattr(sharding, "TPU_DEVICES", (str(tmp_path / "accel0"),))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.parametrize("environment, asked", [
    ({}, True), (dict(JAX_PLATFORMS="tpu,cpu"), True), (dict(JAX_PLATFORMS="cpu"), False),
    (dict(TPU_SKIP_MDS_QUERY="1"), False), (dict(TPU_WORKER_HOSTNAMES="localhost"), False)])
def test_a_tpu_host_on_gce_asks_for_others_unless_it_is_known_to_be_alone(
    tpu_host, monkeypatch, environment, asked):
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append(a))
  assert not sharding.start_distributed(environment)  # nobody else was found
  assert calls == [()] * asked


@pytest.mark.parametrize("failure", [no_cluster, no_metadata])
def test_a_tpu_host_without_a_cluster_is_one_process(tpu_host, monkeypatch, failure):
  monkeypatch.setattr(jax.distributed, "initialize", failure)
  assert not sharding.start_distributed({})
  with pytest.raises((ValueError, OSError)):  # but it is no such thing where others are certain
    sharding.start_distributed(dict(SLURM_STEP_NUM_TASKS="2"))


@pytest.mark.parametrize("index, count", [("2", "2"), ("-1", "2"), ("first", "2"), ("0", "two")])
def test_processes_are_numbered_from_0(index, count):
  with pytest.raises(ValueError, match=f"JAX_PROCESS_ID={index} and JAX_NUM_PROCESSES={count}"):
    sharding.start_distributed(dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES=count,
                                    JAX_PROCESS_ID=index))


def test_half_an_environment_is_refused():
  with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS without JAX_NUM_PROCESSES"):
    sharding.start_distributed(dict(JAX_COORDINATOR_ADDRESS="a:1"))
