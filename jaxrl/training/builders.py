"""From a config to the parts of a run; every mistake in it is found here, before any compute."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
import pathlib
import threading
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxrl import advantages
from jaxrl import chips
from jaxrl import compose
from jaxrl import config as configs
from jaxrl import data
from jaxrl import rollouts as rollout_lib
from jaxrl.rollouts.edits import MISMATCHED
from jaxrl import sharding
from jaxrl.batch import PREFERENCE
from jaxrl.batch import shared_length
from jaxrl.batch import STRONGER
from jaxrl.batch import Task
from jaxrl.batch import TUPLE
from jaxrl.evaluation import policy
from jaxrl.models import DecoderConfig
from jaxrl.models import adapters
from jaxrl.models import critic_from_policy
from jaxrl.models import pretrained
from jaxrl.models.outputs import VALUES
from jaxrl.rewards import Scorer
from jaxrl.sampling import Likelihood
from jaxrl.sampling import Sampler
from jaxrl.training import frozen
from jaxrl.training import inputs
from jaxrl.training import jsonl
from jaxrl.training import learner
from jaxrl.training import optimizers
from jaxrl.training import pieces
from jaxrl.training import processes
from jaxrl.training import references
from jaxrl.training import refusals
from jaxrl.training import sources
from jaxrl.training import state as states
from jaxrl.training import teachers
from jaxrl.training import transfer
from jaxrl.training.ahead import Ahead
from jaxrl.training.fitting import Fitting
from jaxrl.training.loop import PhaseRun
from jaxrl.training.rehearsal import Aside
from jaxrl.training.rehearsal import Rehearsal
from jaxrl.training.shapes import Fitter
from jaxrl.training.shapes import PAIRED
from jaxrl.training.shapes import Shape
from jaxrl.training.shapes import shape_of
from jaxrl.training.supply import Examples
from jaxrl.training.supply import GroupsOfRollouts
from jaxrl.transforms.start import PhaseStart

KINDS = ("sft", "rl", *PAIRED, "evaluate")
TRAINING, TESTING, VALIDATING = 0, 1, 2  # first integer of every PRNG key
REMEMBERED = 6  # rehearsals of earlier runs
_REHEARSALS: dict[tuple, Rehearsal] = {}
_ONE_AT_A_TIME = threading.Lock()  # threads rehearse too, see `fitting`


@dataclasses.dataclass(frozen=True)
class Phase:
  """One phase: its settings, and what it learns with."""

  index: int
  name: str
  kind: str
  steps: int
  settings: ml_collections.ConfigDict
  learning: learner.Learning


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
  decoder, phases = make_phases(config, mesh, sampling_mesh, tokenizer, workdir)
  builder, pair_builder = make_readers(config, phases, tokenizer)
  held_out, pairs = _held_out(config, splits, builder, pair_builder)
  for phase in phases:
    refusals.check_phase(phase, mesh, held_out["validation"], pairs["validation"])
  shapes = {phase.name: make_shape(phase, decoder, mesh, *sizes_of(
      phase, builder, pair_builder, splits["train"])) for phase in phases if phase.kind != "evaluate"}
  initializing = Aside()
  if fresh and sources.begins(config):
    if unread := pretrained.check(pretrained.resolve(config.model.source), decoder):
      report(f"{config.model.source} reads images too; {len(unread)} tensors of that are left: "
             + ", ".join(unread[:4]) + (", ..." if len(unread) > 4 else ""))
  elif fresh:
    rng = jax.random.key_data(jax.random.key(config.seed))
    initializing.compile(lambda: states.initializer(decoder, mesh).lower(rng).compile())
  rehearsals = {phase.name: _rehearse(phase, mesh, shapes[phase.name])
                for phase in phases if phase.name in shapes}
  sampler = _sampler(config, decoder, tokenizer, mesh)
  return Parts(config, mesh, sampling_mesh, tokenizer, decoder, builder, pair_builder,
               splits["train"], **held_out, held_out_pairs=pairs,
               scorer=_scorer(config, phases, sampling_mesh), sampler=sampler, phases=phases,
               initializing=initializing, shapes=shapes, rehearsals=rehearsals, report=report)


def abstract_state(parts: Parts, phase: Phase) -> states.TrainState:
  """What a checkpoint made in a phase restores to."""
  return state_of(phase.learning, parts.mesh)


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
  to_trajectories = _to_trajectories(phase.settings, phase.learning.terms, parts.tokenizer)
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


def _to_trajectories(settings, terms, tokenizer):
  """What makes the sequences of a list of examples that are not sampled."""
  limit = dict(max_completion_tokens=settings.data.max_completion_tokens)
  if settings.kind not in PAIRED:
    return lambda tasks: [data.supervised(task, tokenizer, **limit) for task in tasks]

  def compare(comparisons):
    comparisons = data.linked(comparisons)
    found = [t for group, comparison in enumerate(comparisons)
             for t in data.compared(comparison, tokenizer, group=group, **limit)]
    if _reads(terms, MISMATCHED):
      for trajectory in found:
        trajectory.signals[MISMATCHED] = np.zeros(len(trajectory.tokens), np.float32)
      found += data.mismatched(comparisons, tokenizer, group=len(comparisons), **limit)
    return found
  return compare


def _reads(terms, signal):
  return any(signal in compose.signals_of(term) for term in terms)


def _supply(parts, phase):
  s = phase.settings
  pipeline = data.tasks_pipeline(parts.train, _reader(parts, phase),
                                 seed=(1000 * parts.config.seed + phase.index) % 2 ** 32)
  if phase.kind != "rl":
    return Examples(pipeline, _to_trajectories(s, phase.learning.terms, parts.tokenizer),
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


def make_phases(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, sampling_mesh: jax.sharding.Mesh,
                tokenizer: data.Tokenizer, workdir: pathlib.Path | None = None
                ) -> tuple[DecoderConfig, list[Phase]]:
  """The model and the phases of a config, refused where they do not go together, whatever the data is.

  Args:
    config: of all phases.
    mesh, sampling_mesh, tokenizer: see `Parts`.
    workdir: has what the models of other runs were, if the run has begun.

  Raises:
    ValueError: a mistake in the model, in settings or in pieces.
  """
  decoder = inputs.decoder_config(config.model, tokenizer)
  sharding.check_divisible(decoder, mesh)
  sources.check_start(config, decoder)
  if decoder.adapters:
    adapters.check_targets(decoder.adapters, states.abstract_parameters(decoder, mesh))
  phases = [_phase(config, index, name, decoder, mesh, tokenizer, workdir)
            for index, name in enumerate(configs.phase_names(config))]
  refusals.check_frozen(phases)
  refusals.check_lengths(phases, decoder, config.data)
  refusals.check_ahead(phases, decoder, mesh, sampling_mesh)
  return decoder, phases


def make_readers(config: ml_collections.ConfigDict, phases: Sequence[Phase], tokenizer: data.Tokenizer
                 ) -> tuple[data.TaskBuilder, data.PairBuilder | None]:
  """What makes tasks of rows, and pairs of answers if a phase compares any."""
  builder = inputs.builder(config, tokenizer)
  paired = any(phase.kind in PAIRED or pieces.asks_pairs(phase.settings) for phase in phases)
  ranges = compose.ranges_of([term for phase in phases for term in phase.learning.terms])
  return builder, inputs.pair_builder(config, builder, ranges) if paired else None


def _phase(config, index, name, decoder, mesh, tokenizer, workdir):
  settings = configs.phase_config(config, name)
  kind, steps = settings.kind, settings.get("steps", 0)
  if kind not in KINDS:
    raise ValueError(f"config.{name}.kind={kind!r}{compose.nearest(kind, KINDS)}")
  if kind != "evaluate" and steps < 1:
    raise ValueError(f"config.{name}.steps={steps}; a phase of kind {kind} needs at least 1")
  sampled, on_cpu = kind == "rl", chips.platform() == "cpu"
  # An evaluation makes no updates; its optimiser is only part of the state's shape.
  optimizer_steps = settings.optimizer.warmup_steps + 1 if kind == "evaluate" else max(steps, 1)
  terms, aggregations = pieces.objective(settings)
  transforms = optimizers.read_transforms(
      {"transforms": [pieces.plain(spec) for spec in settings.optimizer.transforms]},
      lambda specs, where: _references(specs, where, settings, decoder, mesh, tokenizer)) if (
          kind != "evaluate") else []
  scheduled = pieces.schedules(settings)
  rate = scheduled.get("optimizer.learning_rate")
  models = frozen.read(settings.reference, settings.frozen, scheduled.get("reference.decay"))
  learning = learner.Learning(
      decoder=decoder, terms=terms, aggregations=aggregations,
      models=models, decoders=teachers.decoders(models, tokenizer, mesh, workdir),
      advantage=[compose.build(pieces.plain(a), advantages, where=f"config.advantage[{i}]")
                 for i, a in enumerate(settings.advantage)] if sampled else [],
      optimizer=optimizers.build(settings.optimizer, optimizer_steps, transforms, rate),
      transforms=transforms,
      learning_rate=optimizers.learning_rate(settings.optimizer, optimizer_steps, rate),
      temperature=(scheduled.get("rollout.temperature", settings.rollout.temperature) if sampled
                   else 1.0),
      updates_per_batch=settings.rollout.updates if sampled else 1,
      vocabulary_chunk=settings.batch.vocabulary_chunk or (1024 if on_cpu else 8192),
      with_behaviour=sampled, streams=sharding.streams(mesh),
      trains=tuple(settings.optimizer.adapters), offload=settings.optimizer.offload,
      asks_reference=sampled and "reference" in compose.signals_of(pieces.episode(settings)))
  return Phase(index, name, kind, steps, settings, learning)


def _references(specs, where, settings, decoder, mesh, tokenizer):
  """The losses on data of their own that a list in a config describes."""
  if not isinstance(specs, list):
    raise ValueError(f"{where}={specs!r} must be a list of dict(data=..., objective=[...])")
  found = []
  for i, spec in enumerate(specs):
    here = f"{where}[{i}]"
    own, parts = references.settings_of(spec, settings, here)
    try:
      terms, aggregations = pieces.objective(own)
    except ValueError as error:
      raise ValueError(f"{here}: {error}") from error
    found.append(references.build(own, parts, terms, aggregations, _to_trajectories(own, terms, tokenizer),
                                  decoder=decoder, mesh=mesh, tokenizer=tokenizer, where=here))
  return found


def sizes_of(phase: Phase, builder: data.TaskBuilder, pair_builder: data.PairBuilder | None,
             source: data.Source) -> tuple[list[int], Sequence[tuple[int, Sequence[int]]]]:
  """Tokens of some examples, and of the parts of pairs, see `shape_of`."""
  if phase.kind in PAIRED:
    to_trajectories = _to_trajectories(phase.settings, phase.learning.terms, builder.tokenizer)
    examples = data.linked(inputs.first_tasks(pair_builder, source))
    made = [to_trajectories([example]) for example in examples]
    refusals.check_pairs(phase.learning.terms, made)
    return [sum(len(t.tokens) for t in pair) for pair in made], _prompts_of(made)
  if pieces.asks_pairs(phase.settings):
    return [len(pair.task.prompt) for pair in inputs.first_tasks(pair_builder, source)], ()
  return [len(task.prompt) for task in inputs.first_tasks(builder, source,
                                                          solved=phase.kind == "sft")], ()


def make_shape(phase: Phase, decoder: DecoderConfig, mesh: jax.sharding.Mesh, sizes: Sequence[int],
               shared: Sequence[tuple[int, Sequence[int]]] = ()) -> Shape:
  """The shape of a phase's batches; `sizes` and `shared` as in `shape_of`."""
  return shape_of(phase.settings, decoder, mesh, sizes, kept_bytes=_kept_bytes(phase, mesh),
                  compares=any(map(compose.is_by_sequence, phase.learning.terms)),
                  shared=shared)


def _kept_bytes(phase, mesh):
  """What one device keeps while it trains: the state, the sum of the gradients and the next of them."""
  state = state_of(phase.learning, mesh)
  return sharding.bytes_of(state) + 2 * gradient_bytes(phase.learning, state)


def _fitting(parts, phase):
  """What fits the layout of rollouts to their lengths; None where groups have to stay together, where prompts
  are not shared, and where the config says so."""
  shape, batch = parts.shapes[phase.name], phase.settings.batch
  if phase.kind != "rl" or shape.together or not (batch.share_prompts and batch.fit_layout):
    return None
  fitter = Fitter(phase.settings, parts.decoder, parts.mesh, shape.prompt, _kept_bytes(phase, parts.mesh))
  return Fitting(shape, parts.rehearsals[phase.name].learner, fitter,
                 functools.partial(_rehearse, phase, parts.mesh))


def gradient_bytes(learning: learner.Learning, state: states.TrainState) -> int:
  """Of a gradient on one device, float32; the state may be abstract."""
  return sharding.bytes_of(learning.part(state.params), 4)


def _prompts_of(made):
  """Tokens of the prompt and of each answer of the groups; nothing where examples make several."""
  if any(len({t.group for t in group}) != 1 for group in made):
    return ()
  heads = [shared_length(group) for group in made]
  return [(head, [len(t.tokens) - head for t in group]) for head, group in zip(heads, made)]


def _rehearse(phase: Phase, mesh: jax.sharding.Mesh, shape: Shape) -> Rehearsal:
  """Traces the functions of a phase, so that pieces which do not fit together fail now.

  Runs of one process that differ in nothing that these depend on, such as seeds, share them.
  """
  plain = {k: v for k, v in configs.to_dict(phase.settings).items() if k not in ("seed", "start")}
  built = (*phase.learning.terms, *phase.learning.advantage, *phase.learning.transforms,
           *_suppliers(phase))
  # Data of references has a shape of its own.
  kept = tuple(x.shape for x in jax.tree.leaves(state_of(phase.learning, mesh).opt_state))
  key = (json.dumps(plain, sort_keys=True), tuple(piece.func for piece in built),
         phase.learning.decoder, mesh, repr(shape), kept, tuple(phase.learning.others.items()))
  with _ONE_AT_A_TIME:
    if key not in _REHEARSALS:
      while len(_REHEARSALS) >= REMEMBERED:
        _REHEARSALS.pop(next(iter(_REHEARSALS)))
      _REHEARSALS[key] = rehearsal(phase, mesh, shape)
    return _REHEARSALS[key]


def rehearsal(phase: Phase, mesh: jax.sharding.Mesh, shape: Shape) -> Rehearsal:
  """The programs of a phase, traced."""
  state = state_of(phase.learning, mesh)
  functions = learner.make_learner(phase.learning, jax.tree.map(lambda x: x.sharding, state))
  batch = learner.to_micro_batches(_empty_batch(phase, shape), shape.micro_batch_rows)
  return Rehearsal(functions, state, batch, mesh)


def state_of(learning: learner.Learning, mesh: jax.sharding.Mesh) -> states.TrainState:
  """Shapes, types and shardings of a phase's state."""
  return states.abstract_state(learning.decoder, mesh, learning.optimizer,
                               frozen=learning.kept, carried=learning.carried, trains=learning.trains,
                               others=learning.others, offload=learning.offload)


def _empty_batch(phase, shape):
  """A host batch of the expected shape, with the signals and columns that episode and edits add."""
  batch = shape.pack([])
  d = phase.settings.data
  there = {MISMATCHED: _reads(phase.learning.terms, MISMATCHED), data.STEP_LABELS: d.step_labels}
  off = tuple(name for name, value in there.items() if value)
  links = (TUPLE, STRONGER) if d.weaker else ()
  of_pairs = [(off, (PREFERENCE, *links, *d.columns))] if phase.kind in PAIRED else []
  for signals, columns in (*of_pairs, *map(compose.supplied_by, _suppliers(phase))):
    batch = batch.with_signals(**{name: np.zeros(batch.tokens.shape, np.float32)
                                  for name in signals})
    batch = batch.replace(columns={**batch.columns, **{
        name: np.zeros(batch.num_sequences, np.float32) for name in columns}})
  return batch


def _suppliers(phase):
  """What makes the trajectories of a phase, as far as they are sampled."""
  return (pieces.episode(phase.settings), *pieces.edits_of(phase.settings)) if phase.kind == "rl" else ()
