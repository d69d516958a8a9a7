"""The training loop: one phase from its first update, or wherever it was stopped, to its last."""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from jaxrl import sharding
from jaxrl.batch import TokenBatch
from jaxrl.batch import Trajectory
from jaxrl.evaluation import policy
from jaxrl.training import machine
from jaxrl.training import processes
from jaxrl.training import stored
from jaxrl.training import streams
from jaxrl.training.checkpoints import Checkpoints
from jaxrl.training.fitting import Fitted
from jaxrl.training.fitting import Fitting
from jaxrl.training.learner import Learner
from jaxrl.training.learner import to_micro_batches
from jaxrl.training.reporting import Reporter
from jaxrl.training.shapes import Shape
from jaxrl.training.shapes import longest_of
from jaxrl.training.state import TrainState
from jaxrl.training.stopping import Stop
from jaxrl.training.stopping import Stopped
from jaxrl.training.supply import Supplied
from jaxrl.training.supply import Supply

DRAWN = ("sampled_sequences", "sampled_tokens")  # metrics of a batch that are logged once, for they are summed
SUPPLY = "supply"  # first part of the names of a supply's arrays in a checkpoint's buffer


class TrainingFailure(RuntimeError):
  """Training cannot go on; the message says why and what is left."""


@dataclasses.dataclass
class Progress:
  """What a checkpoint remembers beside the state: everything on the host that training depends on.

  Attributes:
    phase: index of the phase in `config.phases`.
    updates: updates of all phases so far; the number of a checkpoint.
    supply: position in the data, None before the first batch and after the last.
    shape: rows, row length, sequences and trunk length of the largest batch of the phase in this
      layout; later ones are padded to it, so that a phase soon compiles nothing more.
    fitted: what was decided of later batches, see `fitting.Fitting`; () for the shape of the phase.
    longest: tokens of the longest prompt, response and sequence of the phase.
    updates_left: updates still to be made on the batch in the checkpoint's buffer.
    batch_metrics: what was logged about that batch.
    ended: the phase has reached its last update, or what it was waiting for.
    evaluations: metrics by moment: `start`, and the name of each phase that has ended.
    seconds: time spent by phase, evaluations included.
  """

  phase: int = 0
  updates: int = 0
  supply: dict | None = None
  shape: tuple[int, int, int, int] = (1, 1, 1, 0)
  fitted: Fitted = ()
  longest: tuple[int, int, int] = (0, 0, 0)
  updates_left: int = 0
  batch_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  ended: bool = False
  evaluations: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class PhaseRun:
  """Everything that the loop needs for one phase.

  Attributes:
    name, steps: of the phase.
    supply: gives batches.
    learner: compiled functions.
    updates_per_batch: optimiser updates on each batch.
    shape: of every batch, unless more is needed.
    fitting: finds another shape where that is better, None if there shall be none.
    mesh: where batches go.
    max_bad_steps: updates in a row with a non-finite gradient before the run stops.
    max_logprob_gap: largest difference between sampler and trainer that the first update accepts.
    validate: metrics on validation data for `(state, step)`, None if not wanted.
    validate_every: updates between validations.
    until: metric and bound of validation that end the phase, None to run all steps.
    checkpoint_every, samples_every, curves_every: updates between these; 0 is never.
  """

  name: str
  steps: int
  supply: Supply
  learner: Learner
  updates_per_batch: int
  shape: Shape
  mesh: jax.sharding.Mesh
  max_bad_steps: int
  max_logprob_gap: float
  validate: Callable[[TrainState, int], dict[str, float]] | None
  validate_every: int
  until: tuple[str, float] | None
  checkpoint_every: int
  samples_every: int
  curves_every: int
  fitting: Fitting | None = None

  def now(self, progress: Progress) -> tuple[Shape, Learner]:
    """Shape of the next batch, and the functions for it."""
    if self.fitting:
      return self.fitting.now(progress.fitted, progress.shape)
    return self.shape.at_least(*progress.shape), self.learner


def train(phase: PhaseRun, state: TrainState, progress: Progress,
          buffer: dict[str, np.ndarray] | None, *, reporter: Reporter, checkpoints: Checkpoints,
          stop: Stop | None = None) -> TrainState:
  """Runs a phase to its end, saving on the way; changes `progress` in place.

  Args:
    buffer: arrays of a checkpoint: those of its supply, and with updates left the prepared batch,
      see `to_buffer`.

  Raises:
    TrainingFailure: too many non-finite gradients in a row, or sampler and trainer disagree.
    Stopped: `stop` was asked to; everything up to the last update is saved.
  """
  stop = stop or Stop()
  with stop.after_updates():
    return _train(phase, state, progress, buffer, reporter, checkpoints, stop)


def _train(phase, state, progress, buffer, reporter, checkpoints, stop):
  if progress.supply is not None:
    phase.supply.set_state(stored.put_arrays(progress.supply, buffer or {}))
  batch, learner = None, phase.learner
  if progress.updates_left and not progress.ended:
    own = {name: x for name, x in buffer.items() if not name.startswith(f"{SUPPLY}/")}
    batch = sharding.put_batch(_check_divides(from_buffer(own), phase.mesh), phase.mesh)
    _, learner = phase.now(progress)
  step = int(state.step)
  while step < phase.steps and not progress.ended:
    start = time.perf_counter()
    fresh = batch is None
    if fresh:
      if phase.fitting:
        phase.fitting.begin(progress.fitted, progress.shape)  # while the policy samples
      supplied = phase.supply.next(state.params, step, state.reference)
      shape, learner = phase.now(progress)
      state, batch = _prepare(phase, shape, learner, state, supplied, progress)
      progress.updates_left = phase.updates_per_batch
      if phase.fitting:
        _fit(phase, shape, supplied.trajectories, progress, step, reporter)
      if phase.samples_every and step % phase.samples_every == 0 and phase.supply.sampled:
        _log_samples(phase, batch, supplied, progress.updates + 1, reporter)
    with jax.set_mesh(phase.mesh):
      finish = streams.begin(learner.update, state, batch)
      if progress.updates_left == 1 and step + 1 < phase.steps:
        phase.supply.prefetch()
      state, metrics = finish()
      del finish  # and with it the gradients of all parts
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    machine.keep_memory()
    step, progress.updates = step + 1, progress.updates + 1
    progress.updates_left -= 1
    _check(phase, metrics, step, fresh, checkpoints)
    if not fresh:
      metrics.pop("logprob_gap", None)  # by now the policy has moved; the gap is not an error
    elif progress.batch_metrics.get("staleness"):
      metrics["policy_drift"] = metrics.pop("logprob_gap")  # it had moved before the first update
    metrics |= progress.batch_metrics | _speed(progress.batch_metrics, start)
    progress.batch_metrics = {k: x for k, x in progress.batch_metrics.items() if k not in DRAWN}
    if progress.updates_left == 0:
      batch, progress.batch_metrics = None, {}
    if phase.validate and phase.validate_every and step % phase.validate_every == 0:
      validation = phase.validate(state, step)
      metrics |= {f"validation/{name}": value for name, value in validation.items()}
      if phase.until and validation[phase.until[0]] >= phase.until[1]:
        progress.ended = True
        reporter.note(f"{phase.name}: validation {phase.until[0]} reached "
                      f"{validation[phase.until[0]]:.3f} at update {step}; the phase ends here")
    progress.ended = progress.ended or step == phase.steps
    seconds = time.perf_counter() - start
    progress.seconds[phase.name] = progress.seconds.get(phase.name, 0.0) + seconds
    reporter.step(progress.updates, phase.name, {"phase_step": step, **metrics})
    if phase.curves_every and step % phase.curves_every == 0:
      reporter.draw()
    stopping = stop.agreed(progress.updates)
    if (progress.ended or stopping
        or (phase.checkpoint_every and step % phase.checkpoint_every == 0)):
      progress.supply = None if progress.ended else phase.supply.get_state()
      save(checkpoints, state, progress, batch)
    if stopping:
      checkpoints.wait()
      raise Stopped(f"stopped as asked after update {progress.updates}, whose checkpoint is saved")
  return state


def save(checkpoints: Checkpoints, state: TrainState, progress: Progress,
         batch: TokenBatch | None = None) -> None:
  """Starts a checkpoint of everything that the rest of the run depends on."""
  supply, buffer = stored.take_arrays(progress.supply, SUPPLY)
  if batch is not None:
    buffer |= to_buffer(batch)
  host = dataclasses.asdict(dataclasses.replace(progress, supply=supply))
  checkpoints.save(progress.updates, state, host, buffer or None, force=True)


def to_buffer(batch: TokenBatch) -> dict[str, np.ndarray]:
  """A prepared batch as a flat dict of host arrays."""
  host = sharding.to_host(batch)
  arrays = {}
  for field in dataclasses.fields(host):
    value = getattr(host, field.name)
    if isinstance(value, dict):
      arrays |= {f"{field.name}.{name}": array for name, array in value.items()}
    else:
      arrays[field.name] = np.asarray(value)
  return arrays


def from_buffer(arrays: dict[str, np.ndarray]) -> TokenBatch:
  """The inverse of `to_buffer`."""
  fields: dict[str, Any] = {"signals": {}, "columns": {}}
  for name, array in arrays.items():
    field, _, key = name.partition(".")
    if key:
      fields[field][key] = array
    else:
      fields[field] = array
  for name in ("micro_batch_rows", "longest"):
    fields[name] = int(fields.get(name, 0))  # batches of earlier versions lack some
  return TokenBatch(**fields)


def _check_divides(batch, mesh):
  """A batch from a checkpoint, whose rows are arranged for good."""
  units, devices = len(batch.trunk_lengths), mesh.shape["data"] * mesh.shape["fsdp"]
  if units % devices:
    raise ValueError(
        f"the checkpoint was saved between two updates on one batch, of {units} x "
        f"{batch.rows_per_trunk} rows, which does not divide over data x fsdp = {devices} devices: "
        "continue on a mesh where it does, with --config.mesh.data and --config.mesh.fsdp, until "
        "the next checkpoint")
  return batch


def _prepare(phase, shape, learner, state, supplied: Supplied, progress):
  host = shape.pack(supplied.trajectories)
  progress.shape = (*host.tokens.shape, host.num_sequences, host.trunk_tokens.shape[1])
  progress.batch_metrics = {
      **supplied.metrics, "sequences": len(supplied.trajectories),
      "loss_tokens": int(host.loss_mask.sum()),
      **packing_metrics(supplied.trajectories, host, shape.micro_batch_rows)}
  host = to_micro_batches(host, shape.micro_batch_rows)
  processes.meet(f"the batch of update {progress.updates + 1}", processes.content_of(host))
  with jax.set_mesh(phase.mesh):
    state, batch, metrics = learner.prepare(state, sharding.put_batch(host, phase.mesh))
  progress.batch_metrics |= {name: float(value) for name, value in metrics.items()}
  return state, batch


def _fit(phase, shape, trajectories, progress, step, reporter):
  """Has later batches in another shape, if that is worth it."""
  progress.longest, updates = longest_of(trajectories, progress.longest), phase.updates_per_batch
  found = phase.fitting.look(trajectories, shape.at_least(*progress.shape), longest=progress.longest,
                             batch=step // updates + 1, left=phase.steps - step - updates)
  if found:
    progress.fitted, saved = found
    row, trunk, rows, *_ = progress.fitted
    progress.shape = 1, 1, progress.shape[2], trunk
    sharing = f", {rows} of them beside a prompt" if trunk else " with their prompts"
    reporter.note(f"{phase.name}: responses like these are laid out in rows of {row} tokens{sharing}, from the next "
                  f"batch on; that saves {saved:.0%} of the work")


def packing_metrics(trajectories: list[Trajectory], host: TokenBatch, micro_batch_rows: int) -> dict[str, float]:
  """How much of what is computed is wanted: `tokens` of all sequences, `computed_tokens` without
  padding (fewer where prompts are shared), and their share in the micro-batches in use."""
  in_use = (host.segment_ids != 0).any(axis=1)
  computed = int((host.segment_ids != 0).sum() + host.trunk_lengths.sum())
  units = int(in_use.reshape(-1, host.rows_per_trunk).any(axis=1).sum())
  unit = host.rows_per_trunk * host.tokens.shape[1] + host.trunk_tokens.shape[1]
  together = micro_batch_rows // host.rows_per_trunk
  places = -(-units // together) * together * unit
  return {"tokens": sum(len(t.tokens) for t in trajectories), "computed_tokens": computed,
          "rows": int(in_use.sum()), "row_length": host.tokens.shape[1],
          "packing_efficiency": computed / max(places, 1)}


def _speed(batch_metrics, start):
  seconds = time.perf_counter() - start
  return {"step_seconds": seconds, "tokens_per_second": batch_metrics["tokens"] / seconds}


def _check(phase, metrics, step, fresh, checkpoints):
  last = checkpoints.latest_step()
  left = ("there is no checkpoint yet" if last is None else
          f"the last good checkpoint is that of update {last}")
  if metrics["bad_steps"] >= phase.max_bad_steps:
    raise TrainingFailure(
        f"{phase.name}: loss or gradient was not finite {phase.max_bad_steps} updates in a row, up "
        f"to update {step}; {left}. Lower config.optimizer.learning_rate or "
        "config.optimizer.clip_norm, or look at the newest samples")
  if fresh and step == 1 and metrics.get("logprob_gap", 0.0) > phase.max_logprob_gap:
    raise TrainingFailure(
        f"{phase.name}: sampler and trainer disagree about the log-probability of the same tokens "
        f"by {metrics['logprob_gap']:.3g}, more than config.rollout.max_logprob_gap="
        f"{phase.max_logprob_gap}. With bfloat16 some gap is normal and the bound may be raised; "
        "in float32 this is a bug in a model or sampler setting")


def _log_samples(phase, batch, supplied, updates, reporter):
  host = sharding.to_host(batch)
  ids, mask = host.sequence_ids[host.loss_mask], host.signals["advantages"][host.loss_mask]
  count = np.maximum(np.bincount(ids, minlength=host.num_sequences), 1)
  means = np.bincount(ids, weights=mask, minlength=host.num_sequences) / count
  advantages = [float(a) for a in means[:len(supplied.trajectories)]]
  reporter.samples(phase.name, updates,
                   policy.sample_rows(supplied.trajectories, supplied.tasks,
                                      advantage=advantages))
