"""Which rows are decoded further when some samples have ended."""

import collections
from collections.abc import Hashable
import threading

import numpy as np

from jaxrl.batch import bucket
from jaxrl.models.cached_attention import Rows

MOVE = 2  # steps of decoding that take as long as moving the rows, roughly
LEARNING = 4  # calls of a kind in which programs for new sizes may be compiled


def rung_below(rows: int) -> int:
  """The next lower of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, ...

  Each size is a program. Between two of them a tenth of the rows is dead on average.
  """
  if rows <= 4:
    return max(rows - 1, 0)
  half = 2 ** ((rows - 1).bit_length() - 1)  # of the power of two that is at least `rows`
  steps = (4, 5, 6) if half >= 32 else (4, 6)
  return max(half * k // 4 for k in steps if half * k // 4 < rows)


class Ladder:
  """Sizes of device arrays while samples end, shared by all calls of a sampler.

  Which sizes a call passes through depends on the lengths of its samples. The first calls of a kind
  may use any, later ones only what has been compiled, so that programs stay few.
  """

  def __init__(self):
    self._lock = threading.Lock()
    self._calls = collections.Counter()
    self._known = set()

  def start(self, kind: Hashable) -> None:
    """Counts a call; `kind` is everything its first shapes depend on."""
    with self._lock:
      self._calls[kind] += 1

  def used(self, *program: Hashable) -> None:
    """Remembers a program, which begins with its kind."""
    with self._lock:
      self._known.add(program)

  def fewest(self, kind: Hashable, rows: int, capacity: int, remaining: int) -> int:
    """At how many live samples the rows should be moved together, 0 if that cannot pay.

    Args:
      kind: of the call.
      rows: that are decoded now.
      capacity: of their suffix caches.
      remaining: tokens that any of them may still get.
    """
    fewer = rung_below(rows)
    if (rows - fewer) * remaining < MOVE * rows:
      return 0
    needed = {(kind, "decode", fewer, capacity), (kind, "shrink", rows, capacity)}
    with self._lock:
      return fewer if self._calls[kind] <= LEARNING or needed <= self._known else 0

  def capacity(self, kind: Hashable, rows: int, old: int, needed: int) -> int:
    """To what length suffix caches of `old` tokens grow so that `needed` fit in.

    A length for which all programs exist is preferred, even if it is twice the shortest.
    """
    shortest = bucket(needed, old)
    with self._lock:
      if self._calls[kind] > LEARNING:
        for length in (shortest, 2 * shortest):
          if {(kind, "decode", rows, length), (kind, "grow", rows, old, length)} <= self._known:
            return length
    return shortest


def places(owners: np.ndarray, lengths: np.ndarray, samples: int) -> Rows:
  """Where rows in any order are found among the prompts.

  Args:
    owners: the prompt of each row; no more than `samples` rows belong to one. [rows]
    lengths: tokens of each prompt. [prompts]
    samples: places per prompt.
  """
  row_of = np.zeros((len(lengths), samples), np.int32)
  cell_of = np.zeros(len(owners), np.int32)
  used = np.zeros(len(lengths), np.int32)
  for row, prompt in enumerate(owners):
    row_of[prompt, used[prompt]] = row
    cell_of[row] = prompt * samples + used[prompt]
    used[prompt] += 1
  return Rows(lengths, row_of, cell_of)
