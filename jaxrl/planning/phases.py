"""The plan of a run: `jaxrl run --plan`.

It builds the phases of a config as the run does, with the same shapes of batches and the same calls of the
sampler, and compiles their programs for abstract arrays. Bytes of parameters, optimiser, frozen models,
gradients, batches and caches are those of the arrays and their shardings; all that is temporary is what
the compiler says. FLOPs are those of matrix products in the traced programs.

The compiler is that of the devices where they are here. For TPUs that are not, it is their own where
`libtpu` is installed; for other machines it is XLA's for as many virtual CPU devices, whose temporary
arrays stand for theirs: they hold scores of attention, which a fused kernel does not, and float32 copies of
bfloat16 caches and weights. They hold nothing of what an offloaded optimiser fetches, so that an update is
taken to need that and a gradient at least. `scripts/bench/plan.py` compares plans with runs on a CPU:
of models of 19 and 69 M parameters, supervised tuning took 961 and 2,809 MB, planned as 0.99 and 1.06 of
that, and GRPO 625 and 2,328 MB, planned as 1.20 and 1.07 (results/bench/plan.md).
"""

from collections.abc import Mapping
import dataclasses
import pathlib
import tempfile
import time
from typing import Any

import jax
import ml_collections

from jaxrl import chips
from jaxrl import sharding
from jaxrl.models import DecoderConfig
from jaxrl.models import pretrained
from jaxrl.planning import programs
from jaxrl.planning import sampling
from jaxrl.planning.programs import Program
from jaxrl.training import inputs
from jaxrl.training import master
from jaxrl.training import phases as phase_lib
from jaxrl.training import pieces
from jaxrl.training import refusals
from jaxrl.training import sources
from jaxrl.training import transfer
from jaxrl.training.shapes import PAIRED
from jaxrl.training.shapes import Shape


@dataclasses.dataclass(frozen=True)
class PhasePlan:
  """A phase: bytes on one device, FLOPs over all.

  Attributes:
    name, kind: of the phase.
    shape: of its batches; None where it makes no updates.
    micro_batches: of the largest batch that is expected.
    held: bytes by name of all that stays: parameters, optimiser, its master of them, frozen models, batch,
      and copies for sampling ahead.
    host: likewise of what stays in host memory, for each device.
    gradient, gradients: bytes of one; of their sum over micro-batches and of those of the next; float32.
    optimizer: `config.optimizer` of the phase.
    update: an update, gradients included.
    signals: what runs once for each batch: frozen models, the policy as it was, and credit.
    updates: on each batch.
    sampling: its largest calls; None where nothing is sampled.
    rollout_flops: of the samples of a batch, all at full length.
    apart: samples are drawn on devices of their own.
  """

  name: str
  kind: str
  shape: Shape | None
  micro_batches: int
  held: dict[str, float]
  host: dict[str, float]
  gradient: float
  gradients: float
  optimizer: Mapping[str, Any]
  update: Program | None
  signals: Program | None
  updates: int
  sampling: sampling.Sampling | None
  rollout_flops: float
  apart: bool

  @property
  def kept(self) -> float:
    """Bytes of all that stays."""
    return sum(self.held.values())

  @property
  def activations(self) -> float:
    """Bytes that an update needs beside what stays and the gradients."""
    return max(self.update.added - self.gradients, 0.0) if self.update else 0.0

  @property
  def update_peak(self) -> float:
    """Bytes while an update, or what comes before it, runs."""
    return self.kept + max([self.fetching, *(p.added for p in (self.update, self.signals) if p)])

  @property
  def fetching(self) -> float:
    """Bytes of what an optimiser fetches from host memory, with the gradient."""
    return self.gradient + sum(self.host.values()) if self.update and self.host else 0.0

  @property
  def sampling_peak(self) -> float:
    """Bytes while samples are drawn; without the batch, which is made of them."""
    if self.sampling is None:
      return 0.0
    kept = self.held["parameters"] if self.apart else self.kept - self.held.get("batch", 0.0)
    return kept + self.sampling.bytes

  @property
  def peak(self) -> float:
    """The larger of both, on one device."""
    return max(self.update_peak, self.sampling_peak)

  @property
  def refused(self) -> bool:
    """The compiler found that something does not fit."""
    return any(p.refused for p in (self.update, self.signals, self.sampling and self.sampling.program) if p)

  @property
  def flops(self) -> float:
    """Of a batch: samples, signals, and all updates on it."""
    update, signals = (p.flops if p else 0.0 for p in (self.update, self.signals))
    return self.rollout_flops + signals + self.updates * update


@dataclasses.dataclass(frozen=True)
class Plan:
  """Of a run.

  Attributes:
    target: the machine.
    mesh: sizes of its axes.
    decoder: the model.
    parameters: how many it has.
    phases: in order.
    notes: what was taken for granted.
    compiler: whose figures the temporary bytes are.
    seconds: that planning took.
  """

  target: chips.Target
  mesh: dict[str, int]
  decoder: DecoderConfig
  parameters: int
  phases: list[PhasePlan]
  notes: list[str]
  compiler: str
  seconds: float

  @property
  def worst(self) -> PhasePlan:
    """The phase that needs most."""
    return max(self.phases, key=lambda phase: (phase.refused, self.needed(phase)))

  def needed(self, phase: PhasePlan) -> float:
    """Bytes at the peak of a phase, of the memory of one device: that of a CPU is its host's."""
    shared = self.target.platform == "cpu" and self.target.memory_bytes is not None
    return phase.peak + shared * sum(phase.host.values())

  @property
  def fits(self) -> bool | None:
    """Whether all phases fit the memory; None if that is unknown."""
    limit = self.target.memory_bytes
    return None if limit is None else not self.worst.refused and self.needed(self.worst) <= limit


def plan(config: ml_collections.ConfigDict, target: chips.Target, workdir: pathlib.Path | None = None) -> Plan:
  """Plans the phases of a config on a machine; computes nothing and writes nothing.

  Data, tokenizer and config.json that are not at hand are done without, as far as the config says what
  they would have: `data.max_prompt_tokens` and, for a model, its shape.

  Args:
    workdir: of a run that has begun, whose tokenizer and source are then used.

  Raises:
    ValueError: what a run would refuse, or what has to be known and is not.
  """
  began, notes = time.perf_counter(), []
  with chips.assume(target), tempfile.TemporaryDirectory() as scratch:
    place = workdir if workdir and (workdir / "config.json").exists() else pathlib.Path(scratch)
    config = _with_shape(config, place, notes)
    mesh, sampling_mesh = transfer.make_meshes(config.mesh)
    source, tokenizer = _data(config, place, notes)
    decoder, phases = phase_lib.make_phases(config, mesh, sampling_mesh, tokenizer)
    for phase in phases:
      refusals.check_phase(phase, mesh, [None], [None])  # taken to have problems held out
    sizes = _sizes(config, phases, source, tokenizer)
    planners = {m: sampling.Planner(config, decoder, m) for m in (mesh, sampling_mesh)}
    found = [_phase(config, phase, sizes[phase.name], mesh, planners,
                    sampling_mesh if pieces.samples_ahead(phase) else mesh) for phase in phases]
  state = phase_lib.state_of(phases[0].learning, mesh)
  return Plan(target, dict(mesh.shape), decoder, sum(x.size for x in jax.tree.leaves(state.params)), found,
              notes, _compiler(mesh, target), time.perf_counter() - began)


def _compiler(mesh, target):
  used = mesh.devices.flat[0].platform
  name = {"cpu": "XLA for CPUs"}.get(used, f"that of {used.upper()}s")
  return name if used == target.platform else f"{name}, in place of that of {target.platform.upper()}s"


def _phase(config, phase, sizes, mesh, planners, sampling_mesh):
  state = phase_lib.state_of(phase.learning, mesh)
  moments, copy = master.split(state.opt_state)
  trees = {"parameters": state.params, "optimiser": moments, "float32 master": copy,
           "frozen models": (state.frozen, state.others)}
  held = {name: sharding.bytes_of(tree) for name, tree in trees.items()}
  host = {name: size for name, tree in trees.items() if (size := sharding.bytes_of(tree, on_host=True))}
  gradient = phase_lib.gradient_bytes(phase.learning, state)
  shape, count, gradients, update, signals = None, 0, 0.0, None, None
  if phase.kind != "evaluate":
    shape = phase_lib.make_shape(phase, phase.learning.decoder, mesh, *sizes)
    rehearsal = phase_lib.rehearsal(phase, mesh, shape)
    count = rehearsal.batch.tokens.shape[0] // shape.micro_batch_rows
    streams = min(phase.learning.streams, count)
    gradients = gradient * (2 if count > streams else 1) * streams
    held["batch"] = sharding.bytes_of(rehearsal.batch)
    with jax.set_mesh(mesh):
      signals, update = (
          programs.measure(traced, trips=count, streams=streams)
          for traced in (rehearsal.signals, rehearsal.update))
  if pieces.samples_ahead(phase):
    copies = sharding.bytes_of(state.params) * (phase.settings.rollout.staleness + 1)
    held["copies that sample"] = copies * (sampling_mesh is mesh)
  prompt = max(sizes[0], default=config.data.max_prompt_tokens or 1)
  if phase.kind in PAIRED:  # sizes are those of pairs
    prompt = min(prompt, config.data.max_prompt_tokens or prompt)
  problems = config.evaluate.problems if config.data.test or config.data.validation else 0
  calls = sampling.calls_of(phase, prompt, problems, sampling_mesh)
  rollouts = [call for call in calls if call.what == "rollouts"]
  planner = planners[sampling_mesh]
  return PhasePlan(
      phase.name, phase.kind, shape, count, held, host, gradient, gradients,
      phase.settings.optimizer, update, signals,
      phase.settings.rollout.updates if phase.kind == "rl" else 1,
      planner.largest(calls), planner.flops(rollouts), sampling_mesh is not mesh)


# ------------------------------------------------------------------------------------------ inputs


class UnreadTokenizer:
  """Stands for a tokenizer that is not at hand: the size of its vocabulary, and no text."""

  pad_id, bos_id, eos_id = 0, None, 0
  special_tokens = ()

  def __init__(self, vocab_size: int, why: str):
    self.vocab_size, self._why = vocab_size, why

  def encode(self, text: str) -> list[int]:
    """Refuses, as no id is known."""
    raise ValueError(f"{text!r} has to be encoded, but there is no tokenizer: {self._why}")


def _with_shape(config, place, notes):
  """The config with the shape of `model.source`, as that says or, if it cannot be had, as it states."""
  try:
    return sources.filled(config, place)
  except pretrained.NotHere:
    if not config.model.vocab_size:
      raise
    notes.append(f"{config.model.source} is not at hand: its shape is the one that the config states")
    return config


def _data(config, place, notes):
  """Training data and tokenizer; None and a stand-in where they are not at hand."""
  source, why = None, ""
  try:
    source = inputs.open_split(config, "train")
    return source, inputs.make_tokenizer(config, source, place / "tokenizer")
  except (ValueError, OSError) as error:
    why = str(error).splitlines()[0]
  known = config.model.vocab_size or config.tokenizer.vocab_size * (config.tokenizer.kind == "bpe")
  if config.tokenizer.kind == "character" and not (config.model.source or config.start):
    tokenizer = inputs.make_tokenizer(config, source, place / "tokenizer")
  elif known:
    tokenizer = UnreadTokenizer(known, why)
  else:
    raise ValueError(f"{why}\n(without it the size of the vocabulary is unknown, too: --config.model.vocab_size="
                     "N plans for one)")
  notes.append(f"{why[:200]}: every prompt is taken to have data.max_prompt_tokens="
               f"{config.data.max_prompt_tokens}")
  return None, tokenizer


def _sizes(config, phases, source, tokenizer):
  """Tokens of examples by phase, see `shapes.shape_of`: at their limits where there is no data."""
  d = config.data
  if source is None:
    limits = {True: 2 * (d.max_prompt_tokens + d.max_completion_tokens), False: d.max_prompt_tokens}
    return {p.name: ([limits[p.kind in PAIRED]] if d.max_prompt_tokens else [], ()) for p in phases}
  readers = phase_lib.make_readers(config, phases, tokenizer)
  return {p.name: phase_lib.sizes_of(p, *readers, source) for p in phases}
