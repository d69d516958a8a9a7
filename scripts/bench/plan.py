"""How near plans are to what runs take, on this machine's CPU.

  python scripts/bench/plan.py

plans and then makes a few updates of models of some sizes, each in a process of its own, and compares the
planned peak with the growth of resident memory: its peak less that of the same run of the smallest model,
which is Python, JAX and their compilers. Writes results/bench/plan.md.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
SMALLEST = dict(layers=1, d_model=16, heads=2, kv_heads=2, d_ff=16)
SIZES = {"19M": dict(layers=6, d_model=512, heads=8, kv_heads=4, d_ff=1536),
         "68M": dict(layers=10, d_model=768, heads=12, kv_heads=4, d_ff=2304)}
KINDS = {
    "sft": ["--config.phases=('sft',)", "--config.sft.steps=2", "--config.sft.batch.examples=16",
            "--config.sft.until=None", "--config.batch.row_length=512",
            "--config.data.task.digits=18", "--config.data.task_size=2000",
            "--config.data.max_prompt_tokens=64", "--config.data.max_completion_tokens=64"],
    "rl": ["--config.phases=('rl',)", "--config.rl.steps=2", "--config.rl.until=None",
           "--config.rollout.prompts=4", "--config.rollout.max_tokens=64",
           "--config.rollout.filter_zero_variance=False"]}
COMMON = ["--config=configs/quickstart.py", "--config.optimizer.warmup_steps=0", "--config.data.test=",
          "--config.data.validation=", "--config.compilation_cache=off", "--config.checkpoint.every=0"]
PLAN = """
import json, sys
from jaxrl import config as configs, planning
from jaxrl.cli import OVERRIDE
spec, *flags = sys.argv[1:]
config = configs.load(spec)
configs.override(config, dict(OVERRIDE.fullmatch(flag).groups() for flag in flags))
plan = planning.plan(config, planning.find())
print(json.dumps(dict(peak=plan.worst.peak, parameters=plan.parameters)))
"""


def call(*arguments: str) -> str:
  """What a Python process printed.

  Raises:
    RuntimeError: it failed; ends with its last words.
  """
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"{' '.join(arguments)[:300]}\n{done.stderr[-2000:]}")
  return done.stdout


def flags_of(kind: str, model: dict[str, int]) -> list[str]:
  """Command-line flags of a case."""
  return [*COMMON, *KINDS[kind], *(f"--config.model.{name}={value}" for name, value in model.items())]


def peak_bytes(kind: str, model: dict[str, int]) -> float:
  """Largest resident memory of a run."""
  with tempfile.TemporaryDirectory() as workdir:
    call("-m", "jaxrl", "run", "--quiet", f"--workdir={workdir}/run", *flags_of(kind, model))
    summary = json.loads((pathlib.Path(workdir) / "run" / "summary.json").read_text())
  return summary["peak_memory"]["host_mb"] * 1e6


def measure(kind: str, size: str, known: dict[str, float]) -> dict[str, float]:
  """Planned and grown bytes of a case; `known` keeps the peaks of runs of the smallest model, by kind."""
  if kind not in known:
    known[kind] = peak_bytes(kind, SMALLEST)
  spec, *flags = flags_of(kind, SIZES[size])
  plan = json.loads(call("-c", PLAN, spec.removeprefix("--config="), *flags))
  return dict(parameters=plan["parameters"], planned=plan["peak"],
              grown=peak_bytes(kind, SIZES[size]) - known[kind])


def markdown(cases: dict[str, dict[str, float]]) -> str:
  """The table."""
  rows = [f"| {name} | {c['parameters'] / 1e6:.0f} | {c['planned'] / 1e6:.0f} | {c['grown'] / 1e6:.0f} | "
          f"{c['planned'] / c['grown']:.2f} |" for name, c in sorted(cases.items())]
  return "\n".join([
      "# Plans against runs\n",
      "Made by `python scripts/bench/plan.py`: the planned peak of a phase, and the peak of resident memory "
      "of a run of it less that of the smallest model, on a CPU.\n",
      "| case | parameters, M | planned, MB | grown, MB | planned / grown |", "| --- | --- | --- | --- | --- |",
      *rows]) + "\n"


def main() -> None:
  names = [f"{kind}:{size}" for kind in KINDS for size in SIZES]
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--cases", default=",".join(names), help=f"of {', '.join(names)}; others are kept")
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "bench",
                      help="directory of plan.json and plan.md")
  args = parser.parse_args()
  kept = args.out / "plan.json"
  found = json.loads(kept.read_text()) if kept.exists() else {"smallest": {}, "cases": {}}
  for name in args.cases.split(","):
    found["cases"][name] = measure(*name.split(":"), found["smallest"])
    kept.write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "plan.md").write_text(markdown(found["cases"]))
    print(name, found["cases"][name], flush=True)


if __name__ == "__main__":
  main()
