"""Text that appears as it is sampled."""

import re
from typing import TextIO

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could move a terminal's cursor, or worse


class Screen:
  """Writes a text that grows; on a terminal, without control characters but line ends and tabs."""

  def __init__(self, stream: TextIO):
    self._stream, self._written, self._live = stream, "", stream.isatty()

  def show(self, text: str) -> None:
    """Writes what is new of a text that begins as the last one did."""
    new = text[len(self._written):]
    if new:
      self._written = text
      self._put(new)

  def end(self, text: str) -> None:
    """Writes the rest of a text, and ends its line."""
    self.show(text)
    self._put("" if text.endswith("\n") else "\n")
    self._written = ""

  @property
  def written(self) -> str:
    """What has been shown since the last end."""
    return self._written

  def _put(self, text):
    text = CONTROL.sub("\ufffd", text) if self._live else text
    encoding = self._stream.encoding or "utf-8"
    self._stream.write(text.encode(encoding, "replace").decode(encoding))
    self._stream.flush()
