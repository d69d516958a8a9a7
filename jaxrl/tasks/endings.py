"""Words in which one taste is about the last letter and another about the length.

Of two words, the first taste prefers the one that ends in a, c, e or g, the second the longer one. What
one taste prefers says nothing about the other.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.batch import Task, Trajectory
from jaxrl.tasks import knobs

LETTERS, FIRM = "abcdefgh", "aceg"


def sample(rng: np.random.Generator, *, shortest: int = 3, longest: int = 8) -> dict[str, Any]:
  """A first letter and two words that begin with it, of different length and kind of ending.

  Args:
    rng: source of randomness.
    shortest, longest: letters of a word; lengths are uniform between them.

  Returns:
    A row with `chosen` and `rejected` in an order that means nothing, and for each taste, `ending` and
    `length`, whether it prefers the first, 1, or the second, 0.
  """
  shortest, longest = knobs.lengths(shortest, longest, 64)
  if not 2 <= shortest < longest:
    raise ValueError(f"shortest={shortest} must be at least 2 and less than longest={longest}: words that "
                     "are compared differ in length")
  letter = LETTERS[rng.integers(len(LETTERS))]
  lengths = shortest + rng.choice(longest - shortest + 1, size=2, replace=False)
  firm = int(rng.integers(2))  # which one ends in a firm letter
  words = []
  for place, length in enumerate(lengths):
    ends = FIRM if place == firm else [x for x in LETTERS if x not in FIRM]
    middle = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=int(length) - 2))
    words.append(letter + middle + ends[rng.integers(len(ends))])
  return dict(question=f"{letter}:", answer=words[firm], solution=words[int(rng.integers(2))],
              chosen=words[0], rejected=words[1], ending=float(firm == 0),
              length=float(lengths[0] > lengths[1]))


def firm(task: Task, completion: Trajectory) -> float:
  """Whether the last letter is as the first taste wants it, as a criterion: `jaxrl.tasks.endings:firm`."""
  return float(completion.text[-1:] in tuple(FIRM))


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether a word ends as the first taste wants it."""
  return completion[-1:] in tuple(FIRM)


def key(row: Mapping[str, Any]) -> str:
  """The words."""
  return " ".join(sorted([row["chosen"], row["rejected"]]))
