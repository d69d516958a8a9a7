"""What is refused in settings that are each of the right kind, before anything is computed."""

import collections
from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import ml_collections

from jaxrl import compose
from jaxrl import sharding
from jaxrl.batch import PREFERENCE, Trajectory
from jaxrl.evaluation import policy
from jaxrl.models import DecoderConfig
from jaxrl.models import outputs
from jaxrl.models import rope_configs
from jaxrl.training import frozen
from jaxrl.training import inputs
from jaxrl.training import pieces
from jaxrl.training import state as states
from jaxrl.training import transfer

AT_LEAST = {  # smallest values of settings that nothing else checks
    "seed": 0, "batch.examples": 1, "batch.row_length": 1, "batch.micro_batch_rows": 0,
    "batch.vocabulary_chunk": 0,
    "optimizer.learning_rate": 0, "optimizer.clip_norm": 0, "optimizer.max_bad_steps": 1,
    "rollout.prompts": 1, "rollout.updates": 1, "rollout.staleness": 0, "rollout.max_rows": 1,
    "rollout.max_resample": 0, "rollout.max_failure_rate": 0, "rollout.max_logprob_gap": 0,
    "evaluate.problems": 0, "evaluate.pairs": 0, "evaluate.samples": 0, "evaluate.temperature": 0, "evaluate.every": 0,
    "checkpoint.every": 0, "checkpoint.keep": 1, "log.samples_every": 0, "log.curves_every": 0}


def check_phase(phase: Any, mesh: jax.sharding.Mesh, problems: Sequence[Any], pairs: Sequence[Any]) -> None:
  """Refuses settings that are out of range or do not go together.

  Args:
    phase: a `phases.Phase`, as in all of these.
    problems, pairs: held out, to evaluate on the way.
  """
  s, where = phase.settings, f"config.{phase.name}"
  for path, least in AT_LEAST.items():
    value = functools.reduce(lambda section, name: section[name], path.split("."), s)
    if not value >= least:
      raise ValueError(f"config.{path}={value} in phase {phase.name}; it must be at least {least}")
  rows, parts = s.batch.micro_batch_rows, mesh.shape["data"] * mesh.shape["fsdp"]
  if rows % parts:
    fitting = sorted({parts * max(rows // parts, 1), parts * (rows // parts + 1)})
    raise ValueError(f"config.batch.micro_batch_rows={rows} does not divide over data x fsdp = "
                     f"{parts} devices: use {' or '.join(map(str, fitting))}")
  if phase.kind != "evaluate":
    _check_signals(phase.learning)
  _check_adapters(phase)
  _check_master(phase, mesh)
  pieces.sampling(s.rollout, ())
  pieces.episode(s)
  pieces.asking(s)
  _check_samples(s, pieces.edits_of(s))
  if phase.kind == "rl" and s.rollout.filter_by and not s.rollout.filter_zero_variance:
    raise ValueError(f"config.rollout.filter_by={s.rollout.filter_by!r} filters nothing without config."
                     "rollout.filter_zero_variance=True")
  if phase.kind == "rl" and s.rollout.temperature <= 0:
    raise ValueError(f"config.rollout.temperature={s.rollout.temperature}: greedy samples have no "
                     "policy gradient; use a positive temperature")
  if s.evaluate.samples and not 0 < s.evaluate.k <= s.evaluate.samples:
    raise ValueError(f"config.evaluate.k={s.evaluate.k} must be between 1 and config.evaluate."
                     f"samples={s.evaluate.samples}")
  until = s.get("until")
  if until is not None:
    _check_until(until, f"{where}.until", pairs)
  if (until is not None or s.evaluate.every) and not problems and not pairs:
    what = f"{where}.until" if until is not None else f"config.evaluate.every={s.evaluate.every}"
    raise ValueError(f"{what} evaluates on the way, so it needs problems that are not trained on: "
                     "set config.data.validation, and config.evaluate.problems to at least 1")


def _check_adapters(phase):
  """Refuses names of adapters that the model does not have."""
  there = [adapter.name for adapter in phase.learning.decoder.adapters]
  for name in phase.learning.trains:
    if name not in there:
      raise ValueError(f"config.optimizer.adapters={list(phase.learning.trains)} in phase {phase.name}: "
                       + (f"config.model.adapters has no {name!r}{compose.nearest(name, there)}" if there else
                          "config.model.adapters is empty; name them there, or leave this out"))
  for name in phase.learning.kept:
    if not there and not phase.learning.models[name].adapted:
      where = "config.reference" if name == "reference" else f"config.frozen.{name}"
      raise ValueError(f"{where}.adapted=False in phase {phase.name} switches adapters off, but "
                       "config.model.adapters is empty: leave it out")


def _check_master(phase, mesh):
  """Refuses a master of parameters that are of its type."""
  dtype, learning = phase.settings.optimizer.master_dtype, phase.learning
  trained = jax.tree.leaves(learning.part(states.abstract_parameters(learning.decoder, mesh)))
  if dtype and all(x.dtype == dtype for x in trained):
    what = ("what it trains, adapters, is float32 in any model" if learning.decoder.adapters else
            f"config.model.param_dtype is {learning.decoder.param_dtype!r}")
    raise ValueError(f"config.optimizer.master_dtype={dtype!r} in phase {phase.name} keeps a copy of "
                     f"parameters of a smaller type, but {what}: set it to ''")


def _check_signals(learning):
  """Refuses terms and pieces of credit that read what the model has no head for."""
  for section, pieces_of in (("objective", learning.terms), ("advantage", learning.advantage)):
    for i, piece in enumerate(pieces_of):
      with compose.named(f"config.{section}[{i}] ({compose.name_of(piece)})"):
        read = learning.sources([piece])
        for source in sorted({source for source, _ in read}):
          outputs.check_signals(learning.decoder_of(source), sorted(n for s, n in read if s == source))
        _check_vocabularies(learning, {name for _, name in read})


def _check_vocabularies(learning, names):
  """Refuses to compare whole distributions of different length."""
  ours, theirs = learning.decoder.vocab_size, learning.decoder_of(frozen.REFERENCE).vocab_size
  if outputs.DIVERGENCE in names and ours != theirs:
    raise ValueError(f"signal {outputs.DIVERGENCE!r} is over the whole vocabulary, of {ours} ids here and of "
                     f"{theirs} in config.reference.source: set config.model.vocab_size={max(ours, theirs)} "
                     "for both")


def _check_samples(settings, built):
  """Refuses edits that choose among the samples of a prompt where there is one only."""
  episode = settings.rollout.episode
  for i, edit in enumerate(built):
    if PREFERENCE in compose.supplied_by(edit)[1] and episode.get("samples") == 1:
      raise ValueError(f"config.rollout.edits[{i}]: {compose.name_of(edit)} compares the samples of a "
                       f"prompt, and {episode.name!r} draws one: use config.rollout.episode.samples=2 "
                       "or more")


def _check_until(until, where, pairs):
  wanted = ("metric", "at_least", "every")
  if not isinstance(until, ml_collections.ConfigDict) or set(until) != set(wanted):
    raise ValueError(f"{where} needs {', '.join(wanted)}, as in dict(metric='greedy_accuracy', "
                     f"at_least=0.4, every=50); it is {pieces.plain(until)}")
  if until.metric not in policy.GREEDY_METRICS and not (pairs and until.metric.startswith("pairs/")):
    raise ValueError(f"{where}.metric={until.metric!r} is not measured on the way"
                     f"{compose.nearest(until.metric, policy.GREEDY_METRICS)}")
  if not until.every >= 1:
    raise ValueError(f"{where}.every={until.every} must be a number of updates, at least 1")


def check_frozen(phases: Sequence[Any]) -> None:
  """Refuses frozen models that no phase keeps, averages that would stand still, and to sample another
  run's model."""
  kept = {name for phase in phases for name in (*phase.learning.kept, *phase.learning.others)}
  for phase in phases:
    if phase.learning.asks_reference and frozen.REFERENCE in phase.learning.decoders:
      raise ValueError(f"config.reference.source: the episode of phase {phase.name} asks the reference, and "
                       "sampler and likelihoods are of this run's own shape: leave the source out")
    if (source := phase.settings.reference.source) and frozen.REFERENCE not in kept:
      raise ValueError(f"config.reference.source={source!r}, but nothing reads the reference: no term and no "
                       "piece of credit declares a signal of it, such as 'reference_logprobs'; leave it out")
    for name in phase.learning.kept:
      decay, dtype = phase.learning.models[name].decay, phase.learning.decoder.param_dtype
      decoder = phase.learning.decoder  # whose adapters, of float32, are all that is trained without these
      of_adapters = decoder.adapters and not decoder.heads_on_top and not decoder.critic
      if decay and dtype != "float32" and not of_adapters:
        raise ValueError(f"the model {name!r} of phase {phase.name} is a moving average (decay={decay}) of "
                         f"{dtype} parameters, whose steps are too small for that type: use "
                         "config.model.param_dtype='float32', or decay=0")
  for name in dict.fromkeys(name for phase in phases for name in phase.settings.frozen):
    if name not in kept:
      raise ValueError(f"config.frozen.{name} describes a model that nothing reads: no term and no piece "
                       f"of credit declares a signal of it, such as '{name}_logprobs', and no model that is "
                       "read follows it; leave it out")


def check_lengths(phases: Sequence[Any], decoder: DecoderConfig, data: ml_collections.ConfigDict) -> None:
  """Refuses sequences for which `longrope` has other factors than those that turn all of them."""
  scaling = dict(decoder.rope_scaling)
  if scaling.get("rope_type") != "longrope":
    return
  original = scaling[rope_configs.ORIGINAL]
  lengths = [inputs.longest(data, phase.settings.rollout) for phase in phases]
  longest = 0 if 0 in lengths else max(lengths)
  if not longest or longest > max(original, decoder.rope_length):
    raise ValueError(
        f"sequences of this run may have {longest or 'any number of'} tokens (config.data.max_prompt_tokens + "
        "the larger of config.data.max_completion_tokens and config.rollout.max_tokens), but this model turns "
        f"those of more than {original} tokens by long_factor and others by short_factor, and a run has one "
        f"table for all: stay at {original}, or set config.model.rope_length={longest or '(the longest)'}, so "
        "that long_factor is for all of them")


def check_ahead(phases: Sequence[Any], decoder: DecoderConfig, mesh: jax.sharding.Mesh,
                sampling_mesh: jax.sharding.Mesh) -> None:
  """Refuses what cannot sample while it trains, and devices that nothing would use."""
  ahead = next((phase for phase in phases if pieces.samples_ahead(phase)), None)
  apart = sampling_mesh != mesh
  if ahead is None:
    if apart:
      raise ValueError(f"config.mesh.sampling keeps {sampling_mesh.size} devices for samples of "
                       "older parameters, but no phase wants any: use --config.rollout.staleness=1 "
                       "or --config.mesh.sampling.data=0")
    return
  where = f"config.rollout.staleness={ahead.settings.rollout.staleness} in phase {ahead.name}"
  if jax.process_count() > 1:
    raise ValueError(f"{where} samples in a thread, whose order of programs {jax.process_count()} "
                     "processes could not agree on: use --config.rollout.staleness=0 or one "
                     "process")
  if not apart and mesh.size > 1:  # programs of two threads would wait for each other's devices
    raise ValueError(f"{where} needs devices that only sample, beside those that train, for there "
                     f"are {mesh.size}: leave some to sampling with --config.mesh.sampling.data="
                     f"{mesh.size // 2}, or use --config.rollout.staleness=0")
  if apart:
    try:
      sharding.check_divisible(decoder, sampling_mesh)
    except ValueError as error:
      raise ValueError(str(error).replace("mesh.", "mesh.sampling.")) from error
    transfer.copier(states.parameter_shardings(decoder, mesh), sampling_mesh)


def check_pairs(terms: Sequence[Callable], made: Sequence[Sequence[Trajectory]], where: str = "") -> None:
  """Refuses losses of pairs for sequences of which no two belong together: they would be 0 without a word.

  Args:
    terms: of the objective.
    made: what the first rows became.
    where: before the place of the term in messages.
  """
  counts = sorted({n for group in made for n in collections.Counter(t.group for t in group).values()})
  for i, term in enumerate(terms):
    if made and 2 not in counts and compose.is_of_pairs(term):
      raise ValueError(f"{where}config.objective[{i}]: {compose.name_of(term)} compares pairs, but the first "
                       f"rows of config.data.train hold {' or '.join(map(str, counts))} answers each, which "
                       "have no loss: make pairs of lists with config.data.transforms=[dict(name="
                       "'pair_answers')], or use a loss of lists or of single answers, such as plackett_luce, "
                       "ordinal or kto")
