"""`kill -9` and the same command again: as if nothing had happened, bit for bit.

Real processes of the command line, killed when something appears in their directory.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parents[2]
TIMES = ("step_seconds", "tokens_per_second", "rollout_seconds", "compilations",
         "compile_seconds")
LAST = 11  # updates: 4 supervised, 7 on rollouts, two on each batch

CONFIG = """
from configs import base

def get_config():
  config = base.get_config()
  config.data.train = config.data.test = "task:addition"
  config.data.update(task=dict(digits=1), task_size=300, max_prompt_tokens=8,
                     max_completion_tokens=8)
  config.tokenizer.alphabet = "0123456789+="
  config.model.update(layers=1, d_model=16, heads=2, kv_heads=1, d_ff=32)
  config.batch.update(row_length=32, micro_batch_rows=2, examples=8)
  config.rollout.update(prompts=4, episode=dict(name="slowly:group", samples=4), max_tokens=4,
                        updates=2)
  config.reward.criteria = [dict(name="exact_match"),
                            dict(name="overlong", max_tokens=4, buffer=4)]
  config.evaluate.update(problems=8, samples=0)
  config.checkpoint.every = 3
  config.log.update(samples_every=2, curves_every=0)
  config.phases = ("sft", "rl")
  config.sft = dict(kind="sft", steps=4, objective=[dict(name="cross_entropy")])
  config.rl = dict(kind="rl", steps=7, objective=[
      dict(name="clipped_surrogate"), dict(name="kl", beta=0.1),
      dict(name="entropy", coefficient=0.01)])
  return config
"""

EPISODE = """
import time
from jaxrl import rollouts

async def group(ctx, task, *, samples: int):
  time.sleep(0.1)  # for a kill to hit the batch that it is meant for
  return await rollouts.group(ctx, task, samples=samples)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A directory to start runs in, with a compilation cache that they share."""
  place = tmp_path_factory.mktemp("resume")
  (place / "tiny.py").write_text(CONFIG)
  (place / "slowly.py").write_text(EPISODE)
  return place


def start(place, name):
  """A process of the command line, and the file that it speaks to."""
  environment = os.environ | {
      "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
      "JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(place / "cache")}
  command = [sys.executable, "-m", "jaxrl", "run", "--config=tiny.py", f"--workdir={name}",
             "--quiet"]
  log = place / f"{name}.log"
  with open(log, "w") as file:
    return subprocess.Popen(command, cwd=place, env=environment, stdout=file,
                            stderr=subprocess.STDOUT), log


def run(place, name):
  process, log = start(place, name)
  assert process.wait(timeout=300) == 0, log.read_text()
  return log.read_text()


def stop_when(place, name, condition, number=signal.SIGKILL, times=1):
  """Starts, sends the signal as soon as the condition holds -> (exit code, output).

  A second one is sent when the first has been noticed.

  Args:
    condition: of the run's directory and of what the process has said so far.
  """
  process, log = start(place, name)
  deadline = time.monotonic() + 300
  while not condition(place / name, log.read_text()):
    assert process.poll() is None, f"ended before it could be stopped:\n{log.read_text()}"
    assert time.monotonic() < deadline
    time.sleep(0.002)
  process.send_signal(number)
  if times == 2:
    while "a second signal stops it at once" not in log.read_text():
      assert process.poll() is None and time.monotonic() < deadline, log.read_text()
      time.sleep(0.002)
    process.send_signal(number)
  return process.wait(timeout=60), log.read_text()


def being_saved(workdir):
  return any("tmp" in p.name for p in (workdir / "checkpoints").glob("*"))


def newest(workdir):
  return max((int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()),
             default=0)


def final_arrays(workdir):
  path = workdir.absolute() / "checkpoints" / str(LAST) / "state"
  return ocp.StandardCheckpointer().restore(path)


def record(workdir):
  """Everything recorded of a run, without what a clock says."""
  rows = {path.name: [json.loads(line) for line in path.read_text().splitlines()]
          for path in [workdir / "metrics.jsonl", *sorted((workdir / "samples").glob("*.jsonl"))]}
  return {name: [{k: v for k, v in row.items() if k not in TIMES} for row in file]
          for name, file in rows.items()}


def truncate(checkpoint):
  """Cuts the larger files of a checkpoint in half; which of them a restore reads is Orbax's."""
  for path in checkpoint.rglob("*"):
    if path.is_file() and path.stat().st_size > 1000:
      os.truncate(path, path.stat().st_size // 2)


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(place):
  whole = run(place, "whole")
  assert "continuing" not in whole
  workdir = place / "killed"

  code, _ = stop_when(place, "killed", lambda _, said: "sft 2/4" in said)  # in the first phase
  assert code == -signal.SIGKILL
  assert newest(workdir) < LAST
  code, _ = stop_when(place, "killed", lambda w, said: "sft 4/4" in said and being_saved(w))
  assert code == -signal.SIGKILL
  code, _ = stop_when(place, "killed", lambda w, _: newest(w) == 7)
  assert code == -signal.SIGKILL and newest(workdir) == 7
  host = json.loads((workdir / "checkpoints/7/host/0.json").read_text())["record"]["host"]
  assert (host["phase"], host["updates_left"]) == (1, 1)  # between two updates on a batch

  code, output = stop_when(place, "killed", lambda _, said: "rl 4/7" in said, signal.SIGTERM, 2)
  assert "continuing phase rl after update 7" in output
  assert code == 128 + signal.SIGTERM
  assert "jaxrl: interrupted; the same command continues killed" in output
  assert "Traceback" not in output

  assert newest(workdir) == 7
  truncate(workdir / "checkpoints" / "7")
  code, output = stop_when(place, "killed", lambda _, said: "rl 1/7" in said, signal.SIGTERM)
  assert "checkpoint of step 7 is damaged" in output and "falling back to step 4" in output
  assert "continuing phase sft after update 4" in output
  assert code == 128 + signal.SIGTERM and newest(workdir) >= 5  # the update that it had just reported, or a later one
  assert (f"jaxrl: stopped as asked after update {newest(workdir)}, whose checkpoint is saved; the "
          "same command continues killed") in output
  assert f"continuing phase rl after update {newest(workdir)}" in run(place, "killed")

  jax.tree.map(np.testing.assert_array_equal, final_arrays(workdir), final_arrays(place / "whole"))
  assert record(workdir) == record(place / "whole")
  made = [row["step"] for row in record(workdir)["metrics.jsonl"] if "evaluation" not in row]
  assert made == list(range(1, LAST + 1))
  summaries = [json.loads((w / "summary.json").read_text()) for w in (workdir, place / "whole")]
  for mine, theirs in zip(*(s["phases"] for s in summaries), strict=True):
    assert {k: v for k, v in mine.items() if k != "seconds"} == {
        k: v for k, v in theirs.items() if k != "seconds"}

  before = {p: p.stat().st_mtime_ns for p in workdir.glob("*.json*")}
  again = run(place, "killed")
  assert "holds a finished run; nothing is left to do" in again and "continuing" not in again
  assert "curves.png" in again  # the table is shown once more
  changed = [p.name for p, at in before.items() if p.stat().st_mtime_ns != at]
  assert changed in ([], ["config.json"])
