"""Times jaxrl and its peers on the same work, in turn, and says how far each is from the machine.

  python scripts/bench/compare.py                                   # all default rows, ten minutes
  python scripts/bench/compare.py --rows grpo sft --prompt-len 512
  python scripts/bench/compare.py --rows more --out results/bench/shapes

A row is a kind of step at some shape. It is measured in rounds: in each, every system runs once, in
a process of its own, so that memory and compilation are its own. A round that other processes
disturbed is made again; a row that never gets quiet is marked, not quoted, and makes the exit
status 1. Times are medians over the steps of all rounds.

Rows: `sampling` (prompts as text to responses as text), `grpo` (a whole step: data, sampling,
reward in Python, advantage, reference, update, metrics), `grpo_no_reference`, `sft`, `dpo` (with the
reference computed on the way), `reward` (a Bradley-Terry reward model, which Tunix has none of),
`start` (from starting the process to the end of the first GRPO step, once with an empty compilation
cache and once with a full one). `grpo:vocab=16384:samples=32` is a row at another shape. With `median_len`,
responses have log-normally distributed lengths, forced on all systems alike by the model's
parameters (see `peers/common.py`).
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import costs
import environments
import machine
from peers import common
import report

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT, QUICK_OUT, PICTURE = "results/bench/compare", ".bench/quick", "docs/bench.png"
SYSTEMS = ("jaxrl", "tunix", "trl")
DEFAULT = ("sampling", "grpo", "grpo_no_reference", "grpo:vocab=16384", "sft", "dpo", "reward",
           "start")
LONG_TAIL = "new_tokens=480:median_len=30"  # the longest is 16 times the median
WIDE = "d_model=256:heads=8:kv_heads=4:d_ff=768"
MORE = tuple(f"{row}:{shape}" for shape in ("prompt_len=512", "samples=32", WIDE, LONG_TAIL)
             for row in ("sampling", "grpo")) + ("sft:sft_len=512", f"sft:{WIDE}")
SHAPE = ("prompts", "samples", "prompt_len", "new_tokens", "median_len", "sigma", "vocab", "layers",
         "d_model", "heads", "kv_heads", "d_ff", "beta", "sft_batch", "sft_len", "pairs", "pair_len",
         "spread")
SETTINGS = ("row_length", "micro_batch_rows", "micro_prompts", "iters", "warmup", "seconds", "seed")
SECTIONS = {"sampling": "sampling", "grpo": "grpo", "grpo_no_reference": "grpo", "sft": "sft",
            "dpo": "dpo", "reward": "reward", "start": "grpo"}
LACKING = {"reward": ("tunix",)}  # systems that have no such thing
FASTER = {"sampling": 2, "sft": 3, "dpo": 2, "reward": 2}  # times as many steps are measured of what is short


@dataclasses.dataclass(frozen=True)
class Row:
  """A name and the work that it stands for."""

  name: str
  kind: str
  work: common.Work


def parse_arguments(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--rows", nargs="+", default=["default"], metavar="ROW",
                      help=f"default ({', '.join(DEFAULT)}), more (other shapes), or names")
  parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
  parser.add_argument("--peers-dir", type=pathlib.Path, default=ROOT / ".bench",
                      help="where the peers' environments are, or are made")
  parser.add_argument("--out", type=pathlib.Path,
                      help=f"results go to OUT.json and OUT.md; {OUT}, or {QUICK_OUT} with --quick")
  parser.add_argument("--picture", type=pathlib.Path,
                      help=f"and a picture here; {PICTURE} for the default rows")
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=2, help="of a disturbed round")
  parser.add_argument("--max-other-cpu", type=float, default=0.05,
                      help="share of CPU time of other processes that a round may have")
  parser.add_argument("--wait-quiet", type=float, default=20.0, metavar="SECONDS",
                      help="wait so long for a quiet machine before each process")
  parser.add_argument("--quote-disturbed", action="store_true",
                      help="quote disturbed rows too; the results say that they are")
  parser.add_argument("--quick", action="store_true", help="one round of few steps")
  for field in dataclasses.fields(common.Work):
    if field.name in SHAPE + SETTINGS:
      parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default),
                          default=field.default)
  found = parser.parse_args(arguments)
  if found.out is None and not found.quick and found.rows == ["default"] and not found.picture:
    found.picture = ROOT / PICTURE
  found.out = found.out or ROOT / (QUICK_OUT if found.quick else OUT)
  if found.quick:
    found.rounds, found.repeats, found.iters, found.warmup, found.wait_quiet = 1, 0, 2, 1, 0.0
  if found.iters < 1 or found.warmup < 1 or found.rounds < 1:
    parser.error("--iters, --warmup and --rounds must be at least 1")
  if "jaxrl" not in found.systems:
    parser.error("--systems must name jaxrl, which ratios are about")
  try:
    found.rows = [parse_row(spec, found) for name in found.rows
                  for spec in {"default": DEFAULT, "more": MORE}.get(name, (name,))]
  except ValueError as error:
    parser.error(str(error))
  return found


def parse_row(spec: str, arguments) -> Row:
  """The row of a name such as `grpo:vocab=16384`.

  Raises:
    ValueError: no such row or shape.
  """
  kind, *changes = spec.split(":")
  if kind not in SECTIONS:
    raise ValueError(f"--rows {spec}: {kind!r} is none of {', '.join(SECTIONS)}")
  values = {name: getattr(arguments, name) for name in SHAPE + SETTINGS}
  values["iters"] *= FASTER.get(kind, 1)
  for change in changes:
    name, _, value = change.partition("=")
    if name not in SHAPE:
      raise ValueError(f"--rows {spec}: {name!r} is none of {', '.join(SHAPE)}")
    values[name] = type(values[name])(value)
  if kind == "grpo_no_reference":
    values["beta"] = 0.0
  if kind == "start":
    values |= {"iters": 0, "warmup": 1}
  return Row(spec, kind, common.Work(SECTIONS[kind], **values))


def measure(system: str, python: str, work: common.Work, cache: str) -> dict:
  """Runs one process and returns what it found.

  Raises:
    RuntimeError: it failed; holds the end of what it said.
  """
  script = pathlib.Path(__file__).parent / "peers" / f"on_{system}.py"
  environment = {k: v for k, v in os.environ.items()
                 if k not in ("XLA_FLAGS", "NPROC", "OMP_NUM_THREADS", "JAX_COMPILATION_CACHE_DIR")}
  environment |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
  if system == "jaxrl":
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
  else:
    environment.pop("PYTHONPATH", None)
  environment |= {"JAX_COMPILATION_CACHE_DIR": cache} if cache else {
      "JAX_ENABLE_COMPILATION_CACHE": "false"}
  if system != "jaxrl":  # which keeps everything by itself; JAX alone keeps what took long
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  started = dataclasses.replace(work, started=time.time(), stat=common.cpu_times())
  done = subprocess.run([python, str(script), json.dumps(dataclasses.asdict(started))],
                        env=environment, capture_output=True, text=True)
  lines = [line for line in done.stdout.splitlines() if line.startswith(common.RESULT)]
  if done.returncode or not lines:
    raise RuntimeError(f"{system} failed at {work}:\n{(done.stderr or done.stdout)[-3000:]}")
  return json.loads(lines[-1].removeprefix(common.RESULT))


class Session:
  """Measurements of one invocation."""

  def __init__(self, arguments):
    self.arguments = arguments
    self.pythons = {"jaxrl": sys.executable}
    for name in arguments.systems:
      if name != "jaxrl":
        self.pythons[name] = environments.interpreter(name, arguments.peers_dir)
    self.systems = [name for name in SYSTEMS if name in arguments.systems]

  def systems_of(self, row: Row) -> list[str]:
    """Those that have what the row measures."""
    return [name for name in self.systems if name not in LACKING.get(row.kind, ())]

  def round(self, row: Row) -> tuple[dict[str, list[dict]], float]:
    """Every system once. Returns their results and the largest share of other processes."""
    found, other = {}, 0.0
    for system in self.systems_of(row):
      # A cache that is kept from run to run must not be found filled. jaxrl always keeps one.
      with tempfile.TemporaryDirectory(prefix="bench_cache_") as cache:
        keeps = system == "jaxrl" or row.kind == "start"
        again = row.kind == "start" and system != "trl"  # which compiles nothing
        found[system] = [self._one(row, system, cache if keeps else "")
                         for _ in range(2 if again else 1)]
      other = max(other, *(self._other(row, one) for one in found[system]))
    return found, other

  def rounds(self, row: Row) -> tuple[dict[str, list], float, bool]:
    """Results of each round by system, the largest share of others, whether it was too large."""
    kept, worst, disturbed = {system: [] for system in self.systems_of(row)}, 0.0, False
    for _ in range(self.arguments.rounds):
      tries = [self.round(row)]
      while tries[-1][1] > self.arguments.max_other_cpu and len(tries) <= self.arguments.repeats:
        print(f"  other processes took {tries[-1][1]:.0%} of the CPU time: once more", flush=True)
        tries.append(self.round(row))
      found, other = min(tries, key=lambda made: made[1])
      worst, disturbed = max(worst, other), disturbed or other > self.arguments.max_other_cpu
      for system in kept:
        kept[system].append(found[system])
    return kept, worst, disturbed

  def _one(self, row, system, cache):
    quiet = self.arguments.max_other_cpu
    if self.arguments.wait_quiet:
      machine.wait_until_quiet(self.arguments.wait_quiet, quiet)
    found = measure(system, self.pythons[system], row.work, cache)
    seconds = statistics.median(found["steps_s"]) if found["steps_s"] else found["first_step_s"]
    print(f"  {system:6s} {seconds:8.3f} s   {found['peak_rss_mb']:6.0f} MB   "
          f"others {self._other(row, found):.0%}", flush=True)
    return found

  def _other(self, row, found):
    return found["start_other_cpu" if row.kind == "start" else "other_cpu"]

  def limits(self) -> dict:
    """The machine's measured limits, the best of what the systems' libraries reach."""
    found = []
    for python in self.pythons.values():
      done = subprocess.run([python, str(pathlib.Path(__file__).parent / "machine.py")],
                            capture_output=True, text=True, check=True,
                            env={**os.environ, "JAX_PLATFORMS": "cpu"})
      found.append(json.loads(done.stdout.splitlines()[-1]))
    best = {}
    for one in found:
      for library, gflops in one["gflops"].items():
        best[library] = max(gflops, best.get(library, 0.0))
    bandwidth = {size: max(one["bandwidth"][size] for one in found)
                 for size in found[0]["bandwidth"]}
    return {"gflops": best, "bandwidth_gb_s": bandwidth}


def rows_of(row: Row, kept: dict, limits: dict) -> list[dict]:
  """The results of a row as they are written; a `start` makes three."""
  shape = {name: getattr(row.work, name) for name in SHAPE}
  if row.kind != "start":
    seconds = {system: statistics.median(s for rounds in found for s in rounds[0]["steps_s"])
               for system, found in kept.items()}
    limit = costs.limit_seconds(row.work, max(limits["gflops"].values()),
                                {int(k): v for k, v in limits["bandwidth_gb_s"].items()})
    tokens = {system: statistics.mean(t for rounds in found for t in rounds[0]["tokens"])
              for system, found in kept.items()}
    peak = {system: max(rounds[0]["peak_rss_mb"] for rounds in found)
            for system, found in kept.items()}
    return [_result(row.name, shape, seconds, limit, peak, tokens=tokens)]

  def median(figure, index):
    return {system: statistics.median(rounds[index][figure] for rounds in found)
            for system, found in kept.items() if figure in found[0][0]}
  suffix = row.name.removeprefix("start")
  cold, second = median("peak_rss_mb", 0), median("peak_rss_mb", -1)
  return [_result(f"cold_start{suffix}", shape, median("first_step_s", 0), None, cold),
          _result(f"cold_compile{suffix}", shape, median("compile_s", 0), None, cold),
          _result(f"second_start{suffix}", shape, median("first_step_s", -1), None, second)]


def _result(name, shape, seconds, limit, peak, **more):
  peers = {system: s for system, s in seconds.items() if system != "jaxrl"}
  ours = seconds["jaxrl"]
  return {"row": name, "shape": shape, "jaxrl_s": ours, "peers": peers,
          "ratio": min(peers.values()) / ours if peers else None, "limit_s": limit,
          "times_limit": ours / limit if limit else None, "peak_rss_mb": peak, **more}


def main(arguments=None) -> int:
  arguments = parse_arguments(arguments)
  session = Session(arguments)
  print(machine.name(), flush=True)
  machine.wait_until_quiet(arguments.wait_quiet, arguments.max_other_cpu)
  limits = session.limits()
  content = {"machine": machine.name(), "date": time.strftime("%Y-%m-%d"), "limits": limits,
             "max_other_cpu": arguments.max_other_cpu, "versions": {}, "rows": []}
  for row in arguments.rows:
    print(row.name, flush=True)
    kept, other, disturbed = session.rounds(row)
    for system, rounds in kept.items():
      content["versions"].setdefault(system, rounds[0][0]["versions"])
    content["rows"] += [{**found, "other_cpu": other, "disturbed": disturbed}
                        for found in rows_of(row, kept, limits)]
    report.write(content, arguments.out, quote_disturbed=arguments.quote_disturbed)
  table = report.write(content, arguments.out, quote_disturbed=arguments.quote_disturbed)
  if arguments.picture:
    report.draw(content, arguments.picture, quote_disturbed=arguments.quote_disturbed)
  print("\n" + table)
  disturbed = any(row["disturbed"] for row in content["rows"])
  return int(disturbed and not arguments.quote_disturbed)


if __name__ == "__main__":
  sys.exit(main())
