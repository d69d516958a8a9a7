"""A long quickstart run in one process, watched for whatever grows.

  python scripts/bench/soak.py          # 500 updates; writes results/bench/soak.json, docs/soak.png
  python scripts/bench/soak.py --steps=60 --config=my.py --sft=10 --out=/tmp/soak.json --picture=

After every update of the RL phase it looks at the resident memory, open file descriptors, threads,
live device arrays and compiled programs of its own process. It measures no time, so other work on
the machine does not disturb it.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
WARM = 50  # updates before memory is compared
LIMIT = 0.03  # of growth


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default=str(ROOT / "configs/quickstart.py"))
  parser.add_argument("--steps", type=int, default=500, help="updates of the RL phase")
  parser.add_argument("--sft", type=int, default=200, help="updates of the supervised phase before")
  parser.add_argument("--warm", type=int, default=WARM, help="updates that do not count")
  parser.add_argument("--save", type=int, default=25, help="updates between checkpoints")
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results/bench/soak.json")
  parser.add_argument("--picture", default=str(ROOT / "docs/soak.png"), help="empty for none")
  options = parser.parse_args()
  sys.path.insert(0, str(ROOT))
  with tempfile.TemporaryDirectory() as place:
    seen, rows = soak(options, pathlib.Path(place) / "run")
  result = judge(seen, rows, options)
  options.out.parent.mkdir(parents=True, exist_ok=True)
  options.out.write_text(json.dumps(result, indent=1) + "\n")
  print(json.dumps({k: v for k, v in result.items() if k != "every_update"}, indent=1))
  if options.picture:
    draw(seen, options.warm, options.picture)
  sys.exit(0 if result["passed"] else 1)


def soak(options, workdir):
  """Runs the two phases -> (what was seen after every RL update, rows of metrics.jsonl)."""
  from jaxrl import config as configs
  from jaxrl.training import run
  from jaxrl.training.reporting import Reporter
  config = configs.load(options.config)
  configs.override(config, {
      "sft.steps": str(options.sft), "sft.until": "None", "rl.steps": str(options.steps),
      "rl.until": "None", "evaluate.every": "20", "checkpoint.every": str(options.save)})
  seen, record = [], Reporter.step

  def watch(reporter, step, phase, metrics):
    record(reporter, step, phase, metrics)
    if phase == "rl":
      seen.append(look(reporter))
  Reporter.step = watch
  try:
    run.run(config, workdir, quiet=True)
  finally:
    Reporter.step = record
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return seen, [row for row in rows if row["phase"] == "rl" and "evaluation" not in row]


def look(reporter) -> dict:
  """The figures of this process now."""
  import jax
  arrays = jax.live_arrays()
  resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return dict(rss_mb=resident * os.sysconf("SC_PAGE_SIZE") / 1e6,
              descriptors=len(os.listdir("/proc/self/fd")),
              threads=len(os.listdir("/proc/self/task")),
              arrays=len(arrays), array_mb=sum(x.nbytes for x in arrays) / 1e6,
              programs=reporter.compiles.count)


def judge(seen, rows, options) -> dict:
  """What is written to the file; memory is compared by the median of a tenth of the updates."""
  window = max(1, (len(seen) - options.warm) // 10)
  early, late = seen[options.warm:options.warm + window], seen[-window:]

  def median(part, name):
    return statistics.median(row[name] for row in part)

  growth = median(late, "rss_mb") / median(early, "rss_mb") - 1
  worst = max(row["rss_mb"] for row in seen[options.warm:]) / median(early, "rss_mb") - 1
  half = (len(seen) - options.warm) // 2

  def floor_growth(name):  # a checkpoint that is being written holds some for a while
    return (min(row[name] for row in seen[-half:])
            - min(row[name] for row in seen[options.warm:options.warm + half]))
  complete = ([row["phase_step"] for row in rows] == list(range(1, options.steps + 1))
              and len({frozenset(row) - {k for k in row if k.startswith("validation/")
                                         or k == "logprob_gap"} for row in rows}) == 1)
  result = dict(
      updates=len(seen), rss_mb_early=median(early, "rss_mb"), rss_mb_late=median(late, "rss_mb"),
      rss_growth=growth, rss_worst=worst, descriptors_growth=floor_growth("descriptors"),
      threads_growth=floor_growth("threads"), arrays_growth=floor_growth("arrays"),
      array_mb_growth=floor_growth("array_mb"),
      programs_after_warm=seen[-1]["programs"] - seen[options.warm]["programs"],
      metrics_complete=complete)
  result["passed"] = (growth < LIMIT and complete and result["descriptors_growth"] <= 0
                      and result["threads_growth"] <= 0 and result["arrays_growth"] <= 0)
  return {**result, "every_update": {name: [row[name] for row in seen] for name in seen[0]}}


def draw(seen, warm, path):
  """Memory, descriptors, threads and live arrays against the update."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  figure = Figure(figsize=(8, 2.6), layout="constrained")
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2)
  steps = range(1, len(seen) + 1)
  left.plot(steps, [row["rss_mb"] for row in seen], color="#3366cc")
  left.axvline(warm, color="#9aa3af", linewidth=0.8, linestyle=":")
  left.set(title="resident memory, MB", xlabel="update", ylim=(0, None))
  for name, colour in (("threads", "#dc7a1f"), ("descriptors", "#2a9d5c"), ("arrays", "#7a52c7")):
    right.plot(steps, [row[name] for row in seen], color=colour, label=name)
  right.set(title="open at the same time", xlabel="update", ylim=(0, None))
  right.legend(frameon=False, fontsize=8)
  for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=110)


if __name__ == "__main__":
  main()
