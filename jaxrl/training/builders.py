"""From a config to the parts of a run; every mistake in it is found here, before any compute."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import ml_collections

from jaxrl import compose
from jaxrl import config as configs
from jaxrl import data
from jaxrl import rollouts as rollout_lib
from jaxrl import sharding
from jaxrl.batch import Task
from jaxrl.evaluation import policy
from jaxrl.models import DecoderConfig
from jaxrl.models import adapters
from jaxrl.models import critic_from_policy
from jaxrl.models import pretrained
from jaxrl.models.outputs import VALUES
from jaxrl.rewards import Scorer
from jaxrl.sampling import Likelihood
from jaxrl.sampling import Sampler
from jaxrl.training import inputs
from jaxrl.training import jsonl
from jaxrl.training import learner
from jaxrl.training import optimizers
from jaxrl.training import phases as phase_lib
from jaxrl.training import pieces
from jaxrl.training import processes
from jaxrl.training import refusals
from jaxrl.training import sources
from jaxrl.training import state as states
from jaxrl.training import teachers
from jaxrl.training import transfer
from jaxrl.training.ahead import Ahead
from jaxrl.training.fitting import Fitting
from jaxrl.training.loop import PhaseRun
from jaxrl.training.phases import Phase
from jaxrl.training.rehearsal import Aside
from jaxrl.training.rehearsal import Rehearsal
from jaxrl.training.shapes import Fitter
from jaxrl.training.shapes import PAIRED
from jaxrl.training.shapes import Shape
from jaxrl.training.supply import Examples
from jaxrl.training.supply import GroupsOfRollouts
from jaxrl.transforms.start import PhaseStart

TRAINING, TESTING, VALIDATING = 0, 1, 2  # first integer of every PRNG key


@dataclasses.dataclass(frozen=True)
class Parts:
  """What all phases share."""

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh  # that trains and evaluates
  sampling_mesh: jax.sharding.Mesh  # that samples ahead; the same unless there are devices for it
  tokenizer: data.Tokenizer
  decoder: DecoderConfig
  builder: data.TaskBuilder
  pair_builder: data.PairBuilder | None  # if a phase reads answers to compare
  train: data.Source
  validation: list[Task]
  test: list[Task]
  held_out_pairs: dict[str, list[data.Comparison]]  # by split
  scorer: Scorer
  sampler: Sampler
  phases: list[Phase]
  initializing: Aside  # compiles what makes parameters
  shapes: dict[str, Shape]  # of batches, by phase that trains
  rehearsals: dict[str, Rehearsal]  # by phase that trains
  report: Callable[[str], None]

  @property
  def base_key(self) -> jax.Array:
    """The key that all sampling of the run derives from."""
    return jax.random.key(self.config.seed)

  def compile(self, index: int) -> None:
    """Begins to compile the programs of a phase, beside whatever else there is to do."""
    phase = self.phases[index]
    if phase.name in self.rehearsals:
      self.rehearsals[phase.name].compile()


def build_parts(config: ml_collections.ConfigDict, workdir: pathlib.Path,
                report: Callable[[str], None], *, fresh: bool = False) -> Parts:
  """Builds everything that needs no parameters.

  Args:
    fresh: parameters will be wanted, so that what makes them is compiled meanwhile.

  Raises:
    ValueError: whatever is wrong with the config, its data, tokenizer, mesh or pieces.
  """
  configs.phase_names(config)  # or an error, before any file is opened
  mesh, sampling_mesh = transfer.make_meshes(config.mesh)
  splits = {split: inputs.open_split(config, split) for split in inputs.SPLITS}
  if splits["train"] is None:
    raise ValueError("config.data.train is empty; name a file, tfds:NAME:SPLIT or task:NAME")
  tokenizer = inputs.make_tokenizer(config, splits["train"], workdir / "tokenizer")
  if tokenizer.writes_date and (config.data.chat or config.data.messages):
    report(f"the chat template writes the date {tokenizer.date}")
  decoder, phases = phase_lib.make_phases(config, mesh, sampling_mesh, tokenizer, workdir)
  builder, pair_builder = phase_lib.make_readers(config, phases, tokenizer)
  held_out, pairs = _held_out(config, splits, builder, pair_builder)
  for phase in phases:
    refusals.check_phase(phase, mesh, held_out["validation"], pairs["validation"])
  shapes = {phase.name: phase_lib.make_shape(phase, decoder, mesh, *phase_lib.sizes_of(
      phase, builder, pair_builder, splits["train"])) for phase in phases if phase.kind != "evaluate"}
  initializing = Aside()
  if fresh and sources.begins(config):
    if unread := pretrained.check(pretrained.resolve(config.model.source), decoder):
      report(f"{config.model.source} reads images too; {len(unread)} tensors of that are left: "
             + ", ".join(unread[:4]) + (", ..." if len(unread) > 4 else ""))
  elif fresh:
    rng = jax.random.key_data(jax.random.key(config.seed))
    initializing.compile(lambda: states.initializer(decoder, mesh).lower(rng).compile())
  rehearsals = {phase.name: phase_lib.rehearse(phase, mesh, shapes[phase.name])
                for phase in phases if phase.name in shapes}
  sampler = _sampler(config, decoder, tokenizer, mesh)
  return Parts(config, mesh, sampling_mesh, tokenizer, decoder, builder, pair_builder,
               splits["train"], **held_out, held_out_pairs=pairs,
               scorer=_scorer(config, phases, sampling_mesh), sampler=sampler, phases=phases,
               initializing=initializing, shapes=shapes, rehearsals=rehearsals, report=report)


def abstract_state(parts: Parts, phase: Phase) -> states.TrainState:
  """What a checkpoint made in a phase restores to."""
  return phase_lib.state_of(phase.learning, parts.mesh)


def start_state(parts: Parts, phase: Phase, params: Any, rng: jax.Array) -> states.TrainState:
  """The state at the first update of a phase, on the mesh."""
  state = _fresh_state(parts, phase, params, rng)
  transforms = phase.learning.transforms
  if not transforms:
    return state
  start = PhaseStart(state.params, functools.partial(_parameters_of, parts, phase),
                     _measuring(parts, phase, state.params, rng))
  shardings = jax.tree.map(lambda x: x.sharding, state.opt_state)
  place = jax.jit(lambda x: x, out_shardings=shardings)
  return state.replace(opt_state=place(optimizers.begin(transforms, state.opt_state, start)))


def _parameters_of(parts, phase, run):
  """The last parameters of a run; of '', those that the latest training before the phase began with."""
  config, start = parts.config, run or parts.config.start
  if not run and not phase.index:
    if not start:
      raise configs.ConfigError(f"phase {phase.name} is the first of a run without config.start, so no "
                                "training came before it: name a run in config.start")
    config = configs.of_run(pathlib.Path(start))
    start = config.start
  rng = jax.random.key_data(jax.random.key(config.seed))
  if config.model.source and not start:
    return sources.parameters(config.model.source, parts.decoder, rng, parts.mesh, sources.of_adapters(config))
  params = states.initial_parameters(parts.decoder, rng, parts.mesh)
  return sources.continued(start, parts.decoder, params, parts.mesh) if start else params


def _measuring(parts, phase, params, rng):
  """What measures parameters on validation data, as the phase before does, or the first as itself."""
  before = parts.phases[max(phase.index - 1, 0)]

  @functools.cache
  def ready():
    began = _parameters_of(parts, phase, "") if phase.index else params
    return _fresh_state(parts, before, began, rng), _validator(parts, before)

  def measure(changed):
    state, validate = ready()
    return validate(state.replace(params=changed), before.steps) if validate else {}
  return measure


def _fresh_state(parts, phase, params, rng):
  """The same, before transformations have looked at it."""
  learning = phase.learning
  shardings = jax.tree.map(lambda x: x.sharding, abstract_state(parts, phase))
  shardings = shardings.replace(params=learning.part(shardings.params), others={})

  critic_begins = (parts.decoder.critic and learning.needs_values
                   and not any(p.learning.needs_values for p in parts.phases[:phase.index]
                               if p.kind != "evaluate")
                   and not _taught_critic(parts.config.start))

  def start(params, rng):
    params = critic_from_policy(parts.decoder, params) if critic_begins else params
    part = learning.part(params)
    state = states.start_phase(part, rng, learning.optimizer, carried=learning.carried,
                               frozen=learning.kept)
    return state.replace(frozen={name: own if learning.models[name].adapted else adapters.off(own)
                                 for name, own in state.frozen.items()})
  state = jax.jit(start, out_shardings=shardings)(params, rng)
  return state.replace(params=adapters.joined(params, state.params),  # no copy of what is not trained
                       others=teachers.parameters(learning.models, learning.others, parts.mesh))


def _taught_critic(run):
  """Whether a run, or one that it began with, has a critic that learned; not, if there is none, or if the
  run has not come to the phase that teaches it."""
  place = pathlib.Path(run)
  if not run or not place.exists():
    return False
  config = configs.of_run(place)
  if not config.model.critic:
    return False
  done = {row["phase"] for row in jsonl.read(place / "metrics.jsonl") if "grad_norm" in row}
  terms = [term for name in done for term in pieces.terms_of(configs.phase_config(config, name))]
  return any(signal in VALUES for term in terms for signal in compose.signals_of(term)) or (
      _taught_critic(config.start))


def phase_run(parts: Parts, phase: Phase) -> PhaseRun:
  """Everything that the loop needs for a phase."""
  s = phase.settings
  until = s.get("until")
  sampled = phase.kind == "rl"
  return PhaseRun(
      name=phase.name, steps=phase.steps, supply=_supply(parts, phase),
      learner=parts.rehearsals[phase.name].learner, shape=parts.shapes[phase.name],
      fitting=_fitting(parts, phase), updates_per_batch=s.rollout.updates if sampled else 1,
      mesh=parts.mesh, max_bad_steps=s.optimizer.max_bad_steps,
      max_logprob_gap=s.rollout.max_logprob_gap,
      validate=_validator(parts, phase),
      validate_every=until["every"] if until else s.evaluate.every,
      until=(until["metric"], until["at_least"]) if until else None,
      checkpoint_every=s.checkpoint.every, samples_every=s.log.samples_every,
      curves_every=s.log.curves_every)


def evaluate(parts: Parts, phase: Phase, params: Any, tasks: list[Task], key: tuple[int, ...], *,
             step: int) -> policy.Evaluation:
  """Greedy and sampled metrics of a policy on the test problems, with the settings of a phase as
  they are at one of its updates."""
  s = phase.settings.evaluate
  return policy.evaluate(
      _rollouts(parts, phase, parts.sampler), params, tasks, correct=_correct(parts, phase),
      samples=s.samples, k=s.k, temperature=s.temperature, base_key=parts.base_key,
      key=(TESTING, *key), episode=pieces.asking(phase.settings), step=step)


def measure(parts: Parts, phase: Phase, state: states.TrainState, split: str) -> dict[str, float]:
  """Loss and diagnostics of a phase that compares answers, on pairs that it is not trained on.

  Returns:
    Means over the pairs by name, as `pairs/loss`; nothing for phases of other kinds.
  """
  pairs = parts.held_out_pairs[split] if phase.kind in PAIRED else []
  learner_, shape = parts.rehearsals[phase.name].learner if pairs else None, parts.shapes.get(phase.name)
  to_trajectories = phase_lib.to_trajectories(phase.settings, phase.learning.terms, parts.tokenizer)
  size = phase.settings.batch.examples
  total: dict[str, float] = {}
  for start in range(0, len(pairs), size):
    part = pairs[start:start + size]
    host = shape.pack(to_trajectories(part))
    host = learner.to_micro_batches(host, shape.micro_batch_rows)
    with jax.set_mesh(parts.mesh):
      batch = learner_.prepare(state, sharding.put_batch(host, parts.mesh))[1]
      found = jax.device_get(learner_.measure(state, batch))
    for name, value in found.items():
      total[name] = total.get(name, 0.0) + float(value) * len(part) / len(pairs)
  return {f"pairs/{name}": value for name, value in total.items()}


def _validator(parts, phase):
  """What measures a phase on validation data; None where there is none."""
  if not parts.validation and not parts.held_out_pairs["validation"]:
    return None
  rollouts = _rollouts(parts, phase, parts.sampler)

  def validate(state, step):
    found = measure(parts, phase, state, "validation")
    if parts.validation:
      found |= policy.evaluate(
          rollouts, state.params, parts.validation, correct=_correct(parts, phase), samples=0, k=1,
          temperature=0.0, base_key=parts.base_key, key=(VALIDATING, phase.index, step),
          episode=pieces.asking(phase.settings), step=step).metrics
    return found
  return validate


def _held_out(config, splits, builder, pair_builder):
  """Problems, and pairs of answers if a phase compares them, of the splits nothing is trained on."""
  e, tasks, pairs = config.evaluate, {}, {}
  for split in ("validation", "test"):
    if pair_builder is None:
      pairs[split], tasks[split] = [], inputs.read_tasks(builder, splits[split], e.problems)
    else:
      found = inputs.read_tasks(pair_builder, splits[split], max(e.problems, e.pairs))
      pairs[split], tasks[split] = found[:e.pairs], [pair.task for pair in found[:e.problems]]
  return tasks, pairs


def _reader(parts, phase):
  """What makes an example of a row."""
  if phase.kind in PAIRED:
    return parts.pair_builder.read
  if pieces.asks_pairs(phase.settings):
    return lambda source, index: getattr(parts.pair_builder.read(source, index), "task", None)
  return parts.builder.read if phase.kind == "rl" else parts.builder.read_solved


def _supply(parts, phase):
  s = phase.settings
  pipeline = data.tasks_pipeline(parts.train, _reader(parts, phase),
                                 seed=(1000 * parts.config.seed + phase.index) % 2 ** 32)
  if phase.kind != "rl":
    return Examples(pipeline, phase_lib.to_trajectories(s, phase.learning.terms, parts.tokenizer),
                    s.batch.examples)
  sampler = parts.sampler
  if pieces.samples_ahead(phase):  # one of its own, for validation may sample at the same time
    sampler = _sampler(parts.config, parts.decoder, parts.tokenizer, parts.sampling_mesh)
  groups = GroupsOfRollouts(
      pipeline, _rollouts(parts, phase, sampler), edits=pieces.edits_of(s), prompts=s.rollout.prompts,
      base_key=parts.base_key, key=(TRAINING, phase.index),
      filter_zero_variance=s.rollout.filter_zero_variance, filter_by=s.rollout.filter_by,
      max_resample=s.rollout.max_resample)
  if not pieces.samples_ahead(phase):
    return groups
  shardings = states.parameter_shardings(parts.decoder, parts.mesh)
  return Ahead(groups, staleness=s.rollout.staleness, updates=s.rollout.updates,
               steps=phase.steps, copy=transfer.copier(shardings, parts.sampling_mesh))


def _sampler(config, decoder, tokenizer, mesh):
  return processes.AgreeingSampler(decoder, mesh=mesh, max_rows=config.rollout.max_rows,
                                   weights_dtype=config.rollout.weights_dtype,
                                   cache_dtype=config.rollout.cache_dtype, decode=tokenizer.decode)


def _rollouts(parts, phase, sampler):
  r = phase.settings.rollout
  mesh = parts.mesh if sampler is parts.sampler else parts.sampling_mesh
  return rollout_lib.Rollouts(
      pieces.episode(phase.settings), sampler, parts.tokenizer, parts.scorer,
      sampling=pieces.sampling(r, parts.builder.stop_ids), templates=r.templates,
      max_failure_rate=r.max_failure_rate, report=parts.report,
      likelihood=Likelihood(parts.decoder, mesh=mesh, temperature=r.temperature or 1.0),
      pairs=parts.pair_builder, seed=parts.config.seed, end_id=parts.builder.turn_end,
      schedules={name.removeprefix("rollout."): of for name, of in pieces.schedules(phase.settings).items()
                 if name.startswith("rollout.")})


def _scorer(config, phases, mesh):
  # All phases are judged by one scorer: it is given a limit that they have in common.
  limits = {phase.settings.rollout.max_tokens for phase in phases if phase.kind == "rl"}
  given = dict(max_tokens=max(limits, default=config.rollout.max_tokens)) if len(limits) < 2 else {}
  scorer = processes.SharedScorer.from_config(pieces.plain(config.reward), mesh=mesh, given=given)
  for phase in phases:
    s = phase.settings
    for path, label in (("evaluate.correct", s.evaluate.correct), ("rollout.filter_by", s.rollout.filter_by)):
      if label and label not in scorer.labels:
        scorer.close()
        raise ValueError(f"config.{path}={label!r} is none of the criteria in config.reward"
                         f"{compose.nearest(label, scorer.labels)}")
  return scorer


def _correct(parts, phase):
  return phase.settings.evaluate.correct or parts.scorer.labels[0]


def _fitting(parts, phase):
  """What fits the layout of rollouts to their lengths; None where groups have to stay together, where prompts
  are not shared, and where the config says so."""
  shape, batch = parts.shapes[phase.name], phase.settings.batch
  if phase.kind != "rl" or shape.together or not (batch.share_prompts and batch.fit_layout):
    return None
  fitter = Fitter(phase.settings, parts.decoder, parts.mesh, shape.prompt, phase_lib.kept_bytes(phase, parts.mesh))
  return Fitting(shape, parts.rehearsals[phase.name].learner, fitter,
                 functools.partial(phase_lib.rehearse, phase, parts.mesh))
