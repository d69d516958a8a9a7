"""The phases of a config: what each learns with, the shape of its batches, its programs."""

from collections.abc import Callable, Sequence
import dataclasses
import json
import pathlib
import threading

import jax
import ml_collections
import numpy as np

from jaxrl import advantages
from jaxrl import chips
from jaxrl import compose
from jaxrl import config as configs
from jaxrl import data
from jaxrl.rollouts.edits import MISMATCHED
from jaxrl import sharding
from jaxrl.batch import PREFERENCE
from jaxrl.batch import shared_length
from jaxrl.batch import STRONGER
from jaxrl.batch import Trajectory
from jaxrl.batch import TUPLE
from jaxrl.models import DecoderConfig
from jaxrl.models import adapters
from jaxrl.training import frozen
from jaxrl.training import inputs
from jaxrl.training import learner
from jaxrl.training import optimizers
from jaxrl.training import pieces
from jaxrl.training import references
from jaxrl.training import refusals
from jaxrl.training import sources
from jaxrl.training import state as states
from jaxrl.training import teachers
from jaxrl.training.learning import Learning
from jaxrl.training.rehearsal import Rehearsal
from jaxrl.training.shapes import PAIRED
from jaxrl.training.shapes import Shape
from jaxrl.training.shapes import shape_of

KINDS = ("sft", "rl", *PAIRED, "evaluate")
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
  learning: Learning


def make_phases(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, sampling_mesh: jax.sharding.Mesh,
                tokenizer: data.Tokenizer, workdir: pathlib.Path | None = None
                ) -> tuple[DecoderConfig, list[Phase]]:
  """The model and the phases of a config, refused where they do not go together, whatever the data is.

  Args:
    config: of all phases.
    mesh, sampling_mesh, tokenizer: see `builders.Parts`.
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
  learning = Learning(
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
    found.append(references.build(own, parts, terms, aggregations, to_trajectories(own, terms, tokenizer),
                                  decoder=decoder, mesh=mesh, tokenizer=tokenizer, where=here))
  return found


def make_readers(config: ml_collections.ConfigDict, phases: Sequence[Phase], tokenizer: data.Tokenizer
                 ) -> tuple[data.TaskBuilder, data.PairBuilder | None]:
  """What makes tasks of rows, and pairs of answers if a phase compares any."""
  builder = inputs.builder(config, tokenizer)
  paired = any(phase.kind in PAIRED or pieces.asks_pairs(phase.settings) for phase in phases)
  ranges = compose.ranges_of([term for phase in phases for term in phase.learning.terms])
  return builder, inputs.pair_builder(config, builder, ranges) if paired else None


def to_trajectories(settings: ml_collections.ConfigDict, terms: Sequence[Callable], tokenizer: data.Tokenizer
                    ) -> Callable[[list], list[Trajectory]]:
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


def sizes_of(phase: Phase, builder: data.TaskBuilder, pair_builder: data.PairBuilder | None,
             source: data.Source) -> tuple[list[int], Sequence[tuple[int, Sequence[int]]]]:
  """Tokens of some examples, and of the parts of pairs, see `shape_of`."""
  if phase.kind in PAIRED:
    sequences_of = to_trajectories(phase.settings, phase.learning.terms, builder.tokenizer)
    examples = data.linked(inputs.first_tasks(pair_builder, source))
    made = [sequences_of([example]) for example in examples]
    refusals.check_pairs(phase.learning.terms, made)
    return [sum(len(t.tokens) for t in pair) for pair in made], _prompts_of(made)
  if pieces.asks_pairs(phase.settings):
    return [len(pair.task.prompt) for pair in inputs.first_tasks(pair_builder, source)], ()
  return [len(task.prompt) for task in inputs.first_tasks(builder, source,
                                                          solved=phase.kind == "sft")], ()


def _prompts_of(made):
  """Tokens of the prompt and of each answer of the groups; nothing where examples make several."""
  if any(len({t.group for t in group}) != 1 for group in made):
    return ()
  heads = [shared_length(group) for group in made]
  return [(head, [len(t.tokens) - head for t in group]) for head, group in zip(heads, made)]


def make_shape(phase: Phase, decoder: DecoderConfig, mesh: jax.sharding.Mesh, sizes: Sequence[int],
               shared: Sequence[tuple[int, Sequence[int]]] = ()) -> Shape:
  """The shape of a phase's batches; `sizes` and `shared` as in `shape_of`."""
  return shape_of(phase.settings, decoder, mesh, sizes, kept_bytes=kept_bytes(phase, mesh),
                  compares=any(map(compose.is_by_sequence, phase.learning.terms)),
                  shared=shared)


def kept_bytes(phase: Phase, mesh: jax.sharding.Mesh) -> int:
  """What one device keeps while it trains: the state, the sum of the gradients and the next of them."""
  state = state_of(phase.learning, mesh)
  return sharding.bytes_of(state) + 2 * gradient_bytes(phase.learning, state)


def gradient_bytes(learning: Learning, state: states.TrainState) -> int:
  """Of a gradient on one device, float32; the state may be abstract."""
  return sharding.bytes_of(learning.part(state.params), 4)


def state_of(learning: Learning, mesh: jax.sharding.Mesh) -> states.TrainState:
  """Shapes, types and shardings of a phase's state."""
  return states.abstract_state(learning.decoder, mesh, learning.optimizer,
                               frozen=learning.kept, carried=learning.carried, trains=learning.trains,
                               others=learning.others, offload=learning.offload)


def rehearse(phase: Phase, mesh: jax.sharding.Mesh, shape: Shape) -> Rehearsal:
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
