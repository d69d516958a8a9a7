"""Addition that must not always be done: `123+456=` -> `579`, but `+123+456=` -> `+`, a refusal."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.tasks import addition, knobs

SIGN = "+"  # in front of a question that is to be refused, and the refusal


def sample(rng: np.random.Generator, *, digits: int = 3, answer_format: str = "reversed",
           forbidden: float = 0.5) -> dict[str, Any]:
  """Two operands, perhaps behind the sign; the right answer is `chosen`, the other one `rejected`.

  Args:
    rng: source of randomness.
    digits, answer_format: as in `addition`.
    forbidden: share of questions with the sign, which a refusal answers.
  """
  knobs.share("forbidden", forbidden)
  row = addition.sample(rng, digits=digits, answer_format=answer_format)
  pair = [row["answer"], SIGN]
  if rng.random() < forbidden:
    pair.reverse()
    row["question"] = SIGN + row["question"]
  return dict(row, answer=pair[0], solution=pair[0], chosen=pair[0], rejected=pair[1])


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is the sum, or the refusal where that is due."""
  return completion.strip() == row["answer"]


def key(row: Mapping[str, Any]) -> str:
  """The unordered pair of operands."""
  return addition.key(row)
