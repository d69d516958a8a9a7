"""A whole run: phases in order, evaluations around them, resuming, and what is left behind."""

import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import time
from typing import Any

import jax
import ml_collections

from jaxrl import config as configs
from jaxrl import programs
from jaxrl import sharding
from jaxrl.evaluation import policy
from jaxrl.training import builders
from jaxrl.training import compilation
from jaxrl.training import loop
from jaxrl.training import machine
from jaxrl.training import processes
from jaxrl.training import sources
from jaxrl.training import state as states
from jaxrl.training import teachers
from jaxrl.training.builders import Parts
from jaxrl.training.checkpoints import Checkpoints
from jaxrl.training.loop import Progress
from jaxrl.training.reporting import Reporter
from jaxrl.training.stopping import Stop
from jaxrl.training.stopping import Stopped

START = "start"  # the moment of the first evaluation
FREE_TO_CHANGE = ("checkpoint", "compilation_cache", "log", "mesh")  # in a run that is resumed
FREE_OF_OPTIMIZER = ("offload",)  # likewise, of config.optimizer and that of any phase


def run(config: ml_collections.ConfigDict, workdir: str | os.PathLike, *, quiet: bool = False,
        stop: Stop | None = None, keep_traced: bool = False) -> dict[str, Any]:
  """Runs all phases of a config, or what is left of them; the same call continues a killed run.

  Args:
    config: as `configs/base.py`, complete.
    workdir: where everything that the run leaves behind goes.
    quiet: plain log lines instead of a progress bar.
    stop: where to hear that the run shall stop.
    keep_traced: keeps programs as they were traced, beside those that XLA has compiled, see
      `jaxrl.programs`: for a process whose modules are as their files say.

  Returns:
    The contents of `summary.json`.

  Raises:
    ConfigError: a bad config, row or tokenizer, before anything is computed.
    TrainingFailure, RewardFailure, EpisodeFailure, CheckpointError, Diverged: the run cannot go on.
    Stopped: `stop` was asked to; the same call continues.
  """
  machine.limit_arenas()
  with machine.rare_collections():
    return _run_phases(config, workdir, quiet, stop, keep_traced)


def _run_phases(config, workdir, quiet, stop, keep_traced):
  with configs.as_config_errors():
    sharding.start_distributed()
  workdir, stop = pathlib.Path(workdir), stop or Stop()
  with configs.as_config_errors():
    config = sources.filled(config, workdir)
  plain = configs.to_dict(config)
  processes.meet("the start of a run, with its config", json.dumps(plain, sort_keys=True).encode())
  with configs.as_config_errors():
    _check_workdir(workdir, plain)
  with Reporter(workdir, quiet=quiet) as reporter, contextlib.ExitStack() as kept:
    place = compilation.use_cache(config.compilation_cache, reporter.note)
    compilation.short_locations()
    if keep_traced and isinstance(place, pathlib.Path):  # not a bucket
      kept.enter_context(programs.kept_in(place))
    with configs.as_config_errors():
      fresh = not any((workdir / "checkpoints").glob("[0-9]*"))
      parts = builders.build_parts(config, workdir, reporter.note, fresh=fresh)
    try:
      sources.keep(config, workdir)
      teachers.keep((rule.source for phase in parts.phases for rule in phase.learning.models.values()
                     if rule.source), workdir)
      reporter.config(plain)
      checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep,
                                report=reporter.note)
      try:
        with stop.patient_if_several():
          return _run(parts, checkpoints, reporter, stop)
      finally:
        checkpoints.close()
    finally:
      parts.scorer.close()


def _run(parts: Parts, checkpoints, reporter, stop) -> dict[str, Any]:
  restored = checkpoints.restore_latest(
      lambda host: builders.abstract_state(parts, parts.phases[host["phase"]]))
  progress, state, buffer = Progress(), None, None
  if restored is not None:
    progress, state, buffer = Progress(**restored.host), restored.state, restored.buffer
    if result := _finished(parts, progress, checkpoints.directory.parent):
      reporter.note(f"{checkpoints.directory.parent} holds a finished run; nothing is left to do")
      reporter.show_result(result)
      return result
    reporter.rewind(progress.updates)
    reporter.note(f"continuing phase {parts.phases[progress.phase].name} after update "
                  f"{progress.updates}")
  else:
    reporter.rewind(0)
  rng = jax.random.key_data(jax.random.key(parts.config.seed)) if state is None else state.rng
  if not progress.fitted:  # else the loop compiles another shape
    parts.compile(progress.phase)
  params = None
  if state is None and sources.begins(parts.config):
    params = sources.parameters(parts.config.model.source, parts.decoder, rng, parts.mesh,
                                sources.of_adapters(parts.config))
    reporter.note(f"starting with the parameters of {parts.config.model.source}")
  elif state is None:
    params = parts.initializing.first(states.initial_parameters)(parts.decoder, rng, parts.mesh)
    if parts.config.start:
      params = sources.continued(parts.config.start, parts.decoder, params, parts.mesh)
      reporter.note(f"starting with the parameters of {parts.config.start}")
  for index in range(progress.phase, len(parts.phases)):
    phase = parts.phases[index]
    if index > progress.phase:  # a new phase: fresh optimiser, fresh position in the data
      parts.compile(index)  # while the first batch is sampled
      params, rng, state, buffer = state.params, state.rng, None, None
      progress = dataclasses.replace(progress, phase=index, supply=None, shape=(1, 1, 1, 0), fitted=(),
                                     longest=(0, 0, 0), ended=False, updates_left=0, batch_metrics={})
      gc.collect()  # the last phase's arrays may be part of a cycle
    if state is None:
      state, params = builders.start_state(parts, phase, params, rng), None  # which frees a copy
    if index == 0 and START not in progress.evaluations:
      began = time.perf_counter()
      progress.evaluations[START] = _evaluate(parts, phase, state, progress.updates, reporter, START)
      progress.seconds[phase.name] = time.perf_counter() - began
    if phase.kind != "evaluate":
      state = _train(parts, phase, state, progress, buffer, reporter, checkpoints, stop)
    if phase.name not in progress.evaluations:
      began = time.perf_counter()
      progress.evaluations[phase.name] = _evaluate(parts, phase, state, progress.updates, reporter,
                                                   phase.name)
      progress.seconds[phase.name] = (progress.seconds.get(phase.name, 0.0)
                                      + time.perf_counter() - began)
      loop.save(checkpoints, state, progress)
    reporter.summary(summary(parts, progress, checkpoints.directory.parent))
    reporter.draw()
    if stop.agreed(progress.updates) and phase is not parts.phases[-1]:
      checkpoints.wait()
      raise Stopped(f"stopped as asked after phase {phase.name}, whose checkpoint is saved")
  checkpoints.wait()
  return reporter.finish(summary(parts, progress, checkpoints.directory.parent))


def _finished(parts, progress, workdir) -> dict[str, Any] | None:
  """The summary of a run of which nothing is left to do, None otherwise."""
  path = workdir / "summary.json"
  if parts.phases[-1].name not in progress.evaluations or not path.exists():
    return None
  written = json.loads(path.read_text())
  # A kill just before the last summary leaves that of an earlier phase.
  return written if len(written["phases"]) == len(parts.phases) else None


def _train(parts, phase, state, progress, buffer, reporter, checkpoints, stop):
  phase_run = builders.phase_run(parts, phase)
  reporter.start_phase(phase.name, phase.kind, phase.steps, int(state.step))
  with contextlib.closing(phase_run.supply):
    state = loop.train(phase_run, state, progress, buffer, reporter=reporter,
                       checkpoints=checkpoints, stop=stop)
  reporter.end_phase()
  refused = {k: n for k, n in parts.builder.counts.as_dict().items() if k != "ok"}
  if refused:
    reporter.note("rows that were not used as they are: "
                  + ", ".join(f"{k} {n}" for k, n in sorted(refused.items())))
  return state


def _evaluate(parts, phase, state, updates, reporter, moment) -> dict[str, float]:
  metrics = builders.measure(parts, phase, state, "test")
  if parts.test:
    evaluation = builders.evaluate(parts, phase, state.params, parts.test, (phase.index, updates),
                                   step=0 if moment == START else phase.steps)
    metrics |= evaluation.metrics
    rows = policy.sample_rows(evaluation.answers, {t.id: t for t in parts.test})
    reporter.samples(f"evaluation_{moment}", updates, rows, replace=True)
  if metrics:
    reporter.evaluation(moment, metrics)
  return metrics


def summary(parts: Parts, progress: Progress, workdir: pathlib.Path) -> dict[str, Any]:
  """`phases` with accuracies before and after each, and what this process has done with `rows` of
  data and samples that it `judged`; the reporter adds cost and versions."""
  rows, before = [], progress.evaluations.get(START, {})
  for phase in parts.phases:
    if phase.name not in progress.evaluations:
      break
    after = progress.evaluations[phase.name]
    rows.append(dict(name=phase.name, kind=phase.kind,
                     seconds=progress.seconds.get(phase.name, 0.0), before=before, after=after))
    before = after
  return dict(phases=rows, workdir=str(workdir), updates=progress.updates,
              rows=parts.builder.counts.as_dict(), judged=parts.scorer.counts)


def _check_workdir(workdir, plain):
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"--workdir={workdir} is a file; name a directory, which need not exist")
  path = workdir / "config.json"
  if not path.exists():
    return
  old = configs.with_defaults(json.loads(path.read_text()))
  if changed := configs.differences(_lasting(old), _lasting(plain)):
    raise ValueError(f"{workdir} holds a run with another config:\n  " + "\n  ".join(changed[:20])
                     + "\ncontinue it with the config that it was started with, or pass another "
                     f"--workdir, or delete {workdir}")


def _lasting(plain):
  """What of a plain config stays as it is while a run lasts."""
  def lasting(section):
    own = {k: v for k, v in section.get("optimizer", {}).items() if k not in FREE_OF_OPTIMIZER}
    return {k: v for k, v in section.items() if k != "optimizer"} | ({"optimizer": own} if own else {})
  kept = {k: v for k, v in plain.items() if k not in FREE_TO_CHANGE}
  return lasting({k: lasting(v) if k in plain["phases"] else v for k, v in kept.items()})
