"""Text that appears as it is sampled."""

import re
from typing import TextIO

# What could move a terminal's cursor, or worse, and what turns the order of letters round.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Screen:
  """Writes a text that grows; on a terminal, without control characters but line ends and tabs."""

  def __init__(self, stream: TextIO):
    self._stream, self._written, self._live = stream, "", stream.isatty()

  def show(self, text: str) -> None:
    """Writes what is new of a text that begins as the last one did."""
    new = text[len(self._written):]
    if self._live:
      new = new.removesuffix("\r")  # which may be half of a line's end
    if new:
      self._written += new
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
    text = CONTROL.sub("\ufffd", text.replace("\r\n", "\n")) if self._live else text
    encoding = self._stream.encoding or "utf-8"
    self._stream.write(text.encode(encoding, "replace").decode(encoding))
    self._stream.flush()
