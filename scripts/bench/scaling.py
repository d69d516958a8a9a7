"""How far updates and rollouts of an 8B and a 70B model scale, and what stops them.

  python scripts/bench/scaling.py

compiles the real `Learner.update` (and `prepare`, for the reference of GRPO) of Llama-3-8B and -70B
shapes ahead of time on virtual CPU devices, without allocating an array: scanned and fully
rematerialised layers, bfloat16 activations, float32 parameters and Adam. From each program it takes
the bytes per device (XLA's memory analysis), the collectives (bytes over all runs of every loop, by
mesh axis) and the FLOPs. Other meshes are scaled from the compiled ones (`scaling_model.py`); each
row of the report says which it is, and compiled rows carry the ratio of scaled to compiled.

Step times are rooflines: what v5p and H100 could do at their peaks (`chips.py` has the figures
and their sources), not measurements. They assume fused attention, that collectives of weights and
gradients run beside the compute, and that those of activations do not; columns show a step without
anything side by side, and one with attention scores in memory. On TPU, device ids that are
neighbours share a dimension of the torus; on GPU, eight neighbours share a host.

The program is taken as XLA partitioned it, before the CPU's own passes (which make float32 of
bfloat16). The temporary bytes are those of the CPU's buffers, usually more than a TPU or GPU needs;
an estimate from the shapes stands beside them.

Writes results/bench/scaling.json, results/bench/scaling.md and docs/scaling.png. Two meshes of each
model and kind of update are always compiled, more until `--budget-seconds` are spent.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from jaxrl import chips
import hlo
import scaling_decode as decode
import scaling_model as model
import scaling_report as report

ROOT = pathlib.Path(__file__).parents[2]
KINDS = ("sft", "grpo")
REFERENCES = (model.Mesh(2, 4, 1), model.Mesh(2, 2, 2))  # scaled to others without and with tensor
DECODING_ROWS = (8, 32, 128, 256, 512)


def arguments() -> argparse.ArgumentParser:
  """Flags of this script."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--models", default="8b,70b", help=f"of {', '.join(model.SHAPES)}")
  parser.add_argument("--kinds", default="sft,grpo", help="updates to analyse")
  parser.add_argument("--machines", default="v5p,H100", help="rooflines to predict for")
  parser.add_argument("--length", type=int, default=4096, help="tokens of a packed row")
  parser.add_argument("--rows", type=int, default=256, help="rows of an update, strong scaling")
  parser.add_argument("--rows-per-device", type=int, default=1, help="the same, weak scaling")
  parser.add_argument("--prompt", type=int, default=512, help="tokens, in rollouts")
  parser.add_argument("--response", type=int, default=1024, help="tokens, in rollouts")
  parser.add_argument("--samples", type=int, default=16, help="per prompt, in rollouts")
  parser.add_argument("--devices", default="8,16,32,64,128,256,512,1024", help="numbers of devices")
  parser.add_argument("--budget-seconds", type=float, default=480.0, help="for compilations")
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "bench")
  parser.add_argument("--picture", type=pathlib.Path, default=ROOT / "docs" / "scaling.png")
  parser.add_argument("--child", help=argparse.SUPPRESS)
  return parser


# ------------------------------------------------------------------- one compilation, in a process


@dataclasses.dataclass(frozen=True)
class Job:
  """What a child process compiles."""

  name: str
  mesh: model.Mesh
  load: model.Load


def compile_job(job: Job, timeout: float) -> dict | None:
  """Compiles in a process with as many virtual devices as the mesh has; None if it is too slow.

  Raises:
    RuntimeError: the compilation failed; ends with what it printed.
  """
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2",
                 "XLA_FLAGS": f"--xla_force_host_platform_device_count={job.mesh.size}"}
  command = [sys.executable, __file__, "--child", json.dumps(dataclasses.asdict(job))]
  try:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
  except subprocess.TimeoutExpired:
    return None
  if done.returncode:
    raise RuntimeError(f"{job.name} {job.load.kind} on {job.mesh}:\n{done.stderr[-3000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def child(job: Job) -> dict:
  """Compiles and counts; runs in the process that `compile_job` starts."""
  from jaxrl import sharding  # imports JAX, whose devices the environment has decided
  from jaxrl.training import learner
  import jax

  began = time.perf_counter()
  parts, phase, state, batch = abstract_parts(job)
  functions = learner.make_learner(dataclasses.replace(phase.learning, streams=1),
                                   jax.tree.map(lambda x: x.sharding, state))
  found = collections.Counter()
  traffic = collections.defaultdict(lambda: [0.0, 0.0])
  with jax.set_mesh(parts.mesh):
    _, prepared, _ = jax.eval_shape(functions.prepare, state, batch)
    prepared = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), prepared,
        sharding.batch_sharding(parts.mesh)(prepared))
    programs = {"update": functions.update.lower(state, prepared)}
    if job.load.kind == "grpo":
      programs["prepare"] = functions.signals.lower(state, batch)
    for name, lowered in programs.items():
      compiled, text = compile_and_dump(lowered)
      counted = hlo.costs(text, dynamic_trips=job.load.micro_batches)
      memory = compiled.memory_analysis()
      found["flops"] += counted.flops
      if name == "update":
        found["argument_bytes"] = memory.argument_size_in_bytes
        found["temporary_bytes"] = memory.temp_size_in_bytes
      for c in counted.collectives:
        sums = traffic[c.op, job.mesh.axes_of(c.group)]
        sums[0] += c.payload * c.times
        sums[1] += c.times
  return {**found, "traffic": [[op, axes, *sums] for (op, axes), sums in sorted(traffic.items())],
          "compile_seconds": time.perf_counter() - began}


def abstract_parts(job: Job):
  """A run's parts, phase, abstract state and abstract batch."""
  from jaxrl import batch as batches
  from jaxrl import sharding
  from jaxrl.training import builders
  from jaxrl.training import learner
  import jax
  import phases

  rows = job.load.rows * job.mesh.data * job.mesh.fsdp
  parts, phase = phases.build(model.SHAPES[job.name], job.load.kind, {
      "mesh": dataclasses.asdict(job.mesh),
      "batch": dict(row_length=job.load.length, micro_batch_rows=rows, share_prompts=False,
                    vocabulary_chunk=job.load.chunk),
      "model": dict(scan_layers=True, remat="full", dtype="bfloat16", rope_theta=500_000.0)})
  count = rows * job.load.micro_batches
  batch = learner.to_micro_batches(batches.pack(
      [], row_length=job.load.length, rows_multiple=rows, min_rows=count,
      min_sequences=4 * count), rows)
  batch = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch,
                       sharding.batch_sharding(parts.mesh)(batch))
  return parts, phase, builders.abstract_state(parts, phase), batch


@contextlib.contextmanager
def compiling_anew():
  """No program is read from JAX's cache on disk: of those, XLA dumps nothing but the last text."""
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  kept = jax.config.jax_enable_compilation_cache
  try:
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether there is one is asked once
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", kept)
    compilation_cache.reset_cache()


def compile_and_dump(lowered) -> tuple:
  """The compiled program, and its HLO text right after it was partitioned."""
  with tempfile.TemporaryDirectory() as directory, compiling_anew():
    compiled = lowered.compile(compiler_options={
        "xla_dump_to": directory, "xla_dump_hlo_pass_re": "spmd-partitioning",
        "xla_backend_optimization_level": 0})  # of machine code, which never runs
    dumps = sorted(pathlib.Path(directory).glob("*after_spmd-partitioning*.txt"))
    if not dumps:
      raise RuntimeError("XLA wrote no module after the pass spmd-partitioning; it has "
                         f"{sorted(p.name for p in pathlib.Path(directory).glob('*.txt'))}")
    return compiled, dumps[-1].read_text()


# -------------------------------------------------------------------------------------- predictions


class Predictor:
  """Best meshes and their times for one model and kind of update, from its compiled programs."""

  def __init__(self, name: str, kind: str, length: int, programs: dict[bool, model.Program]):
    self.name, self.kind, self.length = name, kind, length
    self.shape = model.SHAPES[name]
    self._programs = programs  # by whether `tensor` is more than 1

  def traffic(self, mesh: model.Mesh, load: model.Load) -> tuple[model.Traffic, ...]:
    """Collectives of an update on any mesh."""
    return model.scale(self._programs[mesh.tensor > 1], mesh, load)

  def memory(self, mesh: model.Mesh, load: model.Load, *, scores: bool = False) -> float:
    """Bytes per device, state included; an estimate."""
    return (model.state_bytes(self.shape, mesh, self.kind)
            + model.working_bytes(self.shape, mesh, load, scores=scores))

  def best(self, devices: int, rows: int, machine: chips.Machine) -> dict | None:
    """The fastest mesh that fits the memory, as a row; None if none fits or divides the rows."""
    found = []
    for mesh, (at_once, count) in model.meshes(devices, self.shape, rows):
      load = model.Load(self.kind, self.length, at_once, count)
      if self.memory(mesh, load) < 0.9 * machine.hbm_bytes:
        found.append(self.row(mesh, load, machine))
    return min(found, key=lambda row: (row["step_s"], row["serial_s"]), default=None)

  def row(self, mesh: model.Mesh, load: model.Load, machine: chips.Machine) -> dict:
    """Predicted figures of one mesh on one machine."""
    traffic = self.traffic(mesh, load)
    t = model.times(self.shape, mesh, load, traffic, machine)
    stored = model.times(self.shape, mesh, load, traffic, machine, scores=True)
    tokens = load.tokens(mesh)
    useful = model.useful_flops(self.shape, self.length, tokens)
    return {
        "model": self.name, "kind": self.kind, "machine": machine.name, "devices": mesh.size,
        "mesh": dataclasses.asdict(mesh), "load": dataclasses.asdict(load), "tokens": tokens,
        "memory_bytes": self.memory(mesh, load),
        "memory_with_scores_bytes": self.memory(mesh, load, scores=True),
        "collective_bytes": {axis: sum(x.payload for x in traffic if "+".join(x.axes) == axis)
                             for axis in sorted({"+".join(x.axes) for x in traffic})},
        "compute_s": t.compute, "hbm_s": t.memory, "weights_s": t.weights, "tensor_s": t.tensor,
        "step_s": t.step, "serial_s": t.serial, "step_with_scores_s": stored.step,
        "bound": t.bound,
        "mfu_at_most": useful / (t.step * mesh.size * machine.flops)}


def strong_and_weak(predictor: Predictor, machine: chips.Machine, devices: list[int], rows: int,
                    rows_per_device: int) -> dict[str, list[dict]]:
  """Best meshes for a fixed update and for one that grows, with efficiencies against the first."""
  found = {"strong": [predictor.best(n, rows, machine) for n in devices],
           "weak": [predictor.best(n, n * rows_per_device, machine) for n in devices]}
  for kind, series in found.items():
    found[kind] = series = [row for row in series if row]
    for row in series:
      def rate(row, seconds):
        return row["tokens"] / (row[seconds] * row["devices"])
      best = rate(series[0], "step_s")
      row.update(scaling=kind, efficiency=rate(row, "step_s") / best,
                 serial_efficiency=rate(row, "serial_s") / best)
  return found


def apart_or_together(predictor: Predictor, machine: chips.Machine, devices: int, rows: int,
                      work: decode.Rollouts) -> dict | None:
  """A GRPO step on all devices in turn, against samplers and trainers on devices of their own."""
  shape = predictor.shape
  training = predictor.best(devices, rows, machine)
  sampling, tensor = decode.rollout_seconds(shape, machine, devices, work)
  if training is None or not tensor:
    return None
  gather = machine.collective_seconds("all-gather", 2 * shape.parameters / tensor,
                                      list(range(0, devices, tensor)))
  options = []
  for trainers in (devices // 8, devices // 4, devices // 2):
    trained = predictor.best(trainers, rows, machine) if trainers else None
    sampled, tensor_apart = decode.rollout_seconds(shape, machine, devices - trainers, work)
    if trained and tensor_apart:
      moved = decode.transfer_seconds(shape, machine, trainers, devices - trainers, tensor_apart)
      options.append({"trainers": trainers, "moving_s": moved,
                      "apart_s": max(trained["step_s"], sampled) + moved})
  best = min(options, key=lambda o: o["apart_s"], default={})
  return {"model": predictor.name, "machine": machine.name, "devices": devices,
          "sampling_s": sampling, "sampling_tensor": tensor, "training_s": training["step_s"],
          "gathering_s": gather, "together_s": sampling + training["step_s"] + gather, **best}


# ------------------------------------------------------------------------------------------- main


class Compiler:
  """Compiles while there is time, and keeps what was found."""

  def __init__(self, budget: float):
    self._end = time.monotonic() + budget
    self.rows: dict[Job, dict] = {}

  def run(self, job: Job, needed: bool = False) -> dict | None:
    """The figures of a compilation; None if there is no time left for it."""
    if job not in self.rows:
      left = self._end - time.monotonic()
      if left < 20 and not needed:
        return None
      found = compile_job(job, 600 if needed else left)
      if found is None:
        print(f"  {job.name} {job.load.kind} {job.mesh}: out of time", flush=True)
        return None
      seconds = found["compile_seconds"]
      print(f"  {job.name} {job.load.kind} {job.mesh}: {seconds:.0f} s", flush=True)
      self.rows[job] = found
    return self.rows[job]


def program_of(job: Job, found: dict) -> model.Program:
  """A compiled update, to scale from."""
  traffic = tuple(model.Traffic(op, tuple(axes), payload, times)
                  for op, axes, payload, times in found["traffic"])
  return model.Program(job.mesh, job.load, found["flops"], traffic)


def compiled_row(job: Job, found: dict, predictor: Predictor) -> dict:
  """A compiled mesh beside what the model says of it."""
  by_axes = collections.Counter()
  for _, axes, payload, _ in found["traffic"]:
    by_axes["+".join(axes)] += payload
  scaled = collections.Counter()
  for t in predictor.traffic(job.mesh, job.load):
    scaled["+".join(t.axes)] += t.payload
  flops = model.update_flops(predictor.shape, job.mesh, job.load)
  state = model.state_bytes(predictor.shape, job.mesh, predictor.kind)
  working = model.working_bytes(predictor.shape, job.mesh, job.load, scores=True)
  return {
      "model": job.name, "kind": job.load.kind, "devices": job.mesh.size,
      "mesh": dataclasses.asdict(job.mesh), "load": dataclasses.asdict(job.load),
      "argument_bytes": found["argument_bytes"], "temporary_bytes": found["temporary_bytes"],
      "state_estimate": state, "working_estimate": working,
      "flops": found["flops"], "flops_ratio": flops / found["flops"],
      "collective_bytes": dict(by_axes), "scaled_bytes": dict(scaled),
      "collective_ratio": sum(scaled.values()) / max(sum(by_axes.values()), 1),
      "compile_seconds": found["compile_seconds"]}


def main(argv: list[str] | None = None) -> dict:
  """Compiles, predicts, writes the report; returns what the JSON file holds."""
  args = arguments().parse_args(argv)
  if args.child:
    spec = json.loads(args.child)
    print(json.dumps(child(Job(spec["name"], model.Mesh(**spec["mesh"]),
                               model.Load(**spec["load"])))))
    return {}
  began = time.monotonic()
  machines = checked_machines(args)
  compiler, predictors = Compiler(args.budget_seconds), {}
  for name in args.models.split(","):
    for kind in args.kinds.split(","):
      jobs = [Job(name, mesh, model.Load(kind, args.length, 1, 2)) for mesh in REFERENCES]
      programs = {j.mesh.tensor > 1: program_of(j, compiler.run(j, needed=True)) for j in jobs}
      predictors[name, kind] = Predictor(name, kind, args.length, programs)
  devices = [int(n) for n in args.devices.split(",")]
  rows = [row for predictor in predictors.values() for machine in machines
          for series in strong_and_weak(predictor, machine, devices, args.rows,
                                        args.rows_per_device).values() for row in series]
  # Where scaled figures are furthest from what they were scaled from, they are checked first.
  for row in sorted(rows, key=lambda r: (-r["devices"], r["scaling"], r["kind"] != "sft")):
    compiler.run(job_of(row))
  for row in rows:
    row["source"] = "compiled" if job_of(row) in compiler.rows else "scaled"
  result = {
      "settings": {k: v for k, v in vars(args).items() if k not in ("child", "out", "picture")},
      "machines": [dataclasses.asdict(machine) for machine in machines],
      "compiled": [compiled_row(job, found, predictors[job.name, job.load.kind])
                   for job, found in compiler.rows.items()],
      "scaling": rows, **rollouts(args, machines, devices, predictors)}
  result["seconds"] = time.monotonic() - began
  report.write(result, args.out, args.picture)
  return result


def checked_machines(args: argparse.Namespace) -> list[chips.Machine]:
  """The machines of a call, after its names were checked."""
  names, kinds = args.models.split(","), args.kinds.split(",")
  if unknown := [n for n in names if n not in model.SHAPES] + [k for k in kinds if k not in KINDS]:
    raise SystemExit(f"unknown {', '.join(unknown)}: --models are of {', '.join(model.SHAPES)}, "
                     f"--kinds of {', '.join(KINDS)}")
  machines = [chips.by_name(name) for name in args.machines.split(",")]
  if unlinked := [machine.name for machine in machines if not machine.link_rate]:
    raise SystemExit(f"--machines {', '.join(unlinked)}: chips.py has no figures of their links")
  return machines


def job_of(row: dict) -> Job:
  """What compiles a predicted row."""
  return Job(row["model"], model.Mesh(**row["mesh"]), model.Load(**row["load"]))


def rollouts(args: argparse.Namespace, machines: list[chips.Machine], devices: list[int],
             predictors: dict[tuple[str, str], Predictor]) -> dict[str, list[dict]]:
  """Bounds of decoding, and of whole GRPO steps on shared and on divided devices."""
  names = args.models.split(",")
  sequences = max(args.rows * args.length // (args.prompt + args.response), 1)
  work = decode.Rollouts(sequences, args.prompt, args.response, args.samples)
  decoding = [
      {"model": name, "machine": machine.name, **dataclasses.asdict(decode.decoding(
          model.SHAPES[name], machine, rows, tensor, args.prompt + args.response // 2, args.prompt,
          args.samples))}
      for name in names for machine in machines for tensor in (1, 2, 4, 8)
      for rows in DECODING_ROWS]
  steps = [apart_or_together(predictors[name, "grpo"], machine, n, args.rows, work)
           for name in names if (name, "grpo") in predictors for machine in machines
           for n in devices]
  return {"decoding": decoding, "steps": [step for step in steps if step]}


if __name__ == "__main__":
  main()
