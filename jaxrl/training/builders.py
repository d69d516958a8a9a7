"""From a config to the parts of a run; every mistake in it is found here, before any compute."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import ml_collections

from jaxrl import advantages
from jaxrl import compose
from jaxrl import config as configs
from jaxrl import data
from jaxrl import objectives
from jaxrl import rollouts as rollout_lib
from jaxrl import sharding
from jaxrl.batch import pack
from jaxrl.batch import Task
from jaxrl.evaluation import policy
from jaxrl.models import DecoderConfig
from jaxrl.rewards import Scorer
from jaxrl.sampling import Sampler
from jaxrl.sampling import SamplingParams
from jaxrl.training import inputs
from jaxrl.training import learner
from jaxrl.training import optimizers
from jaxrl.training import state as states
from jaxrl.training.loop import PhaseRun
from jaxrl.training.supply import Examples
from jaxrl.training.supply import GroupsOfRollouts

KINDS = ("sft", "rl", "evaluate")
TRAINING, TESTING, VALIDATING = 0, 1, 2  # first integer of every PRNG key


@dataclasses.dataclass(frozen=True)
class Phase:
  """One phase: its settings, and what it learns with (None for `evaluate`)."""

  index: int
  name: str
  kind: str
  steps: int
  settings: ml_collections.ConfigDict
  learning: learner.Learning | None


@dataclasses.dataclass(frozen=True)
class Parts:
  """What all phases share."""

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  tokenizer: data.Tokenizer
  decoder: DecoderConfig
  builder: data.TaskBuilder
  train: data.Source
  validation: list[Task]
  test: list[Task]
  scorer: Scorer
  sampler: Sampler
  phases: list[Phase]
  report: Callable[[str], None]

  @property
  def base_key(self) -> jax.Array:
    return jax.random.key(self.config.seed)


def build_parts(config: ml_collections.ConfigDict, workdir: pathlib.Path,
                report: Callable[[str], None]) -> Parts:
  """Builds everything that needs no parameters.

  Raises:
    ValueError: whatever is wrong with the config, its data, tokenizer, mesh or pieces.
  """
  if not config.phases:
    raise ValueError("config.phases is empty; name at least one, such as ('sft', 'rl')")
  mesh = sharding.make_mesh(**config.mesh)
  splits = {split: inputs.open_split(config, split) for split in inputs.SPLITS}
  if splits["train"] is None:
    raise ValueError("config.data.train is empty; name a file, tfds:NAME:SPLIT or task:NAME")
  tokenizer = inputs.make_tokenizer(config, splits["train"], workdir / "tokenizer")
  decoder = _decoder_config(config.model, tokenizer.vocab_size)
  sharding.check_divisible(decoder, mesh)
  builder = inputs.builder(config, tokenizer)
  held_out = {split: inputs.read_tasks(builder, splits[split], config.evaluate.problems)
              for split in ("validation", "test")}
  phases = [_phase(config, index, name, decoder) for index, name in enumerate(config.phases)]
  for phase in phases:
    _check_phase(phase, mesh, held_out)
    _dry_run(phase, mesh)
  sampler = Sampler(decoder, mesh=mesh, max_rows=config.rollout.max_rows, decode=tokenizer.decode)
  return Parts(config, mesh, tokenizer, decoder, builder, splits["train"], **held_out,
               scorer=Scorer.from_config(_plain(config.reward)), sampler=sampler, phases=phases,
               report=report)


def abstract_state(parts: Parts, phase: Phase) -> states.TrainState:
  """What a checkpoint made in a phase restores to."""
  learning = phase.learning
  return states.abstract_state(parts.decoder, parts.mesh, learning.optimizer,
                               with_reference=learning.needs_reference)


def start_state(parts: Parts, phase: Phase, params: Any, rng: jax.Array) -> states.TrainState:
  """The state at the first update of a phase, on the mesh."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract_state(parts, phase))
  learning = phase.learning

  def start(params, rng):
    return states.start_phase(params, rng, learning.optimizer,
                              with_reference=learning.needs_reference)
  return jax.jit(start, out_shardings=shardings)(params, rng)


def phase_run(parts: Parts, phase: Phase) -> PhaseRun:
  """Everything that the loop needs for a phase."""
  s = phase.settings
  shardings = jax.tree.map(lambda x: x.sharding, abstract_state(parts, phase))
  until = s.get("until")
  sampled = phase.kind == "rl"
  rows = s.batch.micro_batch_rows
  return PhaseRun(
      name=phase.name, steps=phase.steps, supply=_supply(parts, phase),
      learner=learner.make_learner(phase.learning, shardings),
      updates_per_batch=s.rollout.updates if sampled else 1,
      packing=dict(row_length=s.batch.row_length, rows_multiple=rows), micro_batch_rows=rows,
      mesh=parts.mesh, max_bad_steps=s.optimizer.max_bad_steps,
      max_logprob_gap=s.rollout.max_logprob_gap,
      validate=_validator(parts, phase) if parts.validation else None,
      validate_every=until["every"] if until else s.evaluate.every,
      until=(until["metric"], until["at_least"]) if until else None,
      checkpoint_every=s.checkpoint.every, samples_every=s.log.samples_every,
      curves_every=s.log.curves_every)


def evaluate(parts: Parts, phase: Phase, params: Any, tasks: list[Task], key: tuple[int, ...]
             ) -> policy.Evaluation:
  """Greedy and sampled metrics of a policy on the test problems, with the settings of a phase."""
  s = phase.settings.evaluate
  return policy.evaluate(
      _rollouts(parts, phase), params, tasks, correct=_correct(parts, phase), samples=s.samples,
      k=s.k, temperature=s.temperature, base_key=parts.base_key, key=(TESTING, *key))


def _validator(parts, phase):
  rollouts = _rollouts(parts, phase)

  def validate(params, step):
    return policy.evaluate(rollouts, params, parts.validation, correct=_correct(parts, phase),
                           samples=0, k=1, temperature=0.0, base_key=parts.base_key,
                           key=(VALIDATING, phase.index, step)).metrics
  return validate


def _supply(parts, phase):
  s = phase.settings
  sampled = phase.kind == "rl"
  read = parts.builder.read if sampled else parts.builder.read_solved
  pipeline = data.tasks_pipeline(parts.train, read, seed=parts.config.seed + phase.index)
  if not sampled:
    to_example = functools.partial(data.supervised, tokenizer=parts.tokenizer,
                                   max_completion_tokens=s.data.max_completion_tokens)
    return Examples(pipeline, to_example, s.batch.examples)
  return GroupsOfRollouts(
      pipeline, _rollouts(parts, phase), prompts=s.rollout.prompts, base_key=parts.base_key,
      phase=phase.index, filter_zero_variance=s.rollout.filter_zero_variance,
      max_resample=s.rollout.max_resample)


def _rollouts(parts, phase):
  r = phase.settings.rollout
  sampling = SamplingParams(
      max_tokens=r.max_tokens, temperature=r.temperature, top_k=r.top_k, top_p=r.top_p,
      min_p=r.min_p, stop_ids=(parts.tokenizer.eos_id,), stop_strings=tuple(r.stop_strings))
  return rollout_lib.Rollouts(
      _episode(phase.settings), parts.sampler, parts.tokenizer, parts.scorer, sampling=sampling,
      templates=r.templates, max_failure_rate=r.max_failure_rate, report=parts.report)


def _episode(settings):
  return compose.build(_plain(settings.rollout.episode), rollout_lib,
                       where="config.rollout.episode")


def _correct(parts, phase):
  return phase.settings.evaluate.correct or parts.scorer.labels[0]


def _decoder_config(model: Mapping[str, Any], vocab_size: int) -> DecoderConfig:
  fields = dict(model)
  for name in ("rope_scaling", "heads_on_top"):
    fields[name] = tuple(map(tuple, fields[name]))
  fields["layer_types"] = tuple(fields["layer_types"])
  return DecoderConfig(vocab_size=vocab_size, **fields)


def _phase(config, index, name, decoder):
  settings = configs.phase_config(config, name)
  kind, steps = settings.kind, settings.get("steps", 0)
  if kind not in KINDS:
    raise ValueError(f"config.{name}.kind={kind!r}{compose.nearest(kind, KINDS)}")
  sampled = kind == "rl"
  optimizer_steps = max(steps, 1)
  learning = learner.Learning(
      decoder=decoder,
      terms=[compose.build(_plain(t), objectives, where=f"config.objective[{i}]")
             for i, t in enumerate(settings.objective)],
      advantage=[compose.build(_plain(a), advantages, where=f"config.advantage[{i}]")
                 for i, a in enumerate(settings.advantage)] if sampled else [],
      aggregation=settings.aggregation.kind, constant=settings.aggregation.constant,
      optimizer=optimizers.build(settings.optimizer, optimizer_steps),
      learning_rate=optimizers.learning_rate(settings.optimizer, optimizer_steps),
      temperature=settings.rollout.temperature if sampled else 1.0,
      vocabulary_chunk=settings.batch.vocabulary_chunk,
      micro_batch_rows=settings.batch.micro_batch_rows, with_behaviour=sampled)
  return Phase(index, name, kind, steps, settings, learning)


def _check_phase(phase, mesh, held_out):
  s, where = phase.settings, f"config.{phase.name}"
  if phase.kind != "evaluate" and phase.steps < 1:
    raise ValueError(f"{where}.steps={phase.steps}; a phase of kind {phase.kind} needs at least 1")
  rows, parts = s.batch.micro_batch_rows, mesh.shape["data"] * mesh.shape["fsdp"]
  if rows < 1 or rows % parts:
    raise ValueError(f"config.batch.micro_batch_rows={rows} does not divide over data x fsdp = "
                     f"{parts} devices: use {parts * max(rows // parts, 1)} or "
                     f"{parts * (rows // parts + 1)}")
  if phase.kind == "rl":
    _episode(s)
    if s.rollout.temperature <= 0:
      raise ValueError(f"config.rollout.temperature={s.rollout.temperature}: greedy samples have no "
                       "policy gradient; use a positive temperature")
    if min(s.rollout.prompts, s.rollout.updates) < 1:
      raise ValueError("config.rollout.prompts and config.rollout.updates must be at least 1")
  if s.evaluate.samples and not 0 < s.evaluate.k <= s.evaluate.samples:
    raise ValueError(f"config.evaluate.k={s.evaluate.k} must be between 1 and config.evaluate."
                     f"samples={s.evaluate.samples}")
  until = s.get("until")
  if until is not None and set(until) != {"metric", "at_least", "every"}:
    raise ValueError(f"{where}.until needs metric, at_least and every; it has {sorted(until)}")
  if (until or s.evaluate.every) and not held_out["validation"]:
    raise ValueError(f"{where} evaluates on the way, so it needs config.data.validation")


def _dry_run(phase: Phase, mesh: jax.sharding.Mesh) -> None:
  """Traces the functions of a phase, so that pieces which do not fit together fail now."""
  if phase.kind == "evaluate":
    return
  learning = phase.learning
  state = states.abstract_state(learning.decoder, mesh, learning.optimizer,
                                with_reference=learning.needs_reference)
  functions = learner.make_learner(learning, jax.tree.map(lambda x: x.sharding, state))
  batch = pack([], row_length=phase.settings.batch.row_length,
               rows_multiple=learning.micro_batch_rows)
  with jax.set_mesh(mesh):
    prepared = jax.eval_shape(functions.prepare, state, batch)
    jax.eval_shape(functions.update, state, prepared)


def _plain(spec: Any) -> Any:
  return configs.to_dict(spec) if isinstance(spec, ml_collections.ConfigDict) else spec
