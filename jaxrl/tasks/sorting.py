"""Sorting numbers: `9,2,5=` -> `2,5,9`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.tasks import knobs


def sample(rng: np.random.Generator, *, shortest: int = 2, longest: int = 6, largest: int = 99
           ) -> dict[str, Any]:
  """A list of numbers, with repetition.

  Args:
    rng: source of randomness.
    shortest, longest: the length is uniform between them, both included; 1 to 1000.
    largest: numbers are uniform over 0 .. largest; at most 10**9.
  """
  shortest, longest = knobs.lengths(shortest, longest, 1000)
  knobs.integer("largest", largest, 1, 10 ** 9)
  length = rng.integers(shortest, longest + 1)
  numbers = [int(x) for x in rng.integers(largest + 1, size=length)]
  answer = ",".join(map(str, sorted(numbers)))
  return dict(question=",".join(map(str, numbers)) + "=", answer=answer, solution=answer,
              numbers=numbers)


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion lists the numbers in ascending order; spaces around commas are free."""
  listed = [part.strip() for part in completion.split(",")]
  return listed == [str(n) for n in sorted(row["numbers"])]


def key(row: Mapping[str, Any]) -> str:
  """The sorted numbers: every order of the same numbers has the same answer."""
  return ",".join(map(str, sorted(row["numbers"])))
