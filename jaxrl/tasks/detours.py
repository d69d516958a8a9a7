"""Sums with coin flips on the way: `12+34=` -> `670428051`, in which `6 4 0` matter, the sum from its
last digit, and the digits between are anybody's.

A digit of the sum is a step that decides; the digits after it are steps without effect, which those who
write solutions toss for.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from jaxrl.tasks import addition
from jaxrl.tasks import knobs


def sample(rng: np.random.Generator, *, digits: int = 2, flips: int = 2) -> dict[str, Any]:
  """Two operands, and a solution whose free digits are uniform; no text is the answer, so `check` tells.

  Args:
    rng: source of randomness.
    digits: digits of each operand, 1 to 18; the sum has one more.
    flips: free digits after each of those, 0 to 9.
  """
  knobs.integer("flips", flips, 0, 9)
  row = addition.sample(rng, digits=digits, answer_format="reversed")
  wanted = row["answer"].ljust(digits + 1, "0")
  free = rng.integers(10, size=(len(wanted), flips))
  solution = "".join(w + "".join(map(str, f)) for w, f in zip(wanted, free))
  return dict(row, answer=wanted, solution=solution)


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion has as many digits as the solution, and those that decide are the sum's."""
  text, size = completion.strip(), len(row["solution"])
  step = size // len(row["answer"])
  return re.fullmatch("[0-9]+", text) is not None and len(text) == size and text[::step] == row["answer"]


def key(row: Mapping[str, Any]) -> str:
  """The unordered pair of operands."""
  return addition.key(row)
