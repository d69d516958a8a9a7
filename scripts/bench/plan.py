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
SIZES = {"19 M": dict(layers=6, d_model=512, heads=8, kv_heads=4, d_ff=1536),
         "68 M": dict(layers=10, d_model=768, heads=12, kv_heads=4, d_ff=2304)}
KINDS = {
    "sft": ["--config.phases=('sft',)", "--config.sft.steps=3", "--config.sft.until=None",
            "--config.batch.row_length=512", "--config.data.task.digits=20", "--config.data.task_size=2000"],
    "rl": ["--config.phases=('rl',)", "--config.rl.steps=2", "--config.rl.until=None",
           "--config.rollout.prompts=16", "--config.rollout.max_tokens=128",
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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "bench" / "plan.md")
  args = parser.parse_args()
  lines = ["# Plans against runs\n", "Made by `python scripts/bench/plan.py`: the planned peak of a phase and the "
           "growth of resident memory over a run of the smallest model, on CPU.\n",
           "| phase | parameters, M | planned, MB | grown, MB | planned / grown |", "| --- | --- | --- | --- | --- |"]
  for kind in KINDS:
    start = peak_bytes(kind, SMALLEST)
    for model in SIZES.values():
      spec, *flags = flags_of(kind, model)
      plan = json.loads(call("-c", PLAN, spec.removeprefix("--config="), *flags))
      grown = peak_bytes(kind, model) - start
      lines.append(f"| {kind} | {plan['parameters'] / 1e6:.0f} | {plan['peak'] / 1e6:.0f} | {grown / 1e6:.0f} | "
                   f"{plan['peak'] / grown:.2f} |")
      print(lines[-1], flush=True)
  args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
  main()
