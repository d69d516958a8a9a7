"""`jaxrl reproduce`: runs a method and its baselines, judges its claims, writes what came out."""

from collections.abc import Callable, Sequence
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from typing import Any

import jax

from jaxrl import config as configs
from jaxrl.evidence import methods
from jaxrl.evidence import picture
from jaxrl.evidence import runs
from jaxrl.evidence import table
from jaxrl.evidence import verdict

BUDGET = ("sequences", "loss_tokens", "sampled_sequences", "sampled_tokens")
VERSIONS = ("jaxrl", "jax", "jaxlib", "flax", "optax", "numpy")


def reproduce(slug: str, seeds: Sequence[int], *, workdir: pathlib.Path, results: pathlib.Path,
              steps: int = 0, report: Callable[[str], None] = print) -> dict[str, Any]:
  """Measures the claims of one method.

  Args:
    slug: name of the method.
    seeds: of all arms.
    workdir: where runs are kept, continued by the same call, and reused by whatever wants the same
      run: methods with one baseline share it.
    results: where `<slug>.json` and `<slug>.png` go; `RESULTS.md` is drawn anew, see `table.write`.
    steps: updates of each run instead of the evidence's own, for a trial, which is not written
      to `results`.

  Raises:
    ValueError: a metric that its runs do not have, or as `check`.
  """
  evidence = check(slug, seeds, results=results, steps=steps)
  began = time.time()
  start = (None if evidence.warm is None else
           runs.warm_start(evidence.warm, workdir / "warm", report))
  teachers = {name: runs.warm_start({**(evidence.warm or {}), **fields}, workdir / "warm", report)
              for name, fields in evidence.teachers.items()}
  found: dict[str, list[dict]] = {}
  places: dict[str, list[pathlib.Path]] = {}
  for arm in evidence.arms:
    for seed in seeds:  # one after the other, while the programs of the arm are remembered
      config = runs.arm_config(evidence, arm, seed, start, teachers, steps=steps)
      place = runs.place_of(config, workdir / "runs")
      again = "" if not (place / "summary.json").exists() else " (a run that had ended before)"
      metrics = runs.measure(config, place, evidence.measure)
      found.setdefault(arm, []).append(metrics)
      places.setdefault(arm, []).append(place)
      report(f"{slug}: {arm}, seed {seed}{again}: " + ", ".join(
          f"{c.metric} {_metric(metrics, c, slug):.4g}" for c in evidence.claims
          if arm in (c.method, c.baseline)))
  claims = [verdict.judge(c, *([_metric(m, c, slug) for m in found[arm]]
                               for arm in (c.method, c.baseline))) for c in evidence.claims]
  minutes = sum(m["seconds"] for arm in found.values() for m in arm) / 60
  content = dict(
      slug=slug, verdict=verdict.of_method(claims), title=methods.title(slug), reported=evidence.reported,
      seeds=list(seeds), claims=claims,
      budget={arm: {name: sum(m[f"total/{name}"] for m in ms) / len(ms)
                    for name in BUDGET} for arm, ms in found.items()},
      config={arm: configs.to_dict(runs.arm_config(
          evidence, arm, seeds[0], start and pathlib.Path("warm"),
          {name: pathlib.Path(name) for name in teachers})) for arm in evidence.arms},
      versions={name: _version(name) for name in VERSIONS} | {"python": platform.python_version()},
      machine=f"{jax.devices()[0].device_kind} x {jax.device_count()}", minutes=round(minutes, 2),
      date=time.strftime("%Y-%m-%d", time.gmtime(began)))
  if steps:
    report("a trial: nothing is written to the results")
    return content
  results.mkdir(parents=True, exist_ok=True)
  temporary = results / f"{slug}.tmp"
  temporary.write_text(json.dumps(content, indent=1) + "\n")
  os.replace(temporary, results / f"{slug}.json")  # at once, for a table reads all that are there
  picture.draw(content, places, results / f"{slug}.png")
  table.write(results)
  return content


def check(slug: str, seeds: Sequence[int], *, results: pathlib.Path, steps: int = 0
          ) -> methods.Evidence:
  """What `reproduce` would measure; whatever is wrong with its arguments is refused.

  Raises:
    ValueError: no such method, no training-based claim, seeds or steps that mean nothing, no folder
      to write to, or fewer seeds than the result that is there already.
  """
  evidence = methods.evidence_of(slug)
  if evidence is None:
    raise ValueError(f"no run tests a claim of {slug!r}: configs/methods/"
                     f"{methods.path_of(slug).name} has no get_evidence()")
  if len(set(seeds)) != len(seeds) or not seeds or min(seeds) < 0:
    raise ValueError(f"--seeds={','.join(map(str, seeds))}: give different seeds from 0 on, as in "
                     "0,1,2")
  if steps < 0:
    raise ValueError(f"--steps={steps}: give a number of updates above 0, or leave it out for those "
                     "of the config")
  if results.exists() and not results.is_dir():
    raise ValueError(f"--results={results} is a file; name a directory, which need not exist")
  before = methods.result_of(slug, results)
  if before and not steps and len(before["seeds"]) > len(seeds):
    raise ValueError(f"{results / slug}.json holds {len(before['seeds'])} seeds, and --seeds="
                     f"{','.join(map(str, seeds))} would replace them by fewer: give as many, or "
                     "another --results")
  return evidence


def _metric(metrics, claim, slug):
  if claim.metric not in metrics:
    raise ValueError(f"claim {claim.text!r} of {slug} is about {claim.metric!r}, which its runs do "
                     f"not measure{methods.nearest(claim.metric, metrics)}")
  return metrics[claim.metric]


def _version(name):
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return "absent"
