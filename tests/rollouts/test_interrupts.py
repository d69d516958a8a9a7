"""Interrupts of running episodes: whatever they hit, they end it, once and without noise."""

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
import time

import pytest

from jaxrl.rollouts import event_loops


async def branches():
  """An episode of the usual kind: something to wait for, branches, work in a thread."""
  async def branch(number):
    await asyncio.sleep(0)
    return number
  return sum(await asyncio.gather(branch(1), branch(2), asyncio.to_thread(int, 3)))


def complete_with_a_signal_at(place, number):
  """Runs `branches` with an interrupt at one of the lines that the event loop executes.

  Returns:
    How it ended, and the number of lines that were executed until then.
  """
  lines = 0

  def trace(frame, event, argument):
    nonlocal lines
    ours = frame.f_globals["__name__"].partition(".")[0] == "asyncio" or (
        frame.f_globals is vars(event_loops))
    collected = "__del__" in (frame.f_code.co_name, frame.f_back.f_code.co_name)  # closed before
    if not ours or collected:
      return None
    lines += 1
    if lines == place:
      signal.getsignal(number)(number, frame)  # as Python does between two lines
    return trace

  before = sys.gettrace()
  sys.settrace(trace)
  try:
    return event_loops.complete(branches), lines
  except KeyboardInterrupt as interrupt:
    return interrupt.args[0], lines
  finally:
    sys.settrace(before)


@pytest.fixture
def interrupted():
  """Ctrl-C and SIGTERM interrupt, as they do in a run."""
  def interrupt(number, _):
    raise KeyboardInterrupt(number)
  numbers = (signal.SIGINT, signal.SIGTERM)
  before = [signal.signal(number, interrupt) for number in numbers]
  yield interrupt
  for number, handler in zip(numbers, before):
    signal.signal(number, handler)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_at_any_line_of_the_event_loop_ends_it_without_noise(
    interrupted, number, monkeypatch, caplog):
  noise = []
  monkeypatch.setattr(sys, "unraisablehook", lambda found: noise.append(repr(found.exc_value)))
  assert complete_with_a_signal_at(0, number)[0] == 6
  gc.collect()
  place, ended = 1, None
  while True:
    ended, lines = complete_with_a_signal_at(place, number)
    if lines < place:
      break
    assert ended == number, place
    gc.collect(0)
    assert not noise and not caplog.records, place
    place += 1
  assert ended == 6 and place > 500
  assert event_loops.complete(branches) == 6
  for each in (signal.SIGINT, signal.SIGTERM):  # whatever has happened to the handlers, they interrupt
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(each)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_waits_for_an_episode_is_woken_at_once(interrupted, number):
  async def waits():
    threading.Timer(0.05, os.kill, [os.getpid(), number]).start()
    await asyncio.sleep(60)
  start = time.monotonic()
  with pytest.raises(KeyboardInterrupt):
    event_loops.complete(waits)
  assert time.monotonic() - start < 10


def test_an_interrupt_in_the_code_of_an_episode_is_raised_there(interrupted):
  reached = []

  async def episode():
    try:
      signal.raise_signal(signal.SIGTERM)
      reached.append("after the signal")
    except KeyboardInterrupt:
      reached.append("where it came")
      raise
  with pytest.raises(KeyboardInterrupt):
    event_loops.complete(episode)
  assert reached == ["where it came"]


def test_a_second_interrupt_does_not_wait_for_a_thread(interrupted):
  """The loop, once asked to end, waits for threads that it started."""
  done = threading.Event()

  def twice():
    for seconds in (0.05, 0.3):
      time.sleep(seconds)
      os.kill(os.getpid(), signal.SIGTERM)

  async def waits():
    threading.Thread(target=twice).start()
    await asyncio.to_thread(done.wait, 60)
  start = time.monotonic()
  try:
    with pytest.raises(KeyboardInterrupt):
      event_loops.complete(waits)
    assert 0.3 < time.monotonic() - start < 10
  finally:
    done.set()


def test_a_second_interrupt_does_not_wait_where_the_first_was_raised_at_once(interrupted):
  done = threading.Event()

  async def serve():
    async def episode():
      await asyncio.sleep(0.05)
      threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM]).start()
      signal.raise_signal(signal.SIGTERM)
    task = asyncio.ensure_future(episode())
    try:
      await asyncio.get_running_loop().run_in_executor(None, done.wait, 60)
    finally:
      task.cancel()
  start = time.monotonic()
  try:
    with pytest.raises(KeyboardInterrupt):
      event_loops.complete(serve)
    assert time.monotonic() - start < 10
  finally:
    done.set()


def test_an_interrupt_of_what_python_calls_by_itself_is_not_lost(interrupted, monkeypatch):
  """What a callback of the garbage collector or `__del__` raises is printed and forgotten."""
  noise = []
  monkeypatch.setattr(sys, "unraisablehook", lambda found: noise.append(repr(found.exc_value)))

  class Dying:
    def __del__(self):
      signal.raise_signal(signal.SIGTERM)

  async def drops():
    Dying()
    await asyncio.sleep(60)

  def collecting(phase, _):
    if phase == "start":
      signal.raise_signal(signal.SIGINT)

  async def collects():
    gc.callbacks.append(collecting)
    gc.collect()
    await asyncio.sleep(60)
  for episode in (drops, collects):
    start = time.monotonic()
    try:
      with pytest.raises(KeyboardInterrupt):
        event_loops.complete(episode)
    finally:
      gc.callbacks[:] = [function for function in gc.callbacks if function is not collecting]
    assert time.monotonic() - start < 10 and not noise


@pytest.mark.parametrize("error, reports", [(KeyboardInterrupt, 0), (ValueError, 1)])
def test_an_interrupt_of_a_branch_that_nobody_awaits_is_raised_and_not_reported_too(error, reports, caplog):
  async def episode():
    async def branch():
      raise error("in a branch")
    branches = [asyncio.ensure_future(branch())]
    await asyncio.sleep(0.01)
    branches.clear()
  with pytest.raises(KeyboardInterrupt) if error is KeyboardInterrupt else contextlib.nullcontext():
    event_loops.complete(episode)
  gc.collect()
  assert len(caplog.records) == reports


def test_a_handler_that_raises_nothing_stops_nothing():
  seen = []
  before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
  try:
    async def episode():
      threading.Timer(0.02, os.kill, [os.getpid(), signal.SIGTERM]).start()
      await asyncio.sleep(0.2)
      return "whole"
    assert event_loops.complete(episode) == "whole"
    assert seen == [signal.SIGTERM]
  finally:
    signal.signal(signal.SIGTERM, before)
