"""What single settings are worth: jaxrl with and without each, in turn, on the same work.

  python scripts/bench/levers.py              # results/bench/levers.json and .md

Only what a setting can switch off is here. A pair that other processes disturbed is measured again,
then marked and not quoted, as in `compare.py`.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import compare
import machine
from peers import common

LEVERS = {  # what is switched: work, settings before, settings after
    "prompt computed once per group, 32 tokens": (
        dict(section="grpo"), {"batch.share_prompts": "False"}, {}),
    "prompt computed once per group, 512 tokens": (
        dict(section="grpo", prompt_len=512), {"batch.share_prompts": "False"}, {}),
    "rollouts laid out as their lengths want it, most of them short": (
        dict(section="grpo", new_tokens=256, median_len=40, sigma=0.4), {"batch.fit_layout": "False"}, {}),
    "rows at a time chosen for the cache, not all at once": (
        dict(section="grpo"), {"batch.micro_batch_rows": "128"}, {}),
    "logits of 1024 tokens at a time, vocabulary 16384": (
        dict(section="grpo", vocab=16384), {"batch.vocabulary_chunk": "16384"}, {}),
    "no reference model where no term reads it": (dict(section="grpo"), {}, dict(beta=0.0)),
    "samples in bfloat16 weights": (
        dict(section="sampling"), {}, {"rollout.weights_dtype": "bfloat16"}),
    "samples in int8 weights": (dict(section="sampling"), {}, {"rollout.weights_dtype": "int8"}),
    "samples with an int8 cache, prompts of 512": (
        dict(section="sampling", prompt_len=512), {}, {"rollout.cache_dtype": "int8"}),
}


def parse_arguments(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS))
  parser.add_argument("--out", type=pathlib.Path, default=compare.ROOT / "results/bench/levers")
  parser.add_argument("--iters", type=int, default=5)
  parser.add_argument("--warmup", type=int, default=2)
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument("--max-other-cpu", type=float, default=0.05)
  parser.add_argument("--wait-quiet", type=float, default=20.0, metavar="SECONDS")
  parser.add_argument("--repeats", type=int, default=2, help="of a disturbed measurement")
  return parser.parse_args(arguments)


def work_of(shape: dict, settings: dict, arguments) -> common.Work:
  """The work with some settings; those without a dot are fields of the work itself."""
  fields = {name: value for name, value in settings.items() if "." not in name}
  overrides = tuple((name, value) for name, value in settings.items() if "." in name)
  return common.Work(**{**shape, **fields}, overrides=overrides, iters=arguments.iters,
                     warmup=arguments.warmup)


def once(work: common.Work, arguments) -> dict:
  """One process, made again while others disturb it."""
  tries = []
  while not tries or (tries[-1]["other_cpu"] > arguments.max_other_cpu
                      and len(tries) <= arguments.repeats):
    machine.wait_until_quiet(arguments.wait_quiet, arguments.max_other_cpu)
    tries.append(compare.measure("jaxrl", sys.executable, work, ""))
  return min(tries, key=lambda found: found["other_cpu"])


def measure(name: str, arguments) -> dict:
  """A lever's row."""
  shape, *sides = LEVERS[name]
  found = [[once(work_of(shape, side, arguments), arguments) for side in sides]
           for _ in range(arguments.rounds)]
  other = max(one["other_cpu"] for pair in found for one in pair)
  row = {"lever": name, "shape": shape, "settings": sides, "other_cpu": other,
         "disturbed": other > arguments.max_other_cpu, "before_s": None, "after_s": None}
  if not row["disturbed"]:
    before, after = (statistics.median(s for pair in found for s in pair[i]["steps_s"])
                     for i in range(2))
    memory = [max(pair[i]["peak_rss_mb"] for pair in found) for i in range(2)]
    row |= {"before_s": before, "after_s": after, "ratio": before / after,
            "before_mb": memory[0], "after_mb": memory[1]}
  return row


def table(content: dict) -> str:
  """Markdown."""
  lines = ["# What single settings are worth", "",
           f"Made by `python scripts/bench/levers.py` on {content['machine']}, {content['date']}.",
           "", "| lever | before s | after s | ratio | memory MB, before -> after |",
           "| --- | --- | --- | --- | --- |"]
  for row in content["rows"]:
    if row["disturbed"]:
      lines.append(f"| {row['lever']} | disturbed by other processes | | | |")
    else:
      lines.append(f"| {row['lever']} | {row['before_s']:.3f} | {row['after_s']:.3f} | "
                   f"{row['ratio']:.2f} | {row['before_mb']:.0f} -> {row['after_mb']:.0f} |")
  return "\n".join(lines) + "\n"


def main(arguments=None) -> int:
  arguments = parse_arguments(arguments)
  content = {"machine": machine.name(), "date": time.strftime("%Y-%m-%d"), "rows": []}
  arguments.out.parent.mkdir(parents=True, exist_ok=True)
  for name in arguments.levers:
    content["rows"].append(measure(name, arguments))
    print(json.dumps(content["rows"][-1]), flush=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(content))
  return int(any(row["disturbed"] for row in content["rows"]))


if __name__ == "__main__":
  sys.exit(main())
