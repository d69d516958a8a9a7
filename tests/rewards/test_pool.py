"""Worker processes: they start light, are replaced when they die, and never outlive the run."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from jaxrl.batch import Task, Trajectory
from jaxrl.rewards import Scorer
from jaxrl.rewards import pool as pool_lib

# A parent process that scores one completion for ever, after telling who its workers are.
PARENT = """
  import sys, types
  from jaxrl.rewards import Scorer

  def pair(text):
    return (types.SimpleNamespace(id="t", question="", answer="", row={}),
            types.SimpleNamespace(text=text))

  if __name__ != "__main__":
    raise SystemExit("a worker imported the main script")
  judge = Scorer([dict(name="MODULE:obeys")], workers=2, timeout=3.0, max_failure_rate=1.0)
  judge.score([pair("fine")] * 20)
  print(*[worker.process.pid for worker in judge._pool._workers], flush=True)
  if sys.argv[1] != "leave":
    judge.score([pair(sys.argv[1])])
"""


def pair(text):
  return (Task(id="t", prompt=[1]),
          Trajectory(tokens=np.array([1]), loss_mask=np.zeros(1, bool), text=text))


def is_alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  stat = pathlib.Path(f"/proc/{pid}/stat")  # a zombie that nobody reaps is not alive
  try:
    return not stat.parent.parent.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


def wait_until_gone(pids, seconds):
  limit = time.monotonic() + seconds
  while any(map(is_alive, pids)):
    assert time.monotonic() < limit, f"still alive: {[pid for pid in pids if is_alive(pid)]}"
    time.sleep(0.05)


@pytest.fixture
def parent(user_module, tmp_path):
  script = tmp_path / "parent.py"
  script.write_text(textwrap.dedent(PARENT).replace("MODULE", user_module))
  started = []

  def start(order):
    process = subprocess.Popen([sys.executable, script, order], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    started.append((process, workers))
    assert len(workers) == 2 and all(map(is_alive, workers)), process.stderr.read()
    return process, workers

  yield start
  for process, workers in started:
    process.kill()
    for worker in filter(is_alive, workers):  # after a failed test only
      os.killpg(worker, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("busy_with", ["sleep", "bignum"])
def test_workers_end_after_their_parent_was_killed(parent, busy_with):
  process, workers = parent(busy_with)
  time.sleep(0.3)
  process.kill()
  process.wait()
  wait_until_gone(workers, 15)


def test_an_interrupt_ends_the_run_at_once(parent):
  process, workers = parent("sleep")
  time.sleep(0.3)
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=30)
  assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors
  wait_until_gone(workers, 5)


def test_nothing_is_left_when_a_scorer_was_not_closed(parent):
  process, workers = parent("leave")
  assert process.wait(30) == 0
  assert process.stderr.read() == ""
  wait_until_gone(workers, 10)


def test_close_ends_the_workers(user_module):
  judge = Scorer([dict(name=f"{user_module}:obeys")], workers=2)
  pids = [worker.process.pid for worker in judge._pool._workers]
  judge.close()
  assert not any(map(is_alive, pids))


def test_a_worker_that_dies_idle_is_replaced_silently(user_module):
  with Scorer([dict(name=f"{user_module}:obeys")], workers=1) as judge:
    judge.score([pair("fine")])
    (worker,) = judge._pool._workers
    os.killpg(worker.process.pid, signal.SIGKILL)
    wait_until_gone([worker.process.pid], 5)
    assert all(one.scored for one in judge.score([pair("fine")] * 3))
    assert judge.counts["failed"] == 0


def test_a_child_of_a_hanging_criterion_is_ended_with_it(user_module):
  with Scorer([dict(name=f"{user_module}:obeys")], workers=1, timeout=1.0,
              max_failure_rate=1.0) as judge:
    judge.score([pair("fine")])
    group = judge._pool._workers[0].process.pid
    (found,) = judge.score([pair("child")])
  assert "longer than 1 s" in found.evidence["obeys"].detail
  wait_until_gone(members(group), 5)


def members(group):
  """Processes of a group, from /proc; empty where there is none."""
  found = []
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      if int(stat.read_text().rpartition(")")[2].split()[2]) == group:
        found.append(int(stat.parent.name))
    except OSError:  # it has ended meanwhile
      pass
  return found


def test_a_module_that_workers_cannot_import_stops_the_run(user_module, tmp_path):
  spec = dict(name=f"{user_module}:obeys")
  Scorer([spec], workers=0)  # imports it here
  (tmp_path / f"{user_module}.py").unlink()
  with Scorer([spec], workers=1) as judge:
    with pytest.raises(RuntimeError, match="(?s)cannot start.*No module named 'user_rewards"):
      judge.score([pair("fine")])


def test_a_module_that_kills_its_process_stops_the_run(user_module, tmp_path):
  spec = dict(name=f"{user_module}:obeys")
  Scorer([spec], workers=0)
  (tmp_path / f"{user_module}.py").write_text("import os\nos._exit(4)\n")
  with Scorer([spec], workers=1) as judge:
    with pytest.raises(RuntimeError, match="exit status 4 while it started"):
      judge.score([pair("fine")])


def test_an_import_that_hangs_stops_the_run(user_module, tmp_path, monkeypatch):
  monkeypatch.setattr(pool_lib, "START_SECONDS", 1.0)
  spec = dict(name=f"{user_module}:obeys")
  Scorer([spec], workers=0)
  (tmp_path / f"{user_module}.py").write_text("import time\ntime.sleep(600)\n")
  with Scorer([spec], workers=1) as judge:
    with pytest.raises(RuntimeError, match="did not start in 1 s"):
      judge.score([pair("fine")])


def test_importing_the_rewards_loads_neither_jax_nor_sympy():
  code = "import sys, jaxrl.rewards; print(*{'jax', 'sympy', 'transformers'} & set(sys.modules))"
  found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert found.stdout.split() == []
