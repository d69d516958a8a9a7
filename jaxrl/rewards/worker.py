"""The process that runs criteria which may hang or crash; started by `pool.WorkerPool`.

It is a fresh interpreter that never imports JAX by itself and speaks pickled plain data over one
socket: first a list of specs, then job after job, each answered criterion by criterion, so that the
parent knows which one is running. It contains accidents, not attacks: it is no sandbox.
"""

from multiprocessing import connection
import pickle
import signal
import traceback

from jaxrl import compose
from jaxrl import rewards
from jaxrl.rewards import criterion

GRACE_SECONDS = 1.0  # beyond the time-out, after which a worker ends itself


def main(descriptor: int) -> None:
  """Serves jobs from the inherited socket `descriptor` until the parent closes it, or dies."""
  parent = connection.Connection(descriptor)
  try:
    specs, timeout = pickle.loads(parent.recv_bytes())
    try:
      functions = [_start(spec, where) for spec, where in specs]
    except BaseException:
      parent.send(("broken", traceback.format_exc()))
      return
    parent.send(("ready",))
    while True:
      _serve(parent, functions, timeout)
  except (EOFError, ConnectionError):
    return


def _start(spec, where):
  function = compose.build(spec, rewards, where=where)
  if warm_up := getattr(function.func, "warm_up", None):
    warm_up()
  return function


def _serve(parent, functions, timeout):
  indices, payload = pickle.loads(parent.recv_bytes())
  problem = None
  try:
    task, completion = pickle.loads(payload)
  except BaseException:  # a row may hold anything
    problem = criterion.failed("the task or its completion cannot be read in a worker process; "
                               f"keep the fields of rows to plain data\n{traceback.format_exc()}")
  for index in indices:
    # The parent ends a worker that takes too long. Should the parent be gone, or this process stuck
    # in C code, the default action of SIGALRM ends it without any help from Python.
    signal.setitimer(signal.ITIMER_REAL, timeout + GRACE_SECONDS)
    outcome = problem or criterion.judge(functions[index], task, completion)
    signal.setitimer(signal.ITIMER_REAL, 0)
    parent.send(("outcome", outcome.score, outcome.status, outcome.detail))
