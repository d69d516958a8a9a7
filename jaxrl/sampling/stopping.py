"""Where samples end."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxrl.sampling.batching import Slot
from jaxrl.sampling.requests import Request, Sample


class StopStrings:
  """Looks for stop strings in the decoded text of one device call, between chunks.

  Text grows with every token, so the first token that completes a stop string is found by bisection
  and does not depend on where chunks end.
  """

  def __init__(self, decode: Callable[[list[int]], str] | None, requests: Sequence[Request],
               slots: Sequence[Slot], width: int):
    self._decode = decode
    self._open = {p * width + s: requests[slot.request].params.stop_strings
                  for p, slot in enumerate(slots) for s in range(slot.count)
                  if requests[slot.request].params.stop_strings}
    self.found = {}  # row -> (tokens, characters before the stop string)

  @property
  def pending(self) -> bool:
    """Whether any sample may still end with a stop string."""
    return bool(self._open)

  def search(self, tokens: np.ndarray, checked: int, lengths: np.ndarray) -> None:
    """Looks at every sample that has not ended with a stop string.

    Args:
      tokens: so far. [time, rows]
      checked: tokens already searched in vain.
      lengths: tokens of each sample, fewer than `tokens` where it ended. [rows]
    """
    for index, strings in list(self._open.items()):
      row = tokens[:lengths[index], index].tolist()
      if self._position(row, strings) is not None:
        low, high = checked, len(row)  # no stop string in the first `low`, one in the first `high`
        while high - low > 1:
          middle = (low + high) // 2
          if self._position(row[:middle], strings) is None:
            low = middle
          else:
            high = middle
        self.found[index] = high, self._position(row[:high], strings)
      if index in self.found or len(row) < len(tokens):
        del self._open[index]

  def _position(self, tokens, strings):
    text = self._decode(tokens)
    return min((i for i in map(text.find, strings) if i >= 0), default=None)


def lengths(tokens: np.ndarray, stop_ids: np.ndarray, max_tokens: np.ndarray) -> np.ndarray:
  """Tokens of each sample up to its stop token or limit, those so far if neither has come.

  Args:
    tokens: [time, rows]
    stop_ids: filled up with -1. [rows, ids]
    max_tokens: [rows]

  Returns:
    [rows]
  """
  stops = (tokens[..., None] == stop_ids).any(axis=-1)
  until_stop = np.where(stops.any(axis=0), stops.argmax(axis=0) + 1, len(tokens))
  return np.minimum(until_stop, max_tokens)


def cut(tokens: np.ndarray, logprobs: np.ndarray, lengths: np.ndarray, stop_ids: np.ndarray,
        rows: Sequence[int], found: dict[int, tuple[int, int]]) -> list[Sample]:
  """The samples of some rows, which have ended.

  Args:
    tokens, logprobs: [time, rows]
    lengths: as returned by `lengths`.
    stop_ids: [rows, ids]
    rows: which of them.
    found: stop strings, as in `StopStrings.found`.
  """
  def one(row):
    length, text_end = found.get(row, (lengths[row], None))
    stopped = row in found or tokens[length - 1, row] in stop_ids[row]
    return Sample(tokens[:length, row].copy(), logprobs[:length, row].copy(),
                  "stop" if stopped else "length", text_end)

  return [one(row) for row in rows]
