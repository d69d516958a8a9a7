"""Addition with a scratchpad or without one: `12+39=` -> `=51`, or `+15=51`.

The scratchpad is the sum from its last digit: carries then come before the digits that need them.
Short sums do without; for long ones it pays to write it.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from jaxrl.tasks import addition, knobs


def sample(rng: np.random.Generator, *, shortest: int = 1, longest: int = 3, scratchpad: float = 0.5
           ) -> dict[str, Any]:
  """Two operands of as many digits; the answer is the sum, and so ends the solution.

  Args:
    rng: source of randomness.
    shortest, longest: digits of the operands, uniform between these, 1 to 18.
    scratchpad: share of the solutions that have one, whatever the problem is.
  """
  knobs.lengths(shortest, longest, 18)
  if not 0 <= scratchpad <= 1:
    raise ValueError(f"scratchpad={scratchpad!r} is a share of the solutions: use 0 to 1")
  row = addition.sample(rng, digits=int(rng.integers(shortest, longest + 1)))
  total = row["answer"]
  thought = f"+{total[::-1]}" if rng.random() < scratchpad else ""
  return dict(question=row["question"], answer=total, solution=f"{thought}={total}", a=row["a"],
              b=row["b"])


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is "=" and the sum, behind any scratchpad or none."""
  match = re.fullmatch(r"(?:\+\d*)?=(\d+)", completion.strip())
  return match is not None and match[1] == str(row["a"] + row["b"])


def key(row: Mapping[str, Any]) -> str:
  """The unordered pair."""
  return addition.key(row)
