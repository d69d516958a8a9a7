"""What sampling ahead gains: measured on virtual devices, and simulated for a pod.

  python scripts/bench/asynchronous.py

Measured: whole runs of a tiny model, synchronous on 4 virtual CPU devices, and with
`rollout.staleness` on 4 that train and 4 that sample. Virtual devices share the cores of one
machine, so arithmetic gains nothing from more of them; what stands for the accelerators' time is a
pause in every episode, one for sampling and one for the judge, in which the cores are free. The
overlap of these pauses with training is real, and so are threads and copies of parameters.

Simulated: the same schedule over many batches whose sampling time has a long tail, for every split
of a pod's devices. The simulation is compared with the measurement first, fed with the times of the
synchronous run. Written to results/bench/asynchronous.json and docs/asynchronous.png.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(pathlib.Path(__file__).resolve().parent)]
DEVICES = 4  # that train, and as many that sample where sampling is ahead


# ------------------------------------------------------------------------------------- simulation


@dataclasses.dataclass(frozen=True)
class Pod:
  """Work of one batch, in seconds on all devices, and what does not shrink with more of them.

  Attributes:
    devices: of the pod.
    sampling, training: seconds of work that is shared out evenly.
    tail: seconds of decoding the longest sample of a batch, on any number of devices; the mean of a
      log-normal distribution.
    spread: standard deviation of the logarithm of the tail.
    judging: seconds from the last sample to the rewards.
    copying: seconds that parameters travel to the devices that sample.
  """

  devices: int = 256
  sampling: float = 20.0
  training: float = 30.0
  tail: float = 30.0
  spread: float = 0.4
  judging: float = 5.0
  copying: float = 1.0

  def tails(self, batches: int, seed: int = 0) -> np.ndarray:
    """Seconds of the longest sample, per batch. [batches]"""
    draws = np.random.default_rng(seed).normal(size=batches)
    return self.tail * np.exp(self.spread * draws - self.spread ** 2 / 2)


def schedule(sampling: np.ndarray, training: np.ndarray, *, staleness: int, copying: float = 0.0
             ) -> tuple[float, float]:
  """Plays `training.ahead` through: one sampler and one trainer, who wait for each other.

  Args:
    sampling: seconds to make each batch, rewards included. [batches]
    training: seconds of the updates on each batch. [batches]
    staleness: batches that are sampled ahead; 0 makes each one after the updates before it.
    copying: seconds that the trainer stands still for a copy of its parameters.

  Returns:
    Seconds per batch, and the share of them in which the trainer waits for samples.
  """
  asked, sampled, trained = [], [], []
  for batch in range(len(sampling)):  # the trainer's point of view: ask, wait, train
    asked.append((trained[-1] if trained else 0.0) + copying)
    first = len(sampled)
    for ordered in range(first, min(batch + staleness + 1, len(sampling))):
      begins = max(asked[-1], sampled[-1] if sampled else 0.0)
      sampled.append(begins + sampling[ordered])
    trained.append(max(asked[-1], sampled[batch]) + training[batch])
  waited = sum(max(s - a, 0.0) for a, s in zip(asked, sampled))
  return trained[-1] / len(trained), waited / trained[-1]


def simulate(pod: Pod, batches: int) -> list[dict]:
  """Batches per hour: synchronous on all devices, and ahead with every sixteenth to sampling."""
  tails, rows = pod.tails(batches), []

  def row(staleness, sampling_devices, training_devices, copying):
    sampling = pod.sampling * pod.devices / sampling_devices + tails + pod.judging
    training = np.full(batches, pod.training * pod.devices / training_devices)
    seconds, waits = schedule(sampling, training, staleness=staleness, copying=copying)
    rows.append(dict(staleness=staleness, sampling_devices=sampling_devices, seconds=seconds,
                     batches_per_hour=3600 / seconds, wait_fraction=waits))
  row(0, pod.devices, pod.devices, 0.0)
  for staleness in (1, 2, 4):
    for sixteenths in range(1, 16):
      count = pod.devices * sixteenths // 16
      row(staleness, count, pod.devices - count, pod.copying)
  return rows


# ------------------------------------------------------------------------------------ measurement


async def paused(ctx, task, *, samples: int, sampling: float, judging: float):
  """A group of answers that takes the time of an accelerator and of a judge as well."""
  await asyncio.sleep(sampling)
  answers = await ctx.sample(task.prompt, n=samples, train=True)
  await asyncio.sleep(judging)
  return answers


def config_of(options: argparse.Namespace, staleness: int):
  """A tiny GRPO run."""
  from configs import base
  config = base.get_config()
  config.data.train = "task:addition"
  config.data.task = dict(digits=2)
  config.data.update(max_prompt_tokens=16, max_completion_tokens=8)
  config.tokenizer.alphabet = "0123456789+="
  config.model.update(layers=2, d_model=128, heads=4, kv_heads=4, d_ff=256)
  config.batch.update(row_length=64, micro_batch_rows=8)
  config.rollout.update(
      prompts=options.prompts, max_tokens=8, staleness=staleness,
      episode=dict(name="asynchronous:paused", samples=8, sampling=options.sampling_seconds,
                   judging=options.judging_seconds))
  config.log.update(samples_every=0, curves_every=0)
  config.checkpoint.every = 0
  config.phases = ("rl",)
  config.rl = dict(kind="rl", steps=options.steps, optimizer=dict(learning_rate=1e-4))
  if staleness:
    config.mesh.sampling.data = DEVICES
  return config


def measure(options: argparse.Namespace, staleness: int) -> dict:
  """Median times of a run's steps, the first few aside, which compile."""
  from jaxrl.training import run
  with tempfile.TemporaryDirectory() as workdir:
    began = time.process_time()
    run.run(config_of(options, staleness), workdir, quiet=True)
    cpu = time.process_time() - began
    rows = [json.loads(line) for line in
            (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
  rows = [row for row in rows if "evaluation" not in row][options.warm_up:]

  def median(name):
    return float(np.median([row.get(name, 0.0) for row in rows]))
  rollout, seconds = median("rollout_seconds"), median("step_seconds")
  waits = median("wait_fraction") if staleness else rollout / seconds
  return dict(staleness=staleness, sampling_devices=DEVICES if staleness else 0,
              steps=len(rows), seconds=seconds, rollout_seconds=rollout,
              copy_seconds=median("copy_seconds"), wait_fraction=waits,
              process_cpu_seconds=cpu)


def measure_apart(staleness: int) -> dict:
  """`measure` in a process of its own, with the same options and its own number of devices."""
  flags = f"--xla_force_host_platform_device_count={DEVICES * (2 if staleness else 1)}"
  child = subprocess.run(
      [sys.executable, __file__, *sys.argv[1:], f"--only={staleness}"], check=True, text=True,
      stdout=subprocess.PIPE, env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"})
  return json.loads(child.stdout.splitlines()[-1])


def predict(synchronous: dict, staleness: int, steps: int) -> float:
  """Seconds per step that the simulation expects from the times of the synchronous run."""
  sampling = np.full(steps, synchronous["rollout_seconds"])
  training = np.full(steps, synchronous["seconds"] - synchronous["rollout_seconds"])
  finished = [schedule(sampling[:n], training[:n], staleness=staleness)[0] * n
              for n in (steps, steps // 2)]
  return (finished[0] - finished[1]) / (steps - steps // 2)  # the start aside


# -------------------------------------------------------------------------------------------- main


def draw(content: dict, path: pathlib.Path) -> None:
  """Measured and predicted seconds per step; simulated throughput by the split of the pod."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  figure = Figure(figsize=(10, 3.8), layout="constrained")
  left, right = figure.subplots(1, 2)
  rows = content["measured"]
  names = ["synchronous" if not r["staleness"] else f"staleness {r['staleness']}" for r in rows]
  left.bar(names, [r["seconds"] for r in rows], color="#3366cc", width=0.6, label="measured")
  left.plot(names, [r["predicted_seconds"] for r in rows], "D", color="#dc7a1f",
            label="simulated from the synchronous run")
  left.set_ylabel("seconds per update")
  left.set_title("tiny run, pauses for accelerator and judge", fontsize=10)
  left.legend(frameon=False, fontsize=8)
  pod, simulated = content["pod"], content["simulated"]
  synchronous = simulated[0]["batches_per_hour"]
  for staleness, colour in zip((1, 2, 4), ("#3366cc", "#2a9d5c", "#b8356b")):
    some = [r for r in simulated if r["staleness"] == staleness]
    right.plot([r["sampling_devices"] / pod["devices"] for r in some],
               [r["batches_per_hour"] / synchronous for r in some], color=colour,
               label=f"staleness {staleness}")
  right.axhline(1, color="#6b7280", linestyle="--", label="synchronous, all devices for both")
  right.set_xlabel(f"share of {pod['devices']} devices that only sample")
  right.set_ylabel("throughput / synchronous")
  right.set_title("simulated pod, long-tailed sampling", fontsize=10)
  right.legend(frameon=False, fontsize=8)
  for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0)
  path.parent.mkdir(parents=True, exist_ok=True)
  FigureCanvasAgg(figure).print_png(path)


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", type=int, default=12, help="updates of each measured run")
  parser.add_argument("--warm-up", type=int, default=4, help="of them, not counted")
  parser.add_argument("--prompts", type=int, default=32, help="of a batch, with 8 samples each")
  parser.add_argument("--staleness", type=int, nargs="+", default=[1, 2])
  parser.add_argument("--sampling-seconds", type=float, default=0.4, help="pause per batch")
  parser.add_argument("--judging-seconds", type=float, default=0.1, help="pause per batch")
  parser.add_argument("--only", type=int, metavar="STALENESS",
                      help="one measured run in this process, on the devices it has; prints a row")
  parser.add_argument("--batches", type=int, default=2000, help="of a simulation")
  for field in dataclasses.fields(Pod):
    parser.add_argument(f"--pod-{field.name}", type=type(field.default), default=field.default)
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results/bench/asynchronous.json")
  parser.add_argument("--picture", type=pathlib.Path, default=ROOT / "docs/asynchronous.png")
  return parser.parse_args()


def main() -> None:
  options = parse()
  if options.only is not None:
    print(json.dumps(measure(options, options.only)))
    return
  measured = [measure_apart(staleness) for staleness in (0, *options.staleness)]
  for row in measured:
    row["predicted_seconds"] = predict(measured[0], row["staleness"], options.steps)
    row["speed_up"] = measured[0]["seconds"] / row["seconds"]
  pod = Pod(**{field.name: getattr(options, f"pod_{field.name}")
               for field in dataclasses.fields(Pod)})
  content = dict(
      cores=len(os.sched_getaffinity(0)), load=os.getloadavg()[0], devices=DEVICES,
      pauses=dict(sampling=options.sampling_seconds, judging=options.judging_seconds),
      measured=measured, pod=dataclasses.asdict(pod), batches=options.batches,
      simulated=simulate(pod, options.batches))
  options.out.parent.mkdir(parents=True, exist_ok=True)
  options.out.write_text(json.dumps(content, indent=1) + "\n")
  draw(content, options.picture)
  for row in measured:
    print(f"staleness {row['staleness']}: {row['seconds']:.3f} s per update (simulated "
          f"{row['predicted_seconds']:.3f}), {row['speed_up']:.2f}x, trainer waits "
          f"{100 * row['wait_fraction']:.0f}%")
  synchronous = content["simulated"][0]
  print(f"pod, synchronous: {synchronous['seconds']:.1f} s per batch")
  for staleness in (1, 2, 4):
    best = min((r for r in content["simulated"] if r["staleness"] == staleness),
               key=lambda r: r["seconds"])
    print(f"pod, staleness {staleness}: {best['seconds']:.1f} s per batch with "
          f"{best['sampling_devices']} of {pod.devices} devices sampling, "
          f"{synchronous['seconds'] / best['seconds']:.2f}x")


if __name__ == "__main__":
  main()
