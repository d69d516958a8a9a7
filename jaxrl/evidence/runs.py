"""The runs behind a verdict: a warm start, then each arm with each seed, by `training.run`.

Everything lies in directories of its own and is continued or reused there: a run that has ended is
read, one that was killed goes on, and the warm start is made once for each task and model.
"""

from collections.abc import Callable, Mapping, Sequence
import hashlib
import json
import pathlib
from typing import Any

import ml_collections

from jaxrl import compose
from jaxrl import config as configs
from jaxrl import evaluation
from jaxrl.evidence.methods import Evidence
from jaxrl.training import run

WARM = "configs/quickstart.py"
# A model and a task on which a run takes half a minute on two cores, and there is much to learn.
SMALL = {
    "model.layers": 2, "model.d_model": 64, "model.d_ff": 192, "model.heads": 4, "model.kv_heads": 2,
    "evaluate.problems": 400, "evaluate.samples": 16, "evaluate.k": 8, "compilation_cache": "",
    "checkpoint.keep": 1}
WARM_TEXT = {"tokenizer.alphabet": "0123456789+="}  # which arms have to share
# Of arms only; `rl` stands for all phases of that kind.
LEARNING = {"rl.optimizer.learning_rate": 3e-4, "rl.optimizer.warmup_steps": 5, "rl.steps": 200,
            "rl.evaluate.every": 10, "checkpoint.every": 50, "log.samples_every": 0,
            "log.curves_every": 0}
LATE = 0.25  # share of the updates, at the end, that metrics `late/...` are means over


def warm_start(warm: Mapping[str, Any], directory: pathlib.Path, report: Callable[[str], None]
               ) -> pathlib.Path:
  """The workdir of the supervised run that all arms begin with; made if it is not there.

  Args:
    warm: fields of the config beside those of `SMALL`.
    directory: where warm starts are kept.
  """
  config = warm_config(warm)
  workdir = place_of(config, directory)
  report(f"warm start: {workdir}")
  run.run(config, workdir, quiet=True)
  return workdir


def warm_config(warm: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """The config of a warm start; `warm` as for `warm_start`."""
  config = configs.load(WARM)
  config.phases = ("sft",)
  _set(config, {**SMALL, **WARM_TEXT, **{"sft.steps": 2000, "sft.until.at_least": 0.3}, **warm})
  return config


def place_of(config: ml_collections.ConfigDict, directory: pathlib.Path) -> pathlib.Path:
  """The workdir of a run in a directory of many, named by its config."""
  plain = json.dumps(configs.to_dict(config), sort_keys=True)
  return directory / hashlib.sha256(plain.encode()).hexdigest()[:12]


def arm_config(evidence: Evidence, arm: str, seed: int, start: pathlib.Path | None,
               teachers: Mapping[str, pathlib.Path] = {}, *, steps: int = 0) -> ml_collections.ConfigDict:
  """The config of an arm: all phases of its config but the supervised ones, which the warm start has
  made.

  Args:
    start: the warm start; None for random parameters.
    teachers: workdirs of `evidence.teachers`, by name.
    steps: instead of the evidence's own, for trials; 0 is those.
  """
  spec, own = evidence.arms[arm]
  config = configs.load(spec)
  config.phases = tuple(name for name in config.phases
                        if evidence.warm is None or config[name].kind != "sft")
  warm = {k: v for k, v in (evidence.warm or {}).items() if not k.startswith("sft.")}
  text = {} if evidence.warm is None else WARM_TEXT
  learning = {"seed": seed, "start": str(start or "")}
  found = {"{%s}" % name: str(workdir) for name, workdir in teachers.items()}
  for settings in (SMALL, text, warm, LEARNING, learning, evidence.overrides, own):
    settings = {path: found.get(value, value) if isinstance(value, str) else value
                for path, value in settings.items()}
    _set(config, _for_phases(config, settings))
  for name in config.phases:
    config[name].until = None
    if steps and "steps" in config[name]:
      config[name].steps = steps
      configs.override(config, {f"{name}.optimizer.warmup_steps": "0"})
  return config


def measure(config: ml_collections.ConfigDict, workdir: pathlib.Path, more: str = "") -> dict[str, Any]:
  """Runs a config to its end -> its metrics, and `seconds`, `updates`, `samples`.

  Args:
    more: `module:function` that measures the finished run too; empty for none.
  """
  summary = run.run(config, workdir, quiet=True)
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  found = metrics_of(summary, rows)
  found["seconds"] = sum(phase["seconds"] for phase in summary["phases"])
  if more:
    function = compose.build(more, evaluation, where="get_evidence()['measure']")
    found |= {f"measured/{name}": float(value) for name, value in function(workdir).items()}
  return found


def metrics_of(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """What claims can be about.

  `test/NAME`: on test problems and pairs after the last phase (`greedy_accuracy`, `pass_at_8`,
    `pairs/preference_accuracy`, ...).
  `late/NAME`: mean of what was logged over the last quarter of the updates.
  `mean/NAME`: mean over all updates; of `validation/greedy_accuracy` it says how fast one learns.
  `total/NAME`: sum over all updates.
  Updates are those of all phases of the last one's kind.
  """
  kinds = {phase["name"]: phase["kind"] for phase in summary["phases"]}
  last = summary["phases"][-1]
  found = {f"test/{k}": float(v) for k, v in last["after"].items()}
  updates = [row for row in rows if "loss" in row
             and kinds.get(row.get("phase"), last["kind"]) == last["kind"]]
  late = updates[-max(1, round(LATE * len(updates))):]
  for prefix, some in (("late", late), ("mean", updates)):
    for name in sorted({k for row in some for k in row}):
      values = [row[name] for row in some if isinstance(row.get(name), int | float)]
      if values:
        found[f"{prefix}/{name}"] = sum(values) / len(values)
  for name in ("sequences", "tokens", "loss_tokens", "sampled_sequences", "sampled_tokens"):
    found[f"total/{name}"] = float(sum(row.get(name, 0) for row in updates))
  return found


def curve_of(workdir: pathlib.Path, name: str) -> tuple[list[int], list[float]]:
  """A logged metric over the updates."""
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  rows = [row for row in rows if isinstance(row.get(name), int | float) and "loss" in row]
  return [row["step"] for row in rows], [row[name] for row in rows]


def _for_phases(config, settings):
  """Settings of `rl`, for each phase of that kind; the others as they are."""
  found = {}
  for path, value in settings.items():
    if not path.startswith("rl."):
      found[path] = value
      continue
    for name in config.phases:
      if config[name].kind == "rl":
        found[f"{name}.{path.removeprefix('rl.')}"] = value
  return found


def _set(config, settings):
  configs.override(config, {path: value if isinstance(value, str) else repr(value)
                            for path, value in settings.items()})
