"""Worker processes for criteria that may hang or crash, with a time-out for each judgement."""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import multiprocessing
from multiprocessing import connection
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from typing import Any

from jaxrl.rewards import criterion

START_SECONDS = 300.0  # for the imports of a worker, before its first job


@dataclasses.dataclass(frozen=True)
class Job:
  """One sample for some of the criteria. `payload` is a pickled `(task, completion)`."""

  key: int
  payload: bytes
  indices: tuple[int, ...]  # of the criteria, in the order of the specs


def pack(task: Any, completion: Any) -> tuple[bytes, set[str]]:
  """The payload of a sample, and the names of what it had to leave out.

  Only the fields travel, as attributes of plain namespaces: the classes would load JAX in a worker.
  Fields and row entries that cannot be pickled are left out.
  """
  task, completion = vars(task), vars(completion)
  try:
    return _pickle(task, completion), set()
  except Exception:
    row, lost_entries = _picklable(task.get("row", {}), "row")
    task, lost = _picklable({**task, "row": row}, "task")
    completion, lost_fields = _picklable(completion, "completion")
    return _pickle(task, completion), lost_entries | lost | lost_fields


def _pickle(task, completion):
  return pickle.dumps((types.SimpleNamespace(**task), types.SimpleNamespace(**completion)))


def _picklable(fields, owner):
  kept, lost = {}, set()
  for name, value in fields.items():
    try:
      pickle.dumps((name, value))
    except Exception:
      lost.add(f"{owner}[{name!r}]" if owner == "row" else f"{owner}.{name}")
    else:
      kept[name] = value
  return kept, lost


@dataclasses.dataclass
class _Worker:
  process: subprocess.Popen
  socket: connection.Connection
  deadline: float
  ready: bool = False
  job: Job | None = None

  def kill(self) -> int:
    """Ends the process with everything that it started; returns its exit status."""
    try:
      os.killpg(self.process.pid, signal.SIGKILL)  # a session of its own: pid and group are equal
    except (ProcessLookupError, PermissionError):
      pass
    self.socket.close()
    return self.process.wait()


class WorkerPool:
  """Runs criteria in worker processes.

  Each worker has one job at a time and answers criterion by criterion. So the one that hangs or
  kills its process is known exactly, nothing is judged twice, and a fresh worker takes over.
  Workers are new interpreters (not forks, which do not mix with JAX's threads, and not
  `multiprocessing` children, which would import the main script again). They see no accelerator,
  and end with the parent, however it ends.

  Args:
    specs: `(spec, where)` for each criterion, as in `compose.build`.
    workers: number of processes.
    timeout: seconds that one criterion may take on one sample.
  """

  def __init__(self, specs: Sequence[tuple[Mapping[str, Any], str]], *, workers: int,
               timeout: float):
    self._hello = pickle.dumps((list(specs), timeout))
    self._path = [os.path.abspath(entry) for entry in sys.path]  # "" is the current directory
    self._timeout = timeout
    self._workers = [self._start() for _ in range(workers)]

  def run(self, jobs: Iterable[Job]) -> Iterator[tuple[int, int, criterion.Criterion]]:
    """Yields `(job key, criterion index, outcome)` as outcomes arrive, in any order.

    A caller that stops early closes the generator, which ends the workers that are busy.

    Raises:
      RuntimeError: a worker cannot start, with its traceback.
    """
    queue = collections.deque(jobs)
    try:
      while queue or any(worker.job for worker in self._workers):
        for number, worker in enumerate(self._workers):
          if queue and worker.ready and worker.job is None:
            if not self._give(worker, queue[0]):  # it died while it had nothing to do
              worker.kill()
              self._workers[number] = self._start()
            else:
              queue.popleft()
        yield from self._collect(queue)
    finally:
      for number, worker in enumerate(self._workers):
        if worker.job is not None:
          worker.kill()
          self._workers[number] = self._start()

  def close(self) -> None:
    """Ends all workers. The pool cannot be used afterwards."""
    for worker in self._workers:
      worker.kill()
    self._workers = []

  def _start(self):
    ours, theirs = multiprocessing.Pipe()
    program = (f"import sys; sys.path[:] = {self._path!r}; from jaxrl.rewards import worker; "
               f"worker.main({theirs.fileno()})")
    # A criterion that uses JAX must not take the accelerator, nor all cores, from the trainer.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.DEVNULL,
                               pass_fds=[theirs.fileno()], start_new_session=True, env=environment)
    theirs.close()
    try:
      ours.send_bytes(self._hello)
    except ConnectionError:
      pass  # it is dead already, which the first wait reports
    return _Worker(process, ours, deadline=time.monotonic() + START_SECONDS)

  def _give(self, worker, job):
    try:
      worker.socket.send_bytes(pickle.dumps((job.indices, job.payload)))
    except ConnectionError:
      return False
    worker.job, worker.deadline = job, time.monotonic() + self._timeout
    return True

  def _collect(self, queue):
    """Waits for the next messages and deadlines and yields the outcomes that they bring."""
    waiting = [worker for worker in self._workers if worker.job or not worker.ready]
    pause = min(worker.deadline for worker in waiting) - time.monotonic()
    # Idle workers are watched too: the death of one is a message (end of file).
    arrived = connection.wait([worker.socket for worker in self._workers], max(pause, 0.0))
    for number, worker in enumerate(self._workers):
      if worker.socket in arrived:
        try:
          message = worker.socket.recv()
        except (EOFError, OSError):
          outcome = self._replace(number, queue, late=False)
        else:
          outcome = self._receive(worker, message)
      elif worker in waiting and time.monotonic() >= worker.deadline:
        outcome = self._replace(number, queue, late=True)
      else:
        continue
      if outcome is not None:
        yield outcome

  def _receive(self, worker, message):
    kind, *content = message
    if kind == "broken":
      raise RuntimeError(f"a reward worker cannot start; in the worker process:\n{content[0]}")
    if kind == "ready":
      worker.ready = True
      return None
    job = worker.job
    rest = job.indices[1:]
    worker.job = dataclasses.replace(job, indices=rest) if rest else None
    worker.deadline = time.monotonic() + self._timeout
    return job.key, job.indices[0], criterion.Criterion(*content)

  def _replace(self, number, queue, *, late):
    """Ends a worker that is dead or late; blames the criterion that it was running, if any."""
    worker = self._workers[number]
    status = worker.kill()
    if not worker.ready:
      raise RuntimeError(
          f"a reward worker did not start in {START_SECONDS:g} s; import less in the modules of "
          "your criteria" if late else f"a reward worker {_ending(status)} while it started")
    self._workers[number] = self._start()
    if (job := worker.job) is None:
      return None
    if rest := job.indices[1:]:
      queue.appendleft(dataclasses.replace(job, indices=rest))
    late = late or status == -signal.SIGALRM
    return job.key, job.indices[0], criterion.failed(
        f"took longer than {self._timeout:g} s and was ended" if late
        else f"its process {_ending(status)}")


def _ending(status):
  if status >= 0:
    return f"ended with exit status {status}"
  name = signal.Signals(-status).name
  return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
