"""Addition with two attempts: `12+34=` -> `65=64`, the sum from its last digit."""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from jaxrl.tasks import addition, knobs


def sample(rng: np.random.Generator, *, digits: int = 3, wrong: float = 0.5) -> dict[str, Any]:
  """Two operands of `digits` digits; the solution is an attempt, "=" and the answer.

  Args:
    rng: source of randomness.
    digits: digits of each operand, 1 to 18.
    wrong: share of the solutions whose first attempt has another digit somewhere.
  """
  knobs.integer("digits", digits, 1, 18)
  knobs.share("wrong", wrong)
  row = addition.sample(rng, digits=digits, answer_format="reversed")
  answer = first = row["answer"]
  if rng.random() < wrong:
    place = int(rng.integers(len(answer)))
    digit = (int(answer[place]) + int(rng.integers(1, 10))) % 10
    first = f"{answer[:place]}{digit}{answer[place + 1:]}"
  return dict(row, solution=f"{first}={answer}")


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the last attempt, of one or two, is the sum."""
  match = re.fullmatch(r"(?:\d*=)?(\d+)", completion.strip())
  return match is not None and match[1] == row["answer"]


def key(row: Mapping[str, Any]) -> str:
  """The unordered pair."""
  return addition.key(row)
