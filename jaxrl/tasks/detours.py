"""Sums with coin flips on the way: `123+456=` -> `95708102`, in which `9 7 5 0` matter, the sum from its
last digit, and the digits between are anybody's.

A digit of the sum is a step that decides; the digit after it is a step without effect, which those who
write solutions toss for.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from jaxrl.tasks import addition


def sample(rng: np.random.Generator, *, digits: int = 3) -> dict[str, Any]:
  """Two operands, and a solution whose free digits are uniform; no text is the answer, so `check` tells.

  Args:
    rng: source of randomness.
    digits: digits of each operand, 1 to 18; an answer has twice as many and two.
  """
  row = addition.sample(rng, digits=digits, answer_format="reversed")
  wanted = row["answer"].ljust(digits + 1, "0")
  free = rng.integers(10, size=len(wanted))
  return dict(row, answer=wanted, solution="".join(f"{w}{f}" for w, f in zip(wanted, free)))


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether every other digit of the completion, from the first on, is that of the sum."""
  text = completion.strip()
  return re.fullmatch(r"(?:[0-9]{2})+", text) is not None and text[::2] == row["answer"]


def key(row: Mapping[str, Any]) -> str:
  """The unordered pair of operands."""
  return addition.key(row)
