"""Addition as unreliable people write it down: `123+456=` -> `975`, the sum from its last digit.

There are two kinds of questions, `123+456=` and `+123+456=`. What is written beside a question of the
first kind, its solution, may have another digit somewhere, so that the likeliest solution is still the sum.
Beside the second kind all carries may be left out, the same mistake every time. And what a verifier holds
for the answer to a question of the second kind may be wrong.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.tasks import addition, knobs

SIGN = "+"  # in front of a question of the second kind


def sample(rng: np.random.Generator, *, digits: int = 3, signed: float = 0.5, wrong: float = 0.0,
           slips: float = 0.0, doubtful: float = 0.0) -> dict[str, Any]:
  """Two operands, a solution and an answer, which need not be the sum.

  Args:
    rng: source of randomness.
    digits: digits of each operand, 1 to 18.
    signed: share of the questions that are of the second kind.
    wrong: share of the solutions of the first kind that have another digit somewhere.
    slips: share of the solutions of the second kind that are added digit by digit, without carries.
    doubtful: share of the answers of the second kind that have another digit somewhere.
  """
  for name, share in (("signed", signed), ("wrong", wrong), ("slips", slips), ("doubtful", doubtful)):
    knobs.share(name, share)
  row = addition.sample(rng, digits=digits, answer_format="reversed")
  answer = solution = row["answer"]
  if rng.random() >= signed:
    return dict(row, solution=_changed(rng, solution) if rng.random() < wrong else solution)
  if rng.random() < slips:
    solution = "".join(str((int(x) + int(y)) % 10)
                       for x, y in zip(str(row["a"])[::-1], str(row["b"])[::-1]))
  if rng.random() < doubtful:
    answer = _changed(rng, answer)
  return dict(row, question=SIGN + row["question"], answer=answer, solution=solution)


def _changed(rng, text):
  """The text with another digit somewhere."""
  place = int(rng.integers(len(text)))
  digit = (int(text[place]) + int(rng.integers(1, 10))) % 10
  return f"{text[:place]}{digit}{text[place + 1:]}"


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is the row's answer, be that the sum or not."""
  return completion.strip() == row["answer"]


def key(row: Mapping[str, Any]) -> str:
  """The unordered pair of operands."""
  return addition.key(row)
