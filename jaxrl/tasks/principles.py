"""Strings of digits, and whether they satisfy a principle: sorted, of even length, with a 7, with a sum
below 20, without repetition (principles 0 to 4).

The principles conflict: what satisfies one may violate the others, so no single order of strings agrees
with all.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.tasks import knobs

PRINCIPLES = (lambda s: list(s) == sorted(s), lambda s: len(s) % 2 == 0, lambda s: "7" in s,
              lambda s: sum(map(int, s)) < 20, lambda s: len(set(s)) == len(s))


def sample(rng: np.random.Generator, *, shortest: int = 3, longest: int = 6, principles: str = "01234",
           conflicts: bool = False) -> dict[str, Any]:
  """A principle, a string that satisfies it (`chosen`) and one that does not (`rejected`).

  Args:
    rng: source of randomness.
    shortest, longest: length of a string, 2 to 9.
    principles: that are drawn from.
    conflicts: the rejected string satisfies more of the other principles than the chosen one.
  """
  shortest, longest = knobs.lengths(shortest, longest, 9)
  if shortest < 2 or shortest == longest:
    raise ValueError(f"shortest={shortest} must be at least 2 and below longest={longest}")
  if not principles or set(principles) - set("01234"):
    raise ValueError(f"principles={principles!r} must be some of the digits 0 to 4")
  principle = principles[rng.integers(len(principles))]
  while True:
    pair = [_string(rng, shortest, longest, int(principle), wanted) for wanted in (True, False)]
    others = [sum(satisfies(s, i) for i in range(5) if i != int(principle)) for s in pair]
    if not conflicts or others[0] < others[1]:
      return dict(question="=", answer=principle, solution=pair[0], principle=principle, chosen=pair[0],
                  rejected=pair[1])


def _string(rng, shortest, longest, principle, wanted):
  while True:
    digits = [str(d) for d in rng.integers(10, size=rng.integers(shortest, longest + 1))]
    digits = sorted(digits) if rng.random() < 0.5 else digits  # or hardly any would be
    text = "".join(digits)
    if satisfies(text, principle) == wanted:
      return text


def satisfies(text: str, principle: int) -> bool:
  """Whether a string of digits satisfies a principle."""
  return PRINCIPLES[principle](text)


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is the string that satisfies the principle."""
  return completion.strip() == row["chosen"]


def key(row: Mapping[str, Any]) -> str:
  """The two strings, in any order."""
  return " ".join(sorted([row["chosen"], row["rejected"]]))
