"""Several processes are one run: the same numbers, the same files, and the same end.

Real processes of the command line with four virtual devices each, on one machine.
"""

import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parents[2]
CLOCKS = ("step_seconds", "tokens_per_second", "rollout_seconds", "compilations",
          "compile_seconds")
SFT, RL = 3, 4  # updates, two on each batch of rollouts
LAST = SFT + RL

CONFIG = """
from configs import base

def get_config():
  config = base.get_config()
  config.data.train = config.data.test = "task:addition"
  config.data.update(task=dict(digits=1), task_size=300, max_prompt_tokens=8,
                     max_completion_tokens=8)
  config.tokenizer.alphabet = "0123456789+="
  config.model.update(vocab_size=16, layers=1, d_model=16, heads=2, kv_heads=2, d_ff=32)
  config.mesh.update(data=2, fsdp=2, tensor=2)
  config.batch.update(row_length=32, micro_batch_rows=4, examples=16)
  config.optimizer.update(name="sgd", learning_rate=0.1)
  config.rollout.update(prompts=4, episode=dict(name="pieces:group", samples=4), max_tokens=4,
                        updates=2)
  config.reward.criteria = [dict(name="pieces:ends_in")]
  config.evaluate.update(problems=4, samples=0)
  config.checkpoint.every = 2
  config.log.update(samples_every=2, curves_every=0)
  config.phases = ("sft", "rl")
  config.sft = dict(kind="sft", steps=3, objective=[dict(name="cross_entropy")])
  config.rl = dict(kind="rl", steps=4)
  return config
"""

# What goes wrong with a process is told by its environment.
PIECES = """
import os, signal, time
from jaxrl import rollouts
from jaxrl.training import curves

if "DRAW" not in os.environ:
  curves.draw = lambda *_: None  # pictures take a third of such a short run
ALONE = "JAX_PROCESS_ID" not in os.environ
judged = 0

async def group(ctx, task, *, samples):
  if ctx.step >= 1:
    time.sleep(float(os.environ.get("SLEEP", "0")))  # for a signal to hit a certain batch
  return await rollouts.group(ctx, task, samples=samples)

def ends_in(task, completion):
  global judged
  judged += 1
  assert ALONE or os.environ["JAX_PROCESS_ID"] == "0", "only process 0 judges"
  if judged == int(os.environ.get("DIES_AFTER", "0")):
    os.kill(os.getpid(), signal.SIGKILL)
  return float(sum(map(ord, completion.text)) % 3)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A directory to start runs in, with a compilation cache that they share."""
  place = tmp_path_factory.mktemp("processes")
  (place / "tiny.py").write_text(CONFIG)
  (place / "pieces.py").write_text(PIECES)
  return place


class Running:
  """A run of one or several processes, each speaking into a file of its own."""

  def __init__(self, place, name, count, *options, script="", own=(), **environment):
    """Args:
      script: to run instead of the command line.
      own: environment of each process, where they differ.
    """
    command = ["-c", script] if script else [
        "-m", "jaxrl", "run", "--config=tiny.py", f"--workdir={name}", "--quiet", *options]
    with socket.socket() as s:
      s.bind(("localhost", 0))
      address = f"localhost:{s.getsockname()[1]}"
    self.workdir = place / name
    self.processes, self.logs = [], []
    for index in range(count):
      several = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(count),
                     JAX_PROCESS_ID=str(index)) if count > 1 else {}
      if own:
        several |= own[index]
      self.logs.append(place / f"{name}.{time.monotonic_ns()}.{index}.log")
      with open(self.logs[-1], "w") as file:
        self.processes.append(subprocess.Popen(
            [sys.executable, *command], cwd=place, stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | {
                "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}",
                "NPROC": "16", **several, **environment}))

  def said(self, index=0):
    return self.logs[index].read_text()

  def wait(self, seconds=600):
    """Exit statuses; everything that processes have said is in their files afterwards."""
    deadline = time.monotonic() + seconds
    try:
      codes = [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.processes]
    except subprocess.TimeoutExpired:
      raise AssertionError("still running\n" + self.all_said()) from None
    finally:
      for p in self.processes:
        p.kill()
    time.sleep(0.5)  # for the readers of their standard error
    return codes

  def until(self, condition, seconds=600):
    """Waits until the condition on what process 0 has said holds."""
    deadline = time.monotonic() + seconds
    while not condition(self.said()):
      assert all(p.poll() is None for p in self.processes), "ended early\n" + self.all_said()
      assert time.monotonic() < deadline, self.all_said()
      time.sleep(0.01)
    return self

  def all_said(self):
    return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs)

  def succeed(self):
    codes = self.wait()
    assert codes == [0] * len(codes), self.all_said()
    return self


def steps_saved(workdir):
  return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


def final_arrays(workdir):
  """Arrays of the last checkpoint as NumPy arrays, whatever devices they were saved from."""
  path = workdir.absolute() / "checkpoints" / str(LAST) / "state"
  with ocp.PyTreeCheckpointer() as checkpointer:
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                          checkpointer.metadata(path).item_metadata.tree)
    return checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=wanted))


def record(workdir):
  """Everything recorded of a run, without what a clock says."""
  rows = {path.name: [json.loads(line) for line in path.read_text().splitlines()]
          for path in [workdir / "metrics.jsonl", *sorted((workdir / "samples").glob("*.jsonl"))]}
  return {name: [{k: v for k, v in row.items() if k not in CLOCKS} for row in file]
          for name, file in rows.items()}


def close_records(found, expected):
  """Records of runs that differ in rounding only."""
  assert list(found) == list(expected)
  for name in expected:
    assert len(found[name]) == len(expected[name])
    for mine, theirs in zip(found[name], expected[name]):
      assert list(mine) == list(theirs)
      for key, value in theirs.items():
        if isinstance(value, float) and isinstance(mine[key], float):
          np.testing.assert_allclose(mine[key], value, rtol=1e-4, atol=2e-5, err_msg=key)
        else:
          assert mine[key] == value, (name, key)


def close_arrays(found, expected, tolerance=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(
      np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=tolerance, atol=tolerance),
      found["params"], expected["params"])


def same_arrays(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def one(place):
  """The run of one process with eight devices."""
  return Running(place, "one", 1).succeed()


@pytest.fixture(scope="module")
def two(place, one):
  """The run of two processes with four devices each; after the other, for they share the cores."""
  return Running(place, "two", 2, DRAW="1").succeed()


def files_of_a_run(workdir):
  return {str(p.relative_to(workdir)) for p in workdir.rglob("*")
          if p.is_file() and not {"checkpoints", "tensorboard"} & set(p.parts)}


def test_two_processes_compute_what_one_does_and_leave_the_same_files(one, two):
  close_arrays(final_arrays(two.workdir), final_arrays(one.workdir))
  close_records(record(two.workdir), record(one.workdir))
  assert files_of_a_run(two.workdir) == files_of_a_run(one.workdir) | {"curves.png"}
  assert len(list((two.workdir / "tensorboard").iterdir())) == 1
  summary = json.loads((two.workdir / "summary.json").read_text())
  assert summary["device"]["processes"] == 2 and summary["device"]["count"] == 8
  assert "curves.png" in two.said(0)
  assert not any(word in two.said(1) for word in ("sft", "phase", "evaluation", "jaxrl"))


def test_sigterm_to_one_process_stops_all_at_one_update_and_the_run_goes_on_in_any_number(
    place, one, two):
  """Saved between two updates on a batch; continued by two, and by one on another mesh."""
  running = Running(place, "asked", 2, SLEEP="2")
  running.until(lambda _: SFT + 2 in steps_saved(running.workdir))  # while the next are sampled
  running.processes[1].send_signal(signal.SIGTERM)
  assert running.wait() == [128 + signal.SIGTERM] * 2, running.all_said()
  newest = max(steps_saved(running.workdir))
  for index in range(2):
    assert (f"jaxrl: stopped as asked after update {newest}, whose checkpoint is saved; the same "
            "command continues asked") in running.said(index)
    assert "Traceback" not in running.said(index)
  assert "jaxrl: SIGTERM: a checkpoint is saved" in running.said(1)
  host = json.loads((running.workdir / f"checkpoints/{newest}/host/0.json").read_text())
  assert (newest, host["record"]["host"]["updates_left"]) == (SFT + 3, 1)
  assert not list((running.workdir / f"checkpoints/{newest}/host").glob("1.*"))
  shutil.copytree(running.workdir, place / "asked_of_one")

  again = Running(place, "asked", 2).succeed()
  assert f"continuing phase rl after update {newest}" in again.said()
  same_arrays(final_arrays(again.workdir), final_arrays(two.workdir))
  assert record(again.workdir) == record(two.workdir)

  alone = Running(place, "asked_of_one", 1, "--config.mesh.data=4", "--config.mesh.fsdp=1"
                  ).succeed()
  close_arrays(final_arrays(alone.workdir), final_arrays(one.workdir))
  close_records(record(alone.workdir), record(one.workdir))


def test_what_one_process_saved_two_continue(place, one, two):
  running = Running(place, "grows", 1).until(lambda said: "sft 1/3" in said)
  running.processes[0].send_signal(signal.SIGTERM)
  assert running.wait() == [128 + signal.SIGTERM], running.all_said()
  grown = Running(place, "grows", 2).succeed()
  assert "continuing phase sft after update" in grown.said()
  close_arrays(final_arrays(grown.workdir), final_arrays(one.workdir))
  close_records(record(grown.workdir), record(one.workdir))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_stops_the_other_within_a_minute_and_with_one_line(place, two, victim):
  """Process 0 dies while it judges and the other waits for it; process 1 during an update."""
  name, other = f"victim_{victim}", 1 - victim
  if victim == 0:
    running = Running(place, name, 2, own=[dict(DIES_AFTER="12"), {}])
    running.processes[0].wait(600)
  else:
    running = Running(place, name, 2).until(lambda said: "sft 2/3" in said)
    running.processes[1].kill()
  killed = time.monotonic()
  codes = running.wait(60)
  assert time.monotonic() - killed < 60 and codes[victim] == -signal.SIGKILL
  assert codes[other] not in (0, -signal.SIGKILL)
  said = running.said(other)
  assert (f"jaxrl: process {other} of 2 stopped, as process {victim} does not answer any more" in
          said.splitlines()[-1]), said
  steps = steps_saved(running.workdir)
  expected = f"that of update {max(steps)}" if steps else "it has no checkpoint yet"
  assert expected in said.splitlines()[-1] and "the same command on all processes" in said
  assert "Check failure stack trace" not in said



def test_a_disk_that_fills_up_stops_the_run_with_its_earlier_checkpoints_intact(place, one):
  """No file may grow beyond 30 kB from some moment on; those of a checkpoint would."""
  large = ("--config.model.d_model=64", "--config.model.d_ff=256", "--config.checkpoint.every=1")
  running = Running(place, "full", 1, *large, SLEEP="0.3").until(lambda said: "rl 2/4" in said)
  resource.prlimit(running.processes[0].pid, resource.RLIMIT_FSIZE, (30_000, -1))
  assert running.wait() == [1], running.all_said()
  intact = sorted(steps_saved(running.workdir))
  said = " ".join(running.said().splitlines()[-2:])
  assert f"jaxrl: checkpoint of step {intact[-1] + 1} could not be written to" in said, said
  assert "File too large" in said and "Check the free space" in said, said
  assert "No earlier checkpoint is lost" in said
  assert f"is of step {intact[-1]}, and the same command continues from it" in said
  assert "Traceback" not in running.said()
  again = Running(place, "full", 1, *large).succeed()
  assert f"after update {intact[-1]}" in again.said()


TALK = """
import sys, types
import numpy as np
from jaxrl import sharding
from jaxrl.batch import Task, Trajectory
from jaxrl.sampling import Request, SamplingParams
from jaxrl.training import processes
from jaxrl.rewards.scorer import RewardFailure
sharding.start_distributed()
me = int(__import__("os").environ["JAX_PROCESS_ID"])

def refused(kind, function, *arguments, **options):
  try:
    function(*arguments, **options)
  except kind as error:
    print(kind.__name__, "/", " ".join(str(error).split()), flush=True)
  else:
    print("accepted", flush=True)

assert processes.meet("here", b"same", flag=3 * me) == 3
for size in (0, 1, processes.PIECE - 9, processes.PIECE, 3 * processes.PIECE + 5):
  body = np.random.default_rng(size).bytes(size)
  assert processes.share(body if me == 0 else None) == body, size
refused(processes.Diverged, processes.meet, "batch 1", bytes([me]))
refused(processes.Diverged, processes.meet, f"place {me}")

def judge(task, completion):
  assert me == 0
  if completion.text == "?":
    raise RuntimeError("the judge is out")
  return len(completion.text) / 2
judge.inline = True
sys.modules["judges"] = types.SimpleNamespace(judge=judge)
def pairs(texts):
  return [(Task("t", [1]), Trajectory(tokens=np.arange(2), loss_mask=np.zeros(2), text=text))
          for text in texts]
scorer = processes.SharedScorer([dict(name="judges:judge")], max_failure_rate=0.0)
print([(s.reward, s.scored, s.evidence["judge"].score) for s in scorer.score(pairs(["a", "bb"]))])
refused(RewardFailure, scorer.score, pairs("?"))
refused(processes.Diverged, scorer.score, pairs(["a" * me]))

sampler = processes.AgreeingSampler.__new__(processes.AgreeingSampler)  # it refuses before it needs
request = Request(prompt=[1], n=2, key=(me,), params=SamplingParams(max_tokens=2))
refused(processes.Diverged, sampler.sample, None, [request], None)
"""


def test_what_processes_tell_each_other(place):
  running = Running(place, "talk", 2, script=TALK).succeed()
  said = [[line for line in running.said(i).splitlines()
           if line.startswith(("Diverged", "RewardFailure", "[("))] for i in range(2)]
  for index, lines in enumerate(said):
    content, elsewhere, scored, refused, other_texts, other_requests = lines
    assert content.startswith(
        f"Diverged / process 1 is at the same point as, but not equal to, process 0 (process "
        f"{index} is at: batch 1)")
    assert f"not at the same point as process 0 (process {index} is at: place {index})" in elsewhere
    assert scored == "[(0.5, True, 0.5), (1.0, True, 1.0)]"
    assert refused.startswith("RewardFailure / 1 of 16 samples cannot be judged")
    assert "the judge is out" in refused
    assert "1 samples to score" in other_texts and "1 requests to sample" in other_requests
