"""Addition with somebody's answer and a rating of it: `123+456=` -> `974`, 3 of 4.

Users see how many digits are wrong. How many they forgive differs from user to user, so that ratings of
different users cannot be compared with one another one by one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.tasks import addition, knobs

LEVELS = 4
CUTS = (-2.6, -1.4, -0.4)  # of an average user, in wrong digits


def sample(rng: np.random.Generator, *, digits: int = 3, users: int = 16, strictness: float = 1.0,
           noise: float = 0.3) -> dict[str, Any]:
  """Two operands, a `response` with 0 to 3 wrong digits, and the `label` that a user gives it.

  Args:
    rng: source of randomness.
    digits: digits of each operand, 1 to 18.
    users: of whom one is drawn, `user`.
    strictness: standard deviation over users of what they take off, in wrong digits.
    noise: scale of the logistic noise of a single rating.
  """
  knobs.integer("digits", digits, 1, 18)
  knobs.integer("users", users, 1, 1_000_000)
  row = addition.sample(rng, digits=digits, answer_format="reversed")
  user, errors = int(rng.integers(users)), int(rng.integers(4))
  return dict(row, response=with_errors(rng, row["answer"], errors), errors=errors, user=user,
              label=rating(rng, errors, user, strictness, noise))


def with_errors(rng: np.random.Generator, text: str, errors: int) -> str:
  """A number with so many digits changed, all of them if it has fewer."""
  digits = list(text)
  for place in rng.permutation(len(digits))[:errors]:
    digits[place] = str((int(digits[place]) + int(rng.integers(1, 10))) % 10)
  return "".join(digits)


def rating(rng: np.random.Generator, errors: int, user: int, strictness: float, noise: float) -> int:
  """`1 + number of cuts below -errors - strictness * b(user) + noise`; b is standard normal."""
  bias = strictness * np.random.default_rng([2602, user]).normal()
  return 1 + int(np.sum(-errors - bias + noise * rng.logistic() > np.array(CUTS)))


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is the sum."""
  return addition.check(row, completion)


def key(row: Mapping[str, Any]) -> str:
  """The unordered pair."""
  return addition.key(row)
