"""Bracket matching: close what is open, `([]{=` -> `})`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.tasks import knobs

PAIRS = ("()", "[]", "{}", "<>")
CLOSING = 0.4  # probability of closing the innermost bracket where one is open


def sample(rng: np.random.Generator, *, shortest: int = 2, longest: int = 8, kinds: int = 3
           ) -> dict[str, Any]:
  """The beginning of a balanced text, with at least one bracket left open.

  Args:
    rng: source of randomness.
    shortest, longest: the length is uniform between them, both included; 1 to 1000.
    kinds: kinds of brackets, 1 to 4.
  """
  shortest, longest = knobs.lengths(shortest, longest, 1000)
  knobs.integer("kinds", kinds, 1, len(PAIRS))
  length = int(rng.integers(shortest, longest + 1))
  text, pending = "", ""  # pending: the closing brackets still owed, innermost last
  for position in range(length):
    must_open = len(pending) <= (1 if position == length - 1 else 0)
    if must_open or rng.random() >= CLOSING:
      pair = PAIRS[rng.integers(kinds)]
      text, pending = text + pair[0], pending + pair[1]
    else:
      text, pending = text + pending[-1], pending[:-1]
  answer = pending[::-1]
  return dict(question=f"{text}=", answer=answer, solution=answer)


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether question and completion together balance, with nothing opened by the completion."""
  closer = dict(PAIRS)
  completion = completion.strip()
  if set(completion) & set(closer):
    return False
  pending = []
  for character in row["question"][:-1] + completion:
    if character in closer:
      pending.append(closer[character])
    elif not pending or pending.pop() != character:
      return False
  return not pending


def key(row: Mapping[str, Any]) -> str:
  """The open text."""
  return row["question"][:-1]
