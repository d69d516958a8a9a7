"""Coroutines run to their end: also where an event loop already runs, and through Ctrl-C."""

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import signal
import sys
import threading


class _Interrupts:
  """Interrupts that arrive in the code of the event loop itself wait until it has ended.

  They would leave it half made, half turned or half closed, which ends in noise on stderr or in a
  wait for ever. Its task is cancelled instead, so that it ends at its next turn. Interrupts in any
  other code, such as an episode or the sampler, raise at once as ever, and so does a second one.

  Attributes:
    task: what the loop runs, once it does.
    kept: the interrupt that waits, if one does.
  """

  def __init__(self):
    self.task: asyncio.Task | None = None
    self.kept: KeyboardInterrupt | None = None
    self._seen = self._over = False

  @contextlib.contextmanager
  def waiting(self):
    """In its body interrupts wait, and what waits at its end is raised there."""
    if threading.current_thread() is not threading.main_thread():
      yield  # signals never interrupt it
      return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
      for number, handler in handlers.items():
        signal.signal(number, functools.partial(self._receive, handler))
      yield
    finally:
      self._over = True  # if another interrupt keeps a handler from being put back, ours does as it would
      for number, handler in handlers.items():
        signal.signal(number, handler)
      if self.kept:
        raise self.kept from None

  def begin(self):
    """The running task is the one to cancel, and its loop does not report interrupts of other tasks.

    Raises:
      CancelledError: there has been an interrupt before it ran.
    """
    self.task = asyncio.current_task()
    asyncio.get_running_loop().set_exception_handler(_report)
    if self.kept:
      raise asyncio.CancelledError

  def _receive(self, handler, number, frame):
    try:
      handler(number, frame)
    except KeyboardInterrupt as interrupt:
      first, self._seen = not self._seen, True
      if self._over or not (first and _is_of_the_loop(frame) or _is_of_a_callback(frame)):
        raise
      self.kept = self.kept or interrupt
      if self.task and not self.task.get_loop().is_closed():
        self.task.get_loop().call_soon_threadsafe(self.task.cancel)


def _report(loop, context):
  """What asyncio says of errors that nobody waits for; an interrupt has been raised elsewhere too."""
  if not isinstance(context.get("exception"), KeyboardInterrupt):
    loop.default_exception_handler(context)


def _is_of_the_loop(frame):
  """Whether a frame is in, or called by asyncio through nothing but, the standard library."""
  while frame is not None:
    package = _package(frame)
    if package == "asyncio" or frame.f_globals is globals():
      return True
    if package not in sys.stdlib_module_names:
      return False
    frame = frame.f_back
  return False


def _is_of_a_callback(frame):
  """Whether Python itself has called what runs, and would print and forget whatever it raises."""
  collected = {getattr(function, "__code__", None) for function in gc.callbacks}
  while frame is not None:
    if (frame.f_code.co_name == "__del__" or frame.f_code in collected
        or _package(frame) in ("weakref", "_weakrefset")):
      return True
    frame = frame.f_back
  return False


def _package(frame):
  return frame.f_globals.get("__name__", "").partition(".")[0]


def complete(function, *args):
  """Runs what a coroutine function returns to its end, also where a loop runs already (notebooks).

  Raises:
    KeyboardInterrupt: there was one, of SIGINT or of SIGTERM if its handler raises it.
    Exception: what the coroutine raised.
  """
  results, interrupts = [], _Interrupts()

  async def keep():
    interrupts.begin()
    # Not returned: `asyncio.run` has the finished task put into words when it gives back the handler
    # of Ctrl-C (enum.py does, for an error that signal.py expects), and so every array of its result.
    results.append(await function(*args))

  try:
    asyncio.get_running_loop()
  except RuntimeError:
    with interrupts.waiting():
      _run(keep)
  else:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      pool.submit(_run, keep).result()
  return results[0]


def _run(function):
  with asyncio.Runner() as runner:
    runner.run(function())
