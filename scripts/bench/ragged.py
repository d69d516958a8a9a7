"""Does raggedness cost? DPO on pairs of lengths up to 4x apart against as many tokens of equal lengths.

  python scripts/bench/ragged.py            # a few minutes, alone on the machine

Both have the same number of pairs and of real tokens (see `pair_lengths` in `peers/common.py`). They are
measured in turn, in processes of their own, in as many rounds as asked for; times are medians over the
steps of all rounds. Equal lengths are measured in rows that hold just one pair, their best, and in the
longer rows that ragged pairs are packed into. All of these compute every token of every sequence; what
equal lengths gain beyond that by sharing the prompt of a pair, which ragged ones do not, is a line of its
own, and not what the limit is about.
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

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 1.15


def parse_arguments(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--pairs", type=int, default=64)
  parser.add_argument("--pair-len", type=int, default=96, help="mean tokens of a sequence")
  parser.add_argument("--spread", type=float, default=4.0, help="longest over shortest sequence")
  parser.add_argument("--row-length", type=int, default=0, help="of ragged pairs; 0: 4 times pair-len")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--iters", type=int, default=10)
  parser.add_argument("--wait-quiet", type=float, default=20.0, metavar="SECONDS")
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results/bench/ragged")
  parser.add_argument("--quick", action="store_true", help="one round of few steps, kept under .bench")
  found = parser.parse_args(arguments)
  if found.quick:
    found.rounds, found.iters, found.wait_quiet, found.out = 1, 2, 0.0, ROOT / ".bench/quick_ragged"
  return found


def works(arguments) -> dict[str, common.Work]:
  """What is measured, by name."""
  row = arguments.row_length or 4 * arguments.pair_len
  equal = common.Work("dpo", pairs=arguments.pairs, pair_len=arguments.pair_len, iters=arguments.iters,
                      seconds=60.0, overrides=(("batch.share_prompts", "False"),))
  return {"equal lengths": equal, "equal lengths, long rows": dataclasses.replace(equal, row_length=row),
          "equal lengths, prompts shared": dataclasses.replace(equal, overrides=()),
          "ragged lengths": dataclasses.replace(equal, row_length=row, spread=arguments.spread)}


def main(arguments=None) -> int:
  arguments = parse_arguments(arguments)
  steps: dict[str, list[float]] = {}
  other, tokens = 0.0, {}
  for _ in range(arguments.rounds):
    for name, work in works(arguments).items():
      if arguments.wait_quiet:
        machine.wait_until_quiet(arguments.wait_quiet, 0.05)
      found = compare.measure("jaxrl", sys.executable, work, "")
      steps.setdefault(name, []).extend(found["steps_s"])
      tokens[name], other = found["tokens"][0], max(other, found["other_cpu"])
      print(f"  {name:30s} {statistics.median(found['steps_s']):8.3f} s   "
            f"others {found['other_cpu']:.0%}", flush=True)
  medians = {name: statistics.median(values) for name, values in steps.items()}
  ratios = {name: medians["ragged lengths"] / seconds for name, seconds in medians.items()}
  content = dict(machine=machine.name(), date=time.strftime("%Y-%m-%d"), pairs=arguments.pairs,
                 pair_len=arguments.pair_len, spread=arguments.spread, other_cpu=round(other, 3),
                 loss_tokens=tokens, seconds={k: round(v, 4) for k, v in medians.items()},
                 ragged_over={k: round(v, 3) for k, v in ratios.items()}, limit=LIMIT)
  lines = ["| lengths | s per update | ragged over it |", "| --- | --- | --- |",
           *(f"| {name} | {medians[name]:.3f} | {ratios[name]:.2f} |" for name in medians)]
  text = (f"{content['machine']}, {content['date']}: DPO on {arguments.pairs} pairs, sequences of "
          f"{arguments.pair_len} tokens in the mean, the longest {arguments.spread:g} times the shortest. "
          f"Other processes took up to {other:.0%} of the CPU time.\n\n" + "\n".join(lines) + "\n")
  arguments.out.parent.mkdir(parents=True, exist_ok=True)
  arguments.out.with_name(arguments.out.name + ".json").write_text(json.dumps(content, indent=1) + "\n")
  arguments.out.with_name(arguments.out.name + ".md").write_text(text)
  print("\n" + text)
  return int(ratios["equal lengths"] > LIMIT)


if __name__ == "__main__":
  sys.exit(main())
