"""Masters, moments of a smaller type and offloads: the same numbers, in less memory or with less rounding."""

import dataclasses
import functools
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from jaxrl import config as configs
from jaxrl import planning
from jaxrl import sharding
from jaxrl.batch import pack
from jaxrl.models.adapters import Adapter
from jaxrl.planning import report
from jaxrl.training import builders
from jaxrl.training import master
from jaxrl.training import optimizers
from jaxrl.training import run as runs
from jaxrl.training import state as states
from jaxrl.training.checkpoints import Checkpoints
from jaxrl.training.learner import make_learner
from jaxrl.training.learner import to_micro_batches
from jaxrl.transforms.start import PhaseStart
from tests.checkpointed import arrays_of

CONFIG = dict(name="adamw", learning_rate=1e-5, schedule="constant", warmup_steps=0, final_fraction=0.1,
              b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.0, clip_norm=0.0, master_dtype="",
              moments_dtype="", transforms=[])
LEVERS = dict(master_dtype="float32", moments_dtype="bfloat16", learning_rate=1e-3, clip_norm=1.0)
KEY = jax.random.key_data(jax.random.key(0))


def rounded(tree):
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def in_full(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


# -------------------------------------------------------------------------------------- optimisers


def drawn(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return {"kernel": jnp.asarray(scale * rng.uniform(0.5, 1.0, (4, 8)), jnp.float32),
          "bias": jnp.asarray(scale * rng.uniform(0.5, 1.0, 8), jnp.float32)}


def trajectory(optimizer, params, steps):
  """Parameters and state after steps along positive gradients of changing size."""
  def one(carry, size):
    gradient = jax.tree.map(lambda p: size * jnp.ones(p.shape, jnp.float32), carry[0])
    return master.step(optimizer, gradient, carry[1], carry[0]), None
  sizes = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.5, steps), jnp.float32)
  return jax.jit(lambda p: jax.lax.scan(one, (p, optimizer.init(p)), sizes)[0])(params)


@pytest.mark.parametrize("changes", [
    dict(), dict(name="lion"), dict(name="sgd", learning_rate=1e-4), dict(name="adafactor"),
    dict(weight_decay=0.1, clip_norm=0.5), dict(moments_dtype="bfloat16")], ids=str)
def test_parameters_with_a_master_are_the_rounded_float32_trajectory(toys, changes):
  start = rounded(drawn(0))
  config = {**CONFIG, **changes}
  params, state = trajectory(optimizers.build({**config, "master_dtype": "float32"}, 900), start, 400)
  witness, moments = trajectory(optimizers.build(config, 900), in_full(start), 400)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
  toys.same_bits((state.master, state.inner, params), (witness, moments, rounded(witness)))
  assert all((np.asarray(a) < np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (params, start))))


def test_small_steps_are_lost_without_a_master_and_kept_with_one(toys):
  """Adam's first steps along one gradient are of the learning rate each, whatever their type."""
  start, steps, rate = rounded(drawn(0)), 600, CONFIG["learning_rate"]
  without, _ = trajectory(optimizers.build(CONFIG, 900), start, steps)
  toys.same_bits(without, start)
  params, _ = trajectory(optimizers.build({**CONFIG, "master_dtype": "float32"}, 900), start, steps)
  for name, x in start.items():
    exact = np.asarray(x, np.float64) - steps * rate
    np.testing.assert_allclose(np.asarray(params[name], np.float64), exact, atol=2 ** -9 + 0.2 * steps * rate)
    assert (np.asarray(params[name], np.float64) <= np.asarray(x, np.float64) - 2 ** -9).all()


def test_the_master_takes_the_step_of_adam_in_float64():
  start = rounded(drawn(0))
  _, state = trajectory(optimizers.build({**CONFIG, "master_dtype": "float32"}, 900), start, 50)
  w, m, v = np.asarray(start["bias"], np.float64), 0.0, 0.0
  for t, g in enumerate(np.random.default_rng(1).uniform(0.5, 1.5, 50), 1):
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g ** 2
    w = w - 1e-5 * (m / (1 - 0.9 ** t)) / (np.sqrt(v / (1 - 0.95 ** t)) + 1e-8)
  np.testing.assert_allclose(state.master["bias"], w, rtol=1e-6)


def test_float32_parameters_are_their_own_master(toys):
  start = {"low": rounded(drawn(0)), "full": drawn(1)}
  params, state = trajectory(optimizers.build({**CONFIG, "master_dtype": "float32"}, 900), start, 30)
  witness, _ = trajectory(optimizers.build(CONFIG, 900), in_full(start), 30)
  toys.same_bits(params, {"low": rounded(witness["low"]), "full": witness["full"]})
  assert len(jax.tree.leaves(state.master)) == len(jax.tree.leaves(start["low"]))


def test_transformations_act_on_the_steps_of_the_master():
  before, after = {"mlp": {"kernel": jnp.zeros((4, 8))}}, rounded({"mlp": drawn(0)})
  after = {"mlp": {"kernel": after["mlp"]["kernel"]}}
  config = {**CONFIG, "master_dtype": "float32", "transforms": [
      dict(name="project_onto_null_space", ratio=0.75)]}
  pieces = optimizers.read_transforms(config, None)
  optimizer = optimizers.build(config, 9, pieces)
  state = optimizers.begin(pieces, optimizer.init(after), PhaseStart(after, lambda run: before, None))
  _, ended = master.step(optimizer, {"mlp": {"kernel": drawn(3)["kernel"]}}, state, after)
  move = np.asarray(ended.master["mlp"]["kernel"] - state.master["mlp"]["kernel"], np.float64)
  direction = np.linalg.svd(np.asarray(after["mlp"]["kernel"], np.float64))[2][0]
  assert np.linalg.norm(move) > 0
  assert np.linalg.norm(move @ direction) < 0.01 * np.linalg.norm(move)  # it is of 1e-5, on weights near 1


@pytest.mark.parametrize("changes, parts", [
    (dict(), ("float32", "float32")), (dict(moments_dtype="bfloat16"), ("bfloat16", "float32"))])
def test_moments_of_a_smaller_type_are_the_first_ones(changes, parts):
  state = optimizers.build({**CONFIG, **changes}, 9).init(drawn(0))
  assert (state[0].mu["kernel"].dtype, state[0].nu["kernel"].dtype) == parts
  lion = optimizers.build({**CONFIG, **changes, "name": "lion"}, 9).init(drawn(0))
  assert lion[0].mu["kernel"].dtype == parts[0]


@pytest.mark.parametrize("changes, message", [
    (dict(master_dtype="bfloat16"), "master_dtype='bfloat16' must be 'float32', or '' to leave it out"),
    (dict(moments_dtype="int8"), "moments_dtype='int8' must be 'bfloat16'"),
    (dict(moments_dtype="bfloat16", name="adafactor"), "adafactor has no moments .* use adamw or lion"),
    (dict(moments_dtype="bfloat16", name="sgd"), "sgd has no moments")])
def test_types_that_an_optimizer_has_not_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    optimizers.build({**CONFIG, **changes}, 9)


# ----------------------------------------------------------------------------------------- updates


def updated(toys, mesh, offload):
  """States after two updates, a skipped one between them, with every lever on bfloat16 parameters."""
  optimizer = optimizers.build({**CONFIG, **LEVERS}, 9)
  parts = toys.learning("sft", optimizer=optimizer, offload=offload,
                        decoder=dataclasses.replace(toys.decoder, param_dtype="bfloat16"))
  abstract = states.abstract_state(parts.decoder, mesh, optimizer, offload=offload)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)

  def start(rng):
    params = nn.unbox(states.init_parameters(parts.decoder, jax.random.wrap_key_data(rng)))
    return states.start_phase(params, rng, optimizer)
  state = jax.jit(start, out_shardings=shardings)(KEY)
  learner, found = make_learner(parts, shardings), [jax.device_get(state)]

  def update(state, weight):
    trajectories = toys.rollouts()
    trajectories[4].weight = weight
    host = to_micro_batches(pack(trajectories, row_length=16, rows_multiple=8), 8)
    batch = sharding.put_batch(host, mesh)
    with jax.set_mesh(mesh):
      return learner.update(state, learner.prepare(state, batch)[1])[0]
  for weight in (1.0, np.nan, 1.0):
    state = update(state, weight)
    found.append(jax.device_get(state))
  before = update(state, 1.0)  # which nothing has looked at
  state = update(before, 1.0)
  assert all(x.is_deleted() for x in jax.tree.leaves((before.params, before.opt_state)))
  return found, state


@pytest.fixture(scope="module", params=[1, 8], ids=["one device", "fsdp of 8"])
def both(request, toys):
  """`updated` without and with offload."""
  mesh = toys.one_device() if request.param == 1 else sharding.make_mesh(1, 8, 1)
  return [updated(toys, mesh, offload) for offload in (False, True)]


def test_an_offloaded_optimizer_has_the_same_bits_and_lies_on_the_host(toys, both):
  (plain, on_device), (offloaded, on_host) = both
  toys.same_bits(plain, offloaded)
  for x, y in zip(jax.tree.leaves(on_device.opt_state), jax.tree.leaves(on_host.opt_state), strict=True):
    assert y.sharding.spec == x.sharding.spec and x.sharding.memory_kind != sharding.HOST
    assert (y.sharding.memory_kind == sharding.HOST) == (y.ndim > 0)
  assert sharding.HOST not in {x.sharding.memory_kind for x in jax.tree.leaves(on_host.params)}
  assert sharding.bytes_of(on_host.opt_state, on_host=True) > 0.99 * sharding.bytes_of(on_device.opt_state)


def test_parameters_of_a_learner_are_the_rounded_master_and_skipped_updates_leave_all(toys, both):
  (first, second, skipped, last), state = both[0]
  for s in (first, second, last):
    toys.same_bits(s.params, rounded(s.opt_state.master))
  toys.same_bits((skipped.params, skipped.opt_state), (second.params, second.opt_state))
  assert [int(s.skipped_steps) for s in (first, second, skipped, last)] == [0, 0, 1, 1]
  for a, b in ((first, second), (second, last)):
    assert all((x != y).any() for x, y in zip(*(jax.tree.leaves(s.opt_state.master) for s in (a, b))))
  for x, p in zip(jax.tree.leaves(state.opt_state.master), jax.tree.leaves(state.params), strict=True):
    assert x.dtype == jnp.float32 and x.sharding.is_equivalent_to(p.sharding, p.ndim)


@pytest.mark.parametrize("saved", [0, 1])
def test_checkpoints_of_either_place_load_into_the_other(toys, both, saved, tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, both[saved][1], {})
  other = both[1 - saved][1]
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), other)
  found = checkpoints.restore_latest(abstract).state
  checkpoints.close()
  toys.same_bits(found, other)
  assert [x.sharding for x in jax.tree.leaves(found)] == [x.sharding for x in jax.tree.leaves(other)]


def test_of_a_model_with_adapters_only_what_is_bfloat16_has_a_master(toys):
  decoder = dataclasses.replace(toys.decoder, param_dtype="bfloat16", heads_on_top=(("value", 1),),
                                adapters=(Adapter("one", rank=2), Adapter("other", rank=2)))
  optimizer = optimizers.build({**CONFIG, **LEVERS}, 9)
  mesh = sharding.make_mesh(1, 8, 1)
  opt_state = states.abstract_state(decoder, mesh, optimizer, trains=("one",), offload=True).opt_state

  def names(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  assert names(opt_state.master) and all("head" in name for name in names(opt_state.master))
  assert any("one" in name for name in names(opt_state.inner))
  assert not any("other" in name for name in names(opt_state.inner))


# -------------------------------------------------------------------------------------------- runs


def config_of(**changes):
  config = base.get_config()
  config.data.update(train="task:addition", task=dict(digits=1), task_size=50, max_prompt_tokens=8,
                     max_completion_tokens=8)
  config.tokenizer.alphabet = "0123456789+="
  config.model.update(layers=1, d_model=16, heads=8, kv_heads=8, d_ff=16, vocab_size=32,
                      param_dtype="bfloat16")
  config.batch.update(row_length=32, examples=8, micro_batch_rows=8)
  config.optimizer.update({k: v for k, v in LEVERS.items() if k != "clip_norm"})
  config.checkpoint.update(every=1, keep=9)
  config.log.update(samples_every=0, curves_every=0)
  config.compilation_cache = "off"
  config.phases = ("one", "two")
  config.one = config.two = dict(kind="sft", steps=2, objective=[dict(name="cross_entropy")])
  configs.override(config, {k: v if isinstance(v, str) else repr(v) for k, v in changes.items()})
  return config


@pytest.fixture
def on_one_device():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    yield


@pytest.mark.parametrize("place", ["optimizer.offload", "one.optimizer.offload"])
def test_a_run_goes_on_to_the_same_bits_with_its_optimizer_elsewhere(on_one_device, tmp_path, place):
  whole, again = tmp_path / "whole", tmp_path / "again"
  runs.run(config_of(), whole, quiet=True)
  found = {n: arrays_of(whole, n) for n in (2, 3, 4)}
  key = next(k for k in found[4] if k.startswith("['params']") and "kernel" in k)
  of_master = key.replace("['params']", "['opt_state']['master']", 1)
  assert found[4][of_master].dtype == np.float32
  for n in found:
    np.testing.assert_array_equal(found[n][of_master].astype(found[n][key].dtype), found[n][key])
  shutil.copytree(whole, again)
  for later in (4, 3, 2):  # what is left is in the middle of the first phase
    shutil.rmtree(again / "checkpoints" / str(later))
  (again / "summary.json").unlink()
  runs.run(config_of(**{place: True}), again, quiet=True)
  ended = arrays_of(again, 4)
  assert ended.keys() == found[4].keys()
  for name, x in ended.items():
    np.testing.assert_array_equal(x, found[4][name], err_msg=name)


@pytest.mark.parametrize("changes, message", [
    ({"model.param_dtype": "float32"}, "in phase one keeps a copy .* config.model.param_dtype is 'float32'"),
    ({"model.adapters": dict(default=dict(rank=2))}, "what it trains, adapters, is float32 in any model")])
def test_a_master_of_what_is_float32_is_refused(changes, message, tmp_path):
  with pytest.raises(configs.ConfigError, match=message):
    runs.run(config_of(**changes), tmp_path / "run", quiet=True)


# ------------------------------------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def plans():
  """Of the same model, by whether its optimiser is offloaded."""
  found = {}
  for offload in (False, True):
    config = config_of(**{"optimizer.offload": offload, "mesh.fsdp": 8, "mesh.data": 1, "phases": ("one",)})
    found[offload] = planning.plan(config, planning.find(devices=8))
  return found


@pytest.mark.parametrize("offload", [False, True])
def test_a_plan_counts_moments_and_master_where_they_lie(plans, offload, tmp_path):
  config = config_of(**{"optimizer.offload": offload, "mesh.fsdp": 8, "mesh.data": 1, "phases": ("one",)})
  parts = builders.build_parts(config, tmp_path, lambda text: None)
  phase, = parts.phases
  params = states.initial_parameters(parts.decoder, KEY, parts.mesh)
  state = builders.start_state(parts, phase, params, KEY)

  def on_first(tree, kinds):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)
               if (x.sharding.memory_kind == sharding.HOST) == kinds)
  planned, = plans[offload].phases
  parts = {"optimiser": state.opt_state.inner, "float32 master": state.opt_state.master}
  for name, tree in parts.items():
    assert planned.held[name] == on_first(tree, False) and planned.host.get(name, 0) == on_first(tree, True)
  size = planned.held["parameters"] / 2  # numbers on a device
  places = planned.host if offload else planned.held
  assert places["float32 master"] == 4 * size and places["optimiser"] == pytest.approx(6 * size, abs=16)
  assert bool(planned.host) == offload


def test_a_plan_of_an_offload_has_its_state_on_the_device_while_it_is_updated(plans):
  (plain,), (offloaded,) = plans[False].phases, plans[True].phases
  state = sum(offloaded.host.values())
  assert offloaded.kept == plain.kept - state
  assert offloaded.update_peak >= offloaded.kept + offloaded.gradient + state
  assert ["in host memory" in planning.text(plan) for plan in plans.values()] == [False, True]
  shared = dataclasses.replace(plans[True], target=dataclasses.replace(plans[True].target, memory_bytes=1e9))
  assert shared.needed(offloaded) == offloaded.peak + state  # a CPU's memory is its host's


def test_advice_names_what_would_help_and_nothing_that_is_done(plans):
  def advised(plan, **changes):
    phase = dataclasses.replace(plan.phases[0], **changes)
    target = dataclasses.replace(plan.target, platform="gpu", memory_bytes=1e3)
    return " ".join(report.remedies(dataclasses.replace(plan, phases=[phase], target=target)))
  plain, = plans[False].phases
  assert "optimizer.offload=True" in advised(plans[False])
  assert "moments_dtype" not in advised(plans[False])
  assert "moments_dtype=bfloat16" in advised(plans[False], optimizer={**plain.optimizer, "moments_dtype": ""})
  assert "offload=True" not in advised(plans[True])
