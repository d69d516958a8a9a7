"""What the scaling analysis counts in programs and predicts from that, against arithmetic."""

import collections
import dataclasses
import functools
import json

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, PartitionSpec
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import chips
import hlo
import scaling
import scaling_decode
import scaling_model as model

LENGTH = 128
TOY = model.SHAPES["toy"]


@functools.cache
def compiled(mesh, kind="sft"):
  return scaling.child(scaling.Job("toy", model.Mesh(*mesh), model.Load(kind, LENGTH, 1, 2, 128)))


def by_axes(traffic):
  sums = collections.Counter()
  for op, axes, payload, _ in traffic:
    sums["+".join(axes)] += payload
  return sums


# -------------------------------------------------------------------------------------- programs


def test_products_and_collectives_in_loops_count_as_often_as_they_run():
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

  def inner(x, w):
    def layer(x, _):
      return jax.lax.psum(x @ w, "b"), None
    return jax.lax.scan(layer, x, length=5)[0]

  @functools.partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec("a"), PartitionSpec(),
                                                         PartitionSpec()),
                     out_specs=PartitionSpec(), check_vma=False)
  def program(x, w, count):
    x = jax.lax.fori_loop(0, count, lambda i, x: inner(x, w), x)
    return jax.lax.all_gather(x, "a", tiled=True)

  shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((6, 16), jnp.float32), ((16, 16), jnp.float32),
                                                    ((), jnp.int32))]
  _, text = scaling.compile_and_dump(jax.jit(program).lower(*shapes))
  found = hlo.costs(text, dynamic_trips=3)
  assert found.flops == 3 * 5 * 2 * 3 * 16 * 16  # 3 of the 6 rows on each device
  sums = {(c.op, c.group): c.payload * c.times for c in found.collectives}
  assert sums == {("all-reduce", (0, 1, 2, 3)): 3 * 5 * 3 * 16 * 4,
                  ("all-gather", (0, 4)): 6 * 16 * 4}


def test_a_program_that_the_cache_on_disk_holds_is_dumped_all_the_same(tmp_path):
  wanted = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0}
  kept = {name: getattr(jax.config, name) for name in wanted}
  try:
    for name, value in wanted.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    rows = jax.NamedSharding(Mesh(np.array(jax.devices()), ("a",)), PartitionSpec("a"))
    program = jax.jit(lambda x: x * (x @ jnp.ones((7, 7)))).lower(
        jax.ShapeDtypeStruct((16, 7), jnp.float32, sharding=rows))
    program.compile(compiler_options={"xla_backend_optimization_level": 0})
    assert any(tmp_path.iterdir())
    _, text = scaling.compile_and_dump(program)
    assert hlo.costs(text).flops == 2 * 2 * 7 * 7  # two rows on each device
  finally:
    for name, value in kept.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_reduction_of_which_each_device_keeps_a_slice_is_a_reduce_scatter():
  mesh = Mesh(np.array(jax.devices()), ("a",))
  whole, rows = (jax.NamedSharding(mesh, PartitionSpec(*s)) for s in ((None, "a"), ("a",)))
  product = jax.jit(lambda x, y: x @ y, out_shardings=rows)
  _, text = scaling.compile_and_dump(product.lower(
      jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=whole),
      jax.ShapeDtypeStruct((64, 24), jnp.float32, sharding=rows)))
  found = hlo.costs(text)
  assert [(c.op, c.payload) for c in found.collectives] == [("reduce-scatter", 32 * 24 * 4)]


def test_elements_of_tuples_may_be_written_without_an_instruction_of_their_own():
  text = """HloModule it
ENTRY %main (p: (s32[], (f32[3,16], f32[16,4]))) -> f32[3,4] {
  %p = (s32[], (f32[3,16]{1,0}, f32[16,4]{1,0})) parameter(0)
  ROOT %dot = f32[3,4]{1,0} dot(%p#1#0, %p#1#1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
  assert hlo.costs(text).flops == 2 * 3 * 16 * 4


@pytest.mark.parametrize("text, group", [
    ("replica_groups={{0,2},{1,3}}", [0, 2]),
    ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
    ("replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}", [0, 1, 2, 3]),
    ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", list(range(8))),
    ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", [0, 4]),
    ("source_target_pairs={{3,1},{1,0}}", [3, 1])])
def test_replica_groups_are_read_in_each_of_their_forms(text, group):
  assert list(hlo.first_group(text)) == group


def test_flops_of_a_compiled_update_are_those_of_its_layers_and_vocabulary():
  # A token of a layer: forward, backward twice that, and all but the last product once more.
  products = 64 * 64 * 2 + 2 * 64 * 64 + 3 * 64 * 128
  scores = 2 * LENGTH * 64
  per_token = 2 * (8 * products - 2 * 64 * 128 + 8 * scores) + 8 * 512 * 64
  rows_on_a_device, micro_batches = 1, 2
  expected = per_token * LENGTH * rows_on_a_device * micro_batches / 2  # halved by tensor=2
  assert compiled((2, 2, 2))["flops"] == pytest.approx(expected, rel=0.02)
  load = model.Load("sft", LENGTH, 1, 2, 128)
  assert model.update_flops(TOY, model.Mesh(2, 2, 2), load) == pytest.approx(expected, rel=1e-6)


def test_parameters_are_those_of_the_model_and_their_shares_those_of_its_shardings():
  job = scaling.Job("toy", model.Mesh(2, 2, 2), model.Load("grpo", LENGTH, 1, 2, 128))
  _, _, state, _ = scaling.abstract_parts(job)
  assert TOY.parameters == sum(x.size for x in jax.tree.leaves(state.params))
  share = sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
              for x in jax.tree.leaves((state.params, state.opt_state, state.reference)))
  assert model.state_bytes(TOY, job.mesh, "grpo") == pytest.approx(share, rel=0.02)


def test_traffic_scaled_to_another_mesh_is_what_that_mesh_compiles_to():
  load = model.Load("sft", LENGTH, 1, 2, 128)
  source = scaling.program_of(scaling.Job("toy", model.Mesh(2, 2, 2), load), compiled((2, 2, 2)))
  scaled = by_axes((t.op, t.axes, t.payload, t.times)
                   for t in model.scale(source, model.Mesh(1, 4, 2), load))
  found = by_axes(compiled((1, 4, 2))["traffic"])
  assert set(scaled) == set(found) == {"fsdp", "tensor"}
  for axes in found:
    assert scaled[axes] == pytest.approx(found[axes], rel=0.15), axes


# -------------------------------------------------------------------------------------- predictions


def test_collectives_take_the_slower_of_the_links_inside_and_outside_of_a_host():
  machine = dataclasses.replace(chips.by_name("H100"), hop_seconds=0, network_hop_seconds=0)
  size = 8e9
  inside = machine.collective_seconds("all-gather", size, list(range(8)))
  assert inside == pytest.approx(size * 7 / 8 / 450e9)
  whole_hosts = machine.collective_seconds("all-gather", size, list(range(32)))
  assert whole_hosts == pytest.approx(max(size * 31 / 32 / 450e9, size * 3 / 4 / (8 * 50e9)))
  one_each = machine.collective_seconds("reduce-scatter", size, [0, 8, 16, 24])
  assert one_each == pytest.approx(size * 3 / 4 / 50e9)
  assert machine.collective_seconds("all-reduce", size, [0, 8]) == pytest.approx(size / 50e9)


def test_decoding_of_few_rows_takes_the_time_to_read_the_weights():
  machine, shape = chips.by_name("H100"), model.SHAPES["8b"]
  step = scaling_decode.decoding(shape, machine, rows=1, tensor=1, context=1)
  assert step.seconds == pytest.approx(7.5e9 * 2 / 3350e9, rel=0.01)  # 8.03e9 less the lookup table
  assert step.bound == "HBM (weights)"
  # A token's cache: 2 x 32 layers x 8 heads x 128 x 2 bytes; read once for 16 samples.
  rows = scaling_decode.decoding(shape, machine, 16, 1, context=1000, shared=1000, samples=16)
  assert rows.cache_bytes * 16 == 1000 * 2 * 32 * 8 * 128 * 2


def test_useful_flops_are_six_per_parameter_and_token_and_causal_attention():
  shape = model.SHAPES["qwen2.5-1.5b"]
  assert shape.parameters == pytest.approx(1.54e9, rel=0.01)  # the published size
  attention = sum(12 * 12 * 128 * 28 * seen for seen in range(1, 1025))
  expected = 1024 * 6 * (1.54e9 - 0.23e6) + attention
  assert model.useful_flops(shape, 1024, 1024) == pytest.approx(expected, rel=0.01)


def test_the_best_mesh_fits_and_covers_the_devices_and_rows():
  traffic = (model.Traffic("all-gather", ("fsdp",), 1e9, 10), model.Traffic(
      "all-reduce", ("tensor",), 1e9, 10), model.Traffic("all-reduce", ("data",), 1e8, 10))
  load = model.Load("sft", 4096, 1, 2)
  programs = {wide: model.Program(mesh, load, 0.0, traffic)
              for wide, mesh in ((False, model.Mesh(2, 4, 1)), (True, model.Mesh(2, 2, 2)))}
  predictor = scaling.Predictor("70b", "sft", 4096, programs)
  assert predictor.best(8, 256, chips.by_name("H100")) is None  # 70.6e9 x 12 bytes on 8 x 80 GB
  row = predictor.best(1024, 256, chips.by_name("H100"))
  assert row["devices"] == 1024 and row["tokens"] == 256 * 4096
  assert row["mesh"]["tensor"] == 4  # 256 rows are too few for more shares
  assert row["memory_bytes"] < 80e9
  assert row["step_s"] >= max(row["compute_s"], row["hbm_s"], row["weights_s"])


def test_a_run_writes_its_report(tmp_path, monkeypatch):
  def at_once(job, timeout):
    wide = job.mesh.tensor > 1
    traffic = [["all-gather", ["fsdp"], 1e6, 8], ["all-reduce", ["data"], 1e5, 8]]
    return {"flops": model.update_flops(TOY, job.mesh, job.load), "argument_bytes": 1,
            "temporary_bytes": 1, "compile_seconds": 0.0,
            "traffic": traffic + [["all-reduce", ["tensor"], 1e5, 8]] * wide}
  monkeypatch.setattr(scaling, "compile_job", at_once)
  picture = tmp_path / "scaling.png"
  scaling.main(["--models=toy", "--length=64", "--rows=16", "--devices=2,8,32", f"--out={tmp_path}",
                f"--picture={picture}", "--budget-seconds=60"])
  result = json.loads((tmp_path / "scaling.json").read_text())
  assert picture.stat().st_size > 10_000
  assert {row["source"] for row in result["scaling"]} == {"compiled"}
  for row in result["scaling"]:
    assert row["mesh"]["data"] * row["mesh"]["fsdp"] * row["mesh"]["tensor"] == row["devices"]
  for row in result["compiled"]:
    assert row["flops_ratio"] == pytest.approx(1)
  text = (tmp_path / "scaling.md").read_text()
  for heading in ("Compiled programs", "Where it stops scaling", "Rollouts"):
    assert f"## {heading}" in text


@pytest.mark.parametrize("flags, message", [
    (["--models=9b"], "9b"), (["--kinds=dpo"], "dpo"), (["--machines=v4"], "links")])
def test_an_unknown_name_is_refused_before_anything_is_compiled(flags, message):
  with pytest.raises(SystemExit, match=message):
    scaling.main(flags)
