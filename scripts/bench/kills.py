"""Kills one run again and again with `kill -9`, and compares where it ends with one left in peace.

  python scripts/bench/kills.py                 # 30 kills; writes results/bench/kills.json
  python scripts/bench/kills.py --kills=4 --out=/tmp/kills.json

Moments are random: while the process starts, between updates, within them, while it saves. Equal
means every bit of the last checkpoint (parameters, optimiser, counters, PRNG key) and every value in
metrics.jsonl and samples/*.jsonl but clocks and counts of compilations.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
CLOCKS = ("_seconds", "tokens_per_second", "compilations", "wait_fraction")
CONFIG = """
from configs import base

def get_config():
  config = base.get_config()
  config.data.train = config.data.validation = config.data.test = "task:addition"
  config.data.update(task=dict(digits=1), task_size=300, max_prompt_tokens=8,
                     max_completion_tokens=8)
  config.tokenizer.alphabet = "0123456789+="
  config.model.update(layers=1, d_model=16, heads=2, kv_heads=1, d_ff=32)
  config.batch.update(row_length=32, micro_batch_rows=2, examples=8)
  config.rollout.update(prompts=4, episode=dict(name="group", samples=4), max_tokens=4, updates=2)
  config.evaluate.update(problems=8, samples=0, every=10)
  config.checkpoint.every = 3
  config.log.update(samples_every=2, curves_every=0)
  config.phases = ("sft", "rl")
  config.sft = dict(kind="sft", steps=6, objective=[dict(name="cross_entropy")])
  config.rl = dict(kind="rl", steps=STEPS, objective=[
      dict(name="clipped_surrogate"), dict(name="kl", beta=0.1)])
  return config
"""


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results/bench/kills.json")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as place:
    result = compare(pathlib.Path(place), options.kills, random.Random(options.seed))
  options.out.parent.mkdir(parents=True, exist_ok=True)
  options.out.write_text(json.dumps(result, indent=1) + "\n")
  print(json.dumps(result, indent=1))
  sys.exit(0 if result["identical"] else 1)


def compare(place: pathlib.Path, kills: int, chance: random.Random) -> dict:
  """Runs to the end once in peace and once killed -> what was found, as written to the file."""
  (place / "tiny.py").write_text(CONFIG.replace("STEPS", str(2 * kills + 8)))
  finish(place, "whole")
  whole = record(place / "whole")
  last = max(row["step"] for row in whole["metrics.jsonl"])
  moments = []
  while len(moments) < kills:
    moments.append(kill(place, "killed", chance, last, kills - len(moments)))
  finish(place, "killed")
  killed = record(place / "killed")
  differing = [name for name in whole.keys() | killed.keys() if whole.get(name) != killed.get(name)]
  differing += differing_arrays(place / "whole", place / "killed", last)
  return dict(kills=kills, updates=last, identical=not differing, differing=sorted(differing),
              killed_after_update=[m[0] for m in moments],
              while_starting=sum(m[1] == "starting" for m in moments),
              while_saving=sum(m[2] for m in moments))


def start(place, name):
  environment = os.environ | {
      "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
      "JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(place / "cache")}
  log = open(place / f"{name}.log", "ab")
  with log:
    return subprocess.Popen(
        [sys.executable, "-m", "jaxrl", "run", "--config=tiny.py", f"--workdir={name}", "--quiet"],
        cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(place, name):
  if code := start(place, name).wait(timeout=1800):
    raise SystemExit(f"the run ended with {code}:\n{(place / f'{name}.log').read_text()}")


def kill(place, name, chance, last, left):
  """Starts the run and kills it at a random moment -> (update, stage, whether it was saving)."""
  workdir = place / name
  before = updates(workdir)
  # A share of the updates that are left; 0 kills while it starts, or before anything new is made.
  wanted = chance.randint(0, max(1, 2 * (last - before - 4) // (left + 1)))
  untouched = touched(workdir)  # rows of updates that are going to be made again are still there
  process = start(place, name)
  began, target = time.monotonic(), before + wanted
  pause = chance.random() * (4.0 if wanted == 0 else 0.3)
  while wanted and (touched(workdir) == untouched or newest_row(workdir) < target):
    if process.poll() is not None:
      raise SystemExit(f"the run ended by itself:\n{(place / f'{name}.log').read_text()}")
    if time.monotonic() - began > 600:
      raise SystemExit(f"no update in 600 s:\n{(place / f'{name}.log').read_text()}")
    time.sleep(0.002)
  time.sleep(pause)
  process.send_signal(signal.SIGKILL)
  if process.wait(timeout=60) == 0:
    raise SystemExit("the run ended before it could be killed; make it longer")
  # What an earlier kill has left is cleared away by then, if it came as far as an update.
  saving = wanted > 0 and any("tmp" in p.name for p in (workdir / "checkpoints").glob("*"))
  made = newest_row(workdir)
  print(f"killed after update {made}{', starting' * (not wanted)}{', saving' * saving}", flush=True)
  return made, "starting" if not wanted else "running", saving


def updates(workdir):
  """The update that a restart continues after."""
  return max((int(path.name) for path in (workdir / "checkpoints").glob("*")
              if path.name.isdigit()), default=0)


def touched(workdir):
  """What changes with every write to the metrics."""
  path = workdir / "metrics.jsonl"
  return path.stat().st_mtime_ns if path.exists() else None


def newest_row(workdir):
  try:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["step"] if lines else 0
  except (OSError, ValueError):  # not there yet, or a row half written
    return 0


def record(workdir: pathlib.Path) -> dict:
  """Every row recorded of a run, by file, without what a clock says."""
  def kept(row):
    return {key: value for key, value in row.items() if not key.endswith(CLOCKS)}
  return {path.name: [kept(json.loads(line)) for line in path.read_text().splitlines()]
          for path in [workdir / "metrics.jsonl", *sorted((workdir / "samples").glob("*.jsonl"))]}


def differing_arrays(one: pathlib.Path, other: pathlib.Path, step: int) -> list[str]:
  """Names of the arrays in which the checkpoints of two runs differ in any bit."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax
  import numpy as np
  import orbax.checkpoint as ocp
  trees = [ocp.StandardCheckpointer().restore(
      workdir.absolute() / "checkpoints" / str(step) / "state") for workdir in (one, other)]
  if jax.tree.structure(trees[0]) != jax.tree.structure(trees[1]):
    return ["structure of the checkpoint"]
  same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), *trees)
  return [jax.tree_util.keystr(path) for path, equal in jax.tree_util.tree_leaves_with_path(same)
          if not equal]


if __name__ == "__main__":
  main()
