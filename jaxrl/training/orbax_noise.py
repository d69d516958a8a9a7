"""Keeps Orbax from talking past our own reports.

Whatever matters in its log lines is also raised, and then reported once by `checkpoints`. When one
read of a restore fails, it abandons the other reads together with their event loop, and Python
would print a traceback for each: where they are collected, and again when they finish after all.
The same holds for the writes of a save.
"""

from collections.abc import Iterator
import contextlib
import gc
import logging
import sys
import warnings


OF_ORBAX = ("tensorstore", "orbax-checkpoint-tmp")  # in what asyncio says of its reads and writes


def silence_logs() -> None:
  """Drops the log lines of Orbax, whatever their level, and leaves those of other libraries."""
  _add_filter("absl", _not_from_orbax)


@contextlib.contextmanager
def quiet_about_abandoned_reads(expected: type[Exception]) -> Iterator[None]:
  """If the body raises `expected`, collects what the failed restore left behind without a sound."""
  unraisable, asyncio = sys.unraisablehook, logging.getLogger("asyncio")
  sys.unraisablehook, disabled = (lambda _: None), asyncio.disabled
  try:
    yield
  except expected:
    asyncio.disabled = True
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", RuntimeWarning)  # coroutine ... was never awaited
      gc.collect()
    _add_filter("asyncio", _not_abandoned)
    unraisable = _dropping(unraisable)
    raise
  finally:
    sys.unraisablehook, asyncio.disabled = unraisable, disabled


def quiet_about_abandoned_writes() -> None:
  """From now on drops what the other writes of a save say that finish after one has failed."""
  _add_filter("asyncio", _not_abandoned)
  sys.unraisablehook = _dropping(sys.unraisablehook)


def _dropping(hook):
  return hook if isinstance(hook, _DropLateReports) else _DropLateReports(hook)


class _DropLateReports:
  """An unraisable hook that drops what is said by what finishes after its loop was closed."""

  def __init__(self, previous):
    self._previous = previous

  def __call__(self, unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
      self._previous(unraisable)


def _add_filter(logger: str, keep) -> None:
  if keep not in logging.getLogger(logger).filters:
    logging.getLogger(logger).addFilter(keep)


def _not_from_orbax(record: logging.LogRecord) -> bool:
  return "/orbax/" not in record.pathname.replace("\\", "/")


def _not_abandoned(record: logging.LogRecord) -> bool:
  said = record.getMessage()
  return "never retrieved" not in said or not any(word in said for word in OF_ORBAX)
