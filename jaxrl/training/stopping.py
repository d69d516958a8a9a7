"""Stopping when asked to: after the update in progress and its checkpoint, or at once.

Schedulers announce with SIGTERM that they take a machine back, some time before they do.
"""

from collections.abc import Iterator
import contextlib
import os
import signal

import jax

from jaxrl.training import processes


class Stopped(Exception):
  """The run stopped because it was asked to, with its checkpoint saved; the message says where."""


class Stop:
  """A request to stop. `receive` is the handler of SIGTERM.

  With several processes each may be asked at another time, or only one of them; `agreed` is where
  they settle that they all stop, and at which update.

  Attributes:
    number: of the signal that asked, 0 while none has.
  """

  def __init__(self):
    self.number = 0
    self._patient = False

  @contextlib.contextmanager
  def after_updates(self) -> Iterator[None]:
    """In its body, a first signal waits for `agreed`; elsewhere it stops one process at once."""
    before, self._patient = self._patient, True
    try:
      yield
    finally:
      self._patient = before

  def receive(self, number: int, frame: object = None) -> None:
    """Takes a signal.

    Raises:
      KeyboardInterrupt: with the number of the signal, if it is the second or nothing is patient.
    """
    del frame
    if self.number or not self._patient:
      raise KeyboardInterrupt(number)
    self.number = number
    os.write(2, f"jaxrl: {signal.Signals(number).name}: a checkpoint is saved after the update in "
                "progress, then the run stops; a second signal stops it at once\n".encode())

  def agreed(self, updates: int) -> bool:
    """Whether to stop here; all processes call it after the same updates and get one answer.

    Raises:
      processes.Diverged: they did not.
    """
    self.number = max(self.number, processes.meet(f"the end of update {updates}",
                                                  flag=self.number))
    return self.number != 0

  def patient_if_several(self) -> contextlib.AbstractContextManager[None]:
    """For a whole run: with several processes none stops alone, which would end the others."""
    return self.after_updates() if jax.process_count() > 1 else contextlib.nullcontext()
