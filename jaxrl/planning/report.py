"""A plan as text: bytes per device, FLOPs, whether it fits, and what to change if not."""

from collections.abc import Iterator

from jaxrl import chips
from jaxrl.planning.phases import PhasePlan, Plan
from jaxrl.training.optimizers import OF_MOMENTS

GB, MB = 1e9, 1e6
OF_OPTIMIZER = ("optimiser", "float32 master")
TIGHT = 0.9  # of the memory, above which a plan is called tight: allocators leave gaps


def text(plan: Plan) -> str:
  """All of it, for a terminal."""
  limit = plan.target.memory_bytes
  axes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
  count = len(plan.target.devices)
  each = f" with {limit / GB:.1f} GB for programs{' on each' * (count > 1)}" if limit else ""
  lines = [f"plan for {plan.target.name}: {count} {plan.target.platform} device{'s' * (count > 1)}{each}, "
           f"mesh {axes}",
           f"{plan.parameters / 1e6:,.1f} M parameters, {plan.decoder.param_dtype}, computed in "
           f"{plan.decoder.dtype}; nothing was allocated, compiled by {plan.compiler} in {plan.seconds:.0f} s"]
  lines += [f"note: {note}" for note in plan.notes]
  for phase in plan.phases:
    lines += ["", *_phase(phase, plan)]
  return "\n".join([*lines, "", *_verdict(plan)])


def _phase(phase: PhasePlan, plan: Plan) -> Iterator[str]:
  head = f"phase {phase.name} ({phase.kind})"
  if phase.shape:
    layout = phase.shape.layout
    trunk = f", trunks of {layout.trunk_length} for {layout.rows_per_trunk}" if layout.trunk_length else ""
    rows = phase.micro_batches * phase.shape.micro_batch_rows
    head += (f": {rows} rows of {layout.row_length} tokens{trunk}, {phase.shape.micro_batch_rows} at a time")
  yield head
  unit = GB if plan.worst.peak >= GB / 10 else MB
  yield f"  {'GB' if unit == GB else 'MB'} on each device"

  def line(name, size, remark=""):
    return f"    {name:26s}{size / unit:9.3f}{'   ' * bool(remark)}{remark}"
  for name, size in phase.held.items():
    if size:
      yield line(name, size)
  for name, size in phase.host.items():
    yield line(name, size, "in host memory, beside the device's")
  if phase.update:
    yield line("gradients", phase.gradients)
    yield line("activations of an update", phase.activations)
    yield line("peak of an update", phase.update_peak, "more than there is" * phase.update.refused)
  s = phase.sampling
  if s:
    if s.weights:
      yield line("weights for sampling", s.weights)
    yield line("KV cache", s.cache, f"{s.what}: {s.rows} samples, {s.prompt} + {s.tokens} tokens")
    yield line("activations of sampling", s.program.added)
    yield line("peak of sampling", phase.sampling_peak, "more than there is" * s.program.refused
                or "on devices of its own" * phase.apart)
  if phase.flops:
    yield f"  FLOPs of a step, all devices: {phase.flops:.3g}{_parts_of(phase)}{_seconds(phase, plan)}"


def _parts_of(phase):
  update, signals = (p.flops if p else 0.0 for p in (phase.update, phase.signals))
  parts = {"sampling": phase.rollout_flops, "signals before updates": signals,
           f"{phase.updates} update{'s' * (phase.updates > 1)}": phase.updates * update}
  return " (" + ", ".join(f"{name} {size:.3g}" for name, size in parts.items() if size) + ")"


def _seconds(phase, plan):
  """Least seconds at the peak of the chips, where their figures are known."""
  try:
    machine = chips.by_name(plan.target.name.partition("-")[0])
  except ValueError:
    return ""
  least = phase.flops / machine.flops / len(plan.target.devices)
  return f"; {least:.3g} s at least, at {machine.flops / 1e12:.0f} TFLOP/s on each"


def _verdict(plan):
  limit, worst = plan.target.memory_bytes, plan.worst
  peak = plan.needed(worst)
  if limit is None:
    return [f"{peak / GB:.3g} GB on each device at the peak, in phase {worst.name}; --plan=NAME compares "
            "that with the memory of a machine"]
  share = f"{peak / GB:.3g} of {limit / GB:.3g} GB on each device at the peak ({peak / limit:.0%}), "
  if plan.fits:
    tight = ", which is tight" * (peak > TIGHT * limit)
    return [f"fits: {share}in phase {worst.name}{tight}"]
  return [f"does not fit: {share}in phase {worst.name}", *(f"  {line}" for line in remedies(plan))]


def remedies(plan: Plan) -> list[str]:
  """What to change, what saves most first."""
  phase, limit, decoder = plan.worst, plan.target.memory_bytes or 0.0, plan.decoder
  pieces = plan.mesh["fsdp"] * plan.mesh["tensor"]
  found = {}
  spread = sum(phase.held.get(name, 0.0) for name in ("parameters", *OF_OPTIMIZER, "frozen models"))
  if plan.mesh["data"] > 1:
    found[f"--config.mesh.fsdp={plan.mesh['fsdp'] * plan.mesh['data']} divides parameters over all devices"] = (
        (spread + phase.gradients) * (1 - 1 / plan.mesh["data"]))
  elif spread + phase.gradients > limit:
    needed = -(-(spread + phase.gradients) * pieces // limit)
    found[f"parameters, optimiser and gradients alone need {needed:.0f} such devices, and a larger "
          "--config.mesh.fsdp"] = spread
  if phase.held["optimiser"] > 1.5 * phase.held["parameters"]:
    found["--config.optimizer.name=adafactor keeps no moments of the size of the parameters, lion one"] = (
        phase.held["optimiser"])
  if decoder.param_dtype == "float32":
    found["--config.model.param_dtype=bfloat16 halves parameters and optimiser (small steps are lost "
          "below 1/512 of a weight; --config.optimizer.master_dtype=float32 keeps them, and moments as they "
          "are, at 4 bytes a parameter, which an offload takes off the device)"] = spread / 2
  found |= _of_optimizer(phase, plan)
  found |= _of_update(phase, plan) if phase.update_peak >= phase.sampling_peak else _of_sampling(phase)
  return [line for line, _ in sorted(found.items(), key=lambda item: -item[1])]


def _of_optimizer(phase, plan):
  found, moments = {}, phase.held["optimiser"]
  exact = plan.decoder.param_dtype == "float32" or phase.held["float32 master"]
  if phase.optimizer["name"] in OF_MOMENTS and not phase.optimizer["moments_dtype"] and exact and moments:
    found["--config.optimizer.moments_dtype=bfloat16 halves the first moment"] = (
        moments / (4 if phase.optimizer["name"] == "adamw" else 2))
  state = sum(phase.held[name] for name in OF_OPTIMIZER)
  if state and plan.target.platform != "cpu" and not phase.optimizer["offload"]:
    # It is on the device while it is updated, beside the gradient.
    least = max(phase.update_peak - state, phase.kept + phase.gradient, phase.sampling_peak - state)
    found["--config.optimizer.offload=True keeps the optimiser in host memory between updates, which wait for "
          "it"] = phase.peak - least
  return {line: saved for line, saved in found.items() if saved > 0}


def _of_update(phase, plan):
  shape, found, shares = phase.shape, {}, plan.mesh["data"] * plan.mesh["fsdp"]
  least = shares * shape.layout.rows_per_trunk
  if shape.micro_batch_rows > least:
    found[f"--config.batch.micro_batch_rows={max(least, shape.micro_batch_rows // 2 // least * least)} "
          "computes fewer rows at a time"] = phase.activations / 2
  if plan.decoder.remat != "full":
    found["--config.model.remat=full keeps no activations within layers"] = phase.activations / 2
  if not plan.decoder.scan_layers:
    found["--config.model.scan_layers=True has layers share their buffers"] = phase.activations / 4
  if phase.held["frozen models"]:
    found["an objective without kl, or with the policy's own old log-probabilities, keeps no reference"] = (
        phase.held["frozen models"])
  return found


def _of_sampling(phase):
  s = phase.sampling
  return {f"--config.rollout.max_rows={max(1, s.rows // 2)} draws fewer samples at a time":
          (s.cache + s.program.added) / 2,
          "--config.rollout.cache_dtype=int8 halves a cache of bfloat16": s.cache / 2}
