"""Runs the stages of configs/rlhf_toy.py and draws proxy and gold reward over the KL to the start.

  python scripts/rlhf_toy.py --workdir=runs/rlhf_toy --seeds=0,1,2

Every stage is a run of its own below the working directory; the same command continues after an
interruption. The picture is overoptimisation.png there, and the figures behind it lie beside it.
"""

import argparse
import json
import math
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from jaxrl import config as configs
from jaxrl.training import run

MODELS = ("bradley_terry", "beta")
WINDOW = 5  # updates that a point of a curve is the mean of


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/rlhf_toy"))
  parser.add_argument("--seeds", default="0")
  parser.add_argument("--steps", type=int, default=0, help="updates of GRPO; 0 is as configured")
  options = parser.parse_args()
  seeds, found = [int(seed) for seed in options.seeds.split(",")], {}
  for seed in seeds:
    place = options.workdir / f"seed{seed}"
    stage("start", place / "start", seed)
    for model in MODELS:
      trained = stage(model, place / model, seed, start=str(place / "start"))
      policy = place / f"against_{model}"
      changes = {"reward.criteria[1].run": str((place / model).absolute())}
      stage("policy", policy, seed, start=str(place / "start"), changes=changes,
            steps=options.steps)
      after = trained["phases"][-1]["after"]
      found.setdefault(model, []).append(dict(
          curve(policy), seed=seed, accuracy=after["pairs/preference_accuracy"]))
  (options.workdir / "overoptimisation.json").write_text(json.dumps(found, indent=1) + "\n")
  draw(found, options.workdir / "overoptimisation.png")
  print(f"{'reward model':15} {'pairs right':>11} {'best gold':>9} {'at KL':>6} {'last gold':>9} "
        f"{'last KL':>7}")
  for model, runs in found.items():
    rows = [summary(one) for one in runs]
    mean = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
    print(f"{model:15} {mean['accuracy']:11.3f} {mean['best']:9.3f} {mean['best_kl']:6.2f} "
          f"{mean['last']:9.3f} {mean['last_kl']:7.2f}")
  print(f"picture: {options.workdir / 'overoptimisation.png'}")


def stage(name, workdir, seed, *, start="", changes=None, steps=0):
  """Runs one stage, or reads what it came to."""
  print(f"{workdir}", flush=True)
  config = configs.load(f"configs/rlhf_toy.py:{name}")
  configs.override(config, {"seed": str(seed), "start": start, **(changes or {})})
  if steps:
    config.rl.steps = steps
  return run.run(config, workdir, quiet=True)


def curve(workdir):
  """Proxy and gold reward, and the KL to the start per word, as means over `WINDOW` updates."""
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  rows = [row for row in rows if "grad_norm" in row]
  rows = [dict(kl=row["kl"] * row["response_tokens"], gold=row["criteria/gold"],
               proxy=row["criteria/proxy"]) for row in rows]
  parts = [rows[i:i + WINDOW] for i in range(0, len(rows), WINDOW)]
  return {name: [float(np.mean([row[name] for row in part])) for part in parts] for name in rows[0]}


def summary(one):
  best = int(np.argmax(one["gold"]))
  return dict(accuracy=one["accuracy"], best=one["gold"][best], best_kl=one["kl"][best],
              last=one["gold"][-1], last_kl=one["kl"][-1])


def draw(found, path):
  figure, panels = plt.subplots(1, len(found), figsize=(9, 3.6), sharey=True, squeeze=False)
  for axes, (model, runs) in zip(panels[0], found.items()):
    for one in runs:
      distance = [math.sqrt(max(kl, 0)) for kl in one["kl"]]
      proxy = np.array(one["proxy"])
      spread = proxy.max() - proxy.min() or 1.0
      axes.plot(distance, one["gold"], color="tab:orange", label="gold")
      axes.plot(distance, (proxy - proxy.min()) / spread, color="tab:blue", label="proxy, scaled")
    axes.set(title=f"GRPO against {model.replace('_', '-')}",
             xlabel="square root of the KL to the start, per word")
  panels[0][0].set_ylabel("mean reward of samples")
  handles, labels = panels[0][0].get_legend_handles_labels()
  panels[0][0].legend(handles[:2], labels[:2])  # those of the first seed
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)


if __name__ == "__main__":
  main()
