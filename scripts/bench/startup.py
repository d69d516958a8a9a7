"""How long `jaxrl run` takes from the start of its process to the end of its first update.

  python scripts/bench/startup.py               # writes results/bench/startup.json
  python scripts/bench/startup.py --repeats=5 --only=grpo

Every measurement is a fresh process. Cold: no compiled program is on disk. Warm: those of a run
before are. The first update ends when its metrics are on the host; there is no evaluation before.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
GRPO = """
from configs import base

def get_config():
  config = base.get_config()
  config.data.train = "task:addition"
  config.data.task = dict(digits=3, answer_format="reversed")
  config.data.max_prompt_tokens = config.data.max_completion_tokens = 16
  config.tokenizer.alphabet = "0123456789+="
  config.rollout.update(prompts=16, episode=dict(name="group", samples=8), max_tokens=64)
  config.log.update(samples_every=0, curves_every=0)
  config.phases = ("rl",)
  config.rl = dict(kind="rl", steps=30)
  return config
"""
SFT = """
from configs import quickstart

def get_config():
  config = quickstart.get_config()
  config.data.test = config.data.validation = ""
  config.phases = ("sft",)
  config.sft.until = None
  return config
"""
# The child stops itself at its first row of metrics, when everything else is known.
CHILD = """
import json, os, sys, time

def since_start():
  started = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19])
  return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")

parts = {"interpreter": since_start()}
from jaxrl import cli
from jaxrl.training import builders, loop, reporting

def after(module, name, label):
  function = getattr(module, name)
  def call(*args, **kwargs):
    result = function(*args, **kwargs)
    parts[label] = since_start()
    return result
  setattr(module, name, call)

def first_step(reporter, *_):
  parts["first_update"] = since_start()
  compiles = reporter.compiles
  json.dump(dict(parts=parts, cpu=time.process_time(), programs=compiles.count,
                 from_disk=compiles.from_disk, compile_seconds=compiles.seconds,
                 names=compiles.programs), open(out, "w"))
  os._exit(0)

parts["imports"] = since_start()
after(builders, "build_parts", "config_data_and_tracing")
after(builders, "start_state", "parameters_and_optimiser")
reporting.Reporter.step = first_step
out = sys.argv[-1]
cli.main(sys.argv[1:-1])
"""


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--only", choices=("grpo", "sft"), default="")
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results/bench/startup.json")
  options = parser.parse_args()
  rows = [measure(name, config, options.repeats) for name, config in (("grpo", GRPO), ("sft", SFT))
          if options.only in ("", name)]
  options.out.parent.mkdir(parents=True, exist_ok=True)
  options.out.write_text(json.dumps(rows, indent=1) + "\n")
  for row in rows:
    print(f"{row['run']}: cold {row['cold']['first_update']:.2f} s, warm "
          f"{row['warm']['first_update']:.2f} s (best {row['warm']['best']:.2f} s, CPU "
          f"{row['warm']['cpu']:.2f} s), {row['warm']['programs']} programs")
    for label, seconds in row["warm"]["parts"].items():
      print(f"  {label:<26}{seconds:6.2f} s after the start")


def measure(name, config, repeats):
  """One row: medians over fresh processes, of the parts too."""
  with tempfile.TemporaryDirectory() as place:
    place = pathlib.Path(place)
    (place / "config.py").write_text(config)
    (place / "child.py").write_text(CHILD)
    # A run before each measurement fills what the system caches of files.
    child(place, "none", "discarded")
    cold = [child(place, f"cold{i}", f"cold{i}") for i in range(repeats)]
    warm = [child(place, "cold0", f"warm{i}") for i in range(repeats)]
  return dict(run=name, repeats=repeats, cold=median(cold), warm=median(warm))


def child(place, cache, workdir):
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "true",
                              "JAX_COMPILATION_CACHE_DIR": str(place / cache)}
  out = place / f"{workdir}.json"
  subprocess.run([sys.executable, "child.py", "run", "--config=config.py", f"--workdir={workdir}",
                  "--quiet", str(out)], cwd=place, env=environment, check=True,
                 stdout=subprocess.DEVNULL)
  return json.loads(out.read_text())


def median(runs):
  def of(pick):
    return round(statistics.median(pick(run) for run in runs), 3)
  return dict(
      first_update=of(lambda r: r["parts"]["first_update"]),
      best=round(min(r["parts"]["first_update"] for r in runs), 3), cpu=of(lambda r: r["cpu"]),
      compile_seconds=of(lambda r: r["compile_seconds"]), programs=runs[0]["programs"],
      from_disk=runs[0]["from_disk"], names=runs[0]["names"],
      parts={label: of(lambda r: r["parts"][label]) for label in runs[0]["parts"]})


if __name__ == "__main__":
  main()
