"""An interrupt while the event loop of episodes is being made waits until it is whole."""

import signal

import pytest

from jaxrl.rollouts import event_loops


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_handled_at_the_end_of_the_block(number):
  seen, order = [], []
  old = signal.signal(number, lambda n, _: seen.append((n, list(order))))
  try:
    with event_loops.interrupts_wait():
      signal.raise_signal(number)
      order.append("block went on")
    assert seen == [(number, ["block went on"])]
    signal.raise_signal(number)
    assert len(seen) == 2  # the handler is back
  finally:
    signal.signal(number, old)


def test_a_deferred_interrupt_is_still_raised():
  with pytest.raises(KeyboardInterrupt):
    with event_loops.interrupts_wait():
      signal.raise_signal(signal.SIGINT)
