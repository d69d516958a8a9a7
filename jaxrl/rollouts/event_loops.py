"""Coroutines run to their end: also where an event loop already runs, and through Ctrl-C."""

import asyncio
import concurrent.futures
import contextlib
import signal
import threading


@contextlib.contextmanager
def interrupts_wait():
  """Signals that Python handles are handled at the end of the block."""
  if threading.current_thread() is not threading.main_thread():
    yield  # signals never interrupt it
    return
  caught = []
  handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
  for number in handlers:
    signal.signal(number, lambda number, _: caught.append(number))
  try:
    yield
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
  for number in caught:
    signal.raise_signal(number)


def complete(coroutine):
  """Runs a coroutine to its end, also where an event loop already runs (notebooks)."""
  results = []

  async def keep():
    # Not returned: `asyncio.run` has the finished task put into words when it gives back the handler
    # of Ctrl-C (enum.py does, for an error that signal.py expects), and so every array of its result.
    results.append(await coroutine)

  try:
    asyncio.get_running_loop()
  except RuntimeError:
    with asyncio.Runner() as runner:
      with interrupts_wait():  # half an event loop would complain at its end
        runner.get_loop()
      runner.run(keep())
  else:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      pool.submit(asyncio.run, keep()).result()
  return results[0]
