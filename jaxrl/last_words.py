"""Says in one line why a process ended that JAX ended because another one was missing.

JAX notices within its heartbeat time-out that a process of a run is gone, and then aborts the
others from C++, wherever they are: nothing in Python runs any more, and what the terminal shows
is a page of stack traces. So a small process (this file, which loads nothing) reads what C++ writes
to standard error and passes it on, except for those pages; what Python writes goes past it.
"""

import os
import pathlib
import re
import select
import subprocess
import sys
import time

FATAL = b"Terminating process because the JAX distributed service"
SUSPECT = (FATAL, b"coordination_service")  # lines that come before it
PATIENCE = 3.0  # seconds that suspect lines are held back for the fatal one to follow


def watch(workdir: str | os.PathLike, index: str = "", count: str = "") -> None:
  """Starts the reader. Call it once, before `jax.distributed.initialize`.

  Args:
    workdir: of the run, whose checkpoints are named in the line.
    index, count: this process and how many there are, as far as that is known.
  """
  if os.name != "posix":
    return
  reader, writer = os.pipe()
  terminal = os.dup(2)
  subprocess.Popen([sys.executable, "-I", "-S", __file__, str(os.getpid()), str(workdir), index,
                    count], stdin=reader, stdout=subprocess.DEVNULL, stderr=terminal,
                   start_new_session=True)  # a signal to the group must not end it first
  os.close(reader)
  sys.stderr.flush()
  os.dup2(writer, 2)
  os.close(writer)
  sys.stderr = os.fdopen(terminal, "w", buffering=1, errors="backslashreplace")


def explanation(said: str, workdir: str, index: str, count: str) -> str:
  """The line, made of what C++ said."""
  me = f"process {index} of {count}" if index else "this process"
  if "RegisterTask" in said or "Connect()" in said:
    return (f"jaxrl: {me} stopped, as the processes of the run did not all come together in time: "
            "start all of them, each with its own JAX_PROCESS_ID and with the same "
            "JAX_NUM_PROCESSES and JAX_COORDINATOR_ADDRESS, a host and a free port that every "
            "machine can reach")
  unhealthy = re.search(r"unhealthy \(stopped sending heartbeats\):\s*\n((?:.*\d.*\n)+?)The tasks",
                        said)
  tasks = re.findall(r"\d+", unhealthy[1]) if unhealthy else []
  tasks = tasks or sorted(set(re.findall(r"Task (\d+) heartbeat timeout", said)))
  if not tasks and ("leader task" in said or "Socket closed" in said):
    tasks = ["0"]
  missing = "another process" if not tasks else "process " + ", ".join(dict.fromkeys(tasks))
  steps = [int(p.name) for p in pathlib.Path(workdir, "checkpoints").glob("*") if p.name.isdigit()]
  left = (f"its last checkpoint is that of update {max(steps)}, and the same command on all "
          "processes continues from it" if steps else
          "it has no checkpoint yet, and the same command on all processes starts it again")
  return (f"jaxrl: {me} stopped, as {missing} does not answer any more: it ended, was killed or "
          f"lost its network; what it said last is the place to look. The run in {workdir}: {left}")


def main(parent: int, workdir: str, index: str, count: str) -> None:
  """Passes standard input on to standard error until it ends or the parent does."""
  held, since = b"", None
  while True:
    ready, _, _ = select.select([0], [], [], 0.25)
    data = os.read(0, 1 << 16) if ready else b""
    over = not data and (bool(ready) or os.getppid() != parent)
    held += data
    found = [at for at in map(held.find, SUSPECT) if at >= 0]
    start = held.rfind(b"\n", 0, min(found)) + 1 if found else len(held)
    _write(held[:start])
    held, since = held[start:], (since or time.monotonic()) if found else None
    if held and FATAL not in held and (over or time.monotonic() - since > PATIENCE):
      _write(held)
      held, since = b"", None
    if over:
      break
  if held:
    _write((explanation(held.decode(errors="replace"), workdir, index, count) + "\n").encode())


def _write(data: bytes) -> None:
  while data:
    data = data[os.write(2, data):]


if __name__ == "__main__":
  main(int(sys.argv[1]), *sys.argv[2:])
