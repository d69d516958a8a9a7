"""How jaxrl's time and memory grow, one dimension of a GRPO step at a time.

  python scripts/bench/growth.py        # five minutes; results/bench/growth.json, docs/growth.png

Every point is a process of its own around the default shape of `compare.py`, and is measured and
refused in the same way: one that other processes disturbed is made again, then marked.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import time

import compare
import machine
from peers import common

DIMENSIONS = {  # settings -> label and points
    "prompt_len": ("prompt, tokens", [{"prompt_len": n} for n in (32, 128, 512)]),
    "samples": ("samples per prompt", [{"samples": n} for n in (2, 8, 32)]),
    "new_tokens": ("response, tokens", [{"new_tokens": n} for n in (16, 64, 256)]),
    "vocab": ("vocabulary", [{"vocab": n} for n in (512, 4096, 16384)]),
    "d_model": ("model width", [dict(d_model=n, heads=n // 32, kv_heads=n // 64, d_ff=3 * n)
                                for n in (64, 128, 256)]),
    "devices": ("virtual devices", [{"devices": n} for n in (1, 2, 4, 8)]),
}


def parse_arguments(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--dimensions", nargs="+", choices=DIMENSIONS, default=list(DIMENSIONS))
  parser.add_argument("--out", type=pathlib.Path,
                      default=compare.ROOT / "results/bench/growth.json")
  parser.add_argument("--picture", type=pathlib.Path, default=compare.ROOT / "docs/growth.png")
  parser.add_argument("--iters", type=int, default=3)
  parser.add_argument("--warmup", type=int, default=2)
  parser.add_argument("--max-other-cpu", type=float, default=0.05)
  parser.add_argument("--wait-quiet", type=float, default=20.0, metavar="SECONDS")
  parser.add_argument("--repeats", type=int, default=2, help="of a disturbed point")
  parser.add_argument("--quote-disturbed", action="store_true")
  return parser.parse_args(arguments)


def point(work: common.Work, arguments) -> dict:
  """Time and memory at one shape."""
  tries = []
  while not tries or (tries[-1]["other_cpu"] > arguments.max_other_cpu
                      and len(tries) <= arguments.repeats):
    if arguments.wait_quiet:
      machine.wait_until_quiet(arguments.wait_quiet, arguments.max_other_cpu)
    tries.append(compare.measure("jaxrl", sys.executable, work, ""))
  found = min(tries, key=lambda one: one["other_cpu"])
  disturbed = found["other_cpu"] > arguments.max_other_cpu
  quoted = arguments.quote_disturbed or not disturbed
  return {"step_s": statistics.median(found["steps_s"]) if quoted else None,
          "peak_rss_mb": found["peak_rss_mb"] if quoted else None,
          "other_cpu": found["other_cpu"], "disturbed": disturbed}


def draw(content: dict, path: pathlib.Path) -> None:
  """Small multiples: time and memory over each dimension, time against growth in proportion."""
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot
  names = list(content["dimensions"])
  figure, grid = pyplot.subplots(2, len(names), figsize=(2.4 * len(names), 4.6), squeeze=False,
                                 sharex="col", sharey="row")
  figures = (("step_s", "GRPO step, s", "#2b6cb0"), ("peak_rss_mb", "peak memory, MB", "#dd8452"))
  for column, name in enumerate(names):
    points = [p for p in content["dimensions"][name]["points"] if p["step_s"] is not None]
    xs = [p[name] for p in points]
    for axes, (key, label, colour) in zip(grid[:, column], figures):
      ys = [p[key] for p in points]
      axes.plot(xs, ys, "o-", color=colour, markersize=4)
      if xs and key == "step_s" and name != "devices":  # which all share the same cores
        axes.plot(xs, [ys[0] * x / xs[0] for x in xs], ":", color="grey", linewidth=1)
      axes.set_xscale("log", base=2)
      axes.set_xticks(xs, [str(x) for x in xs])
      if key == "step_s":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
      else:
        axes.set_ylim(bottom=0)
      axes.minorticks_off()
      axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
      axes.grid(True, alpha=0.3)
      axes.spines[["top", "right"]].set_visible(False)
      if not column:
        axes.set_ylabel(label)
    grid[1, column].set_xlabel(content["dimensions"][name]["label"])
  figure.suptitle(f"Growth around the default shape (dotted: in proportion). {content['machine']}",
                  fontsize=9)
  figure.tight_layout()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=130)
  pyplot.close(figure)


def main(arguments=None) -> int:
  arguments = parse_arguments(arguments)
  base = common.Work("grpo", iters=arguments.iters, warmup=arguments.warmup, seconds=20.0)
  content = {"machine": machine.name(), "date": time.strftime("%Y-%m-%d"),
             "shape": {name: getattr(base, name) for name in compare.SHAPE}, "dimensions": {}}
  known = {}  # the default shape is a point of every dimension
  for name in arguments.dimensions:
    label, points = DIMENSIONS[name]
    found = []
    for change in points:
      work = dataclasses.replace(base, **change)
      known[work] = known.get(work) or point(work, arguments)
      found.append({**change, **known[work]})
      print(json.dumps(found[-1]), flush=True)
    content["dimensions"][name] = {"label": label, "points": found}
  arguments.out.parent.mkdir(parents=True, exist_ok=True)
  arguments.out.write_text(json.dumps(content, indent=1) + "\n")
  draw(content, arguments.picture)
  disturbed = any(p["disturbed"] for d in content["dimensions"].values() for p in d["points"])
  return int(disturbed and not arguments.quote_disturbed)


if __name__ == "__main__":
  sys.exit(main())
