"""Addition with two answers to compare: the sum, and one that is wrong in a digit."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl.tasks import addition, knobs


def sample(rng: np.random.Generator, *, digits: int = 3, answer_format: str = "reversed",
           noise: float = 0.0, annotators: Sequence[float] = ()) -> dict[str, Any]:
  """Two operands of `digits` digits, with the fields `chosen` and `rejected`.

  Args:
    rng: source of randomness.
    digits: digits of each operand, 1 to 18.
    answer_format: as in `addition`.
    noise: share of the pairs whose answers are exchanged, at random.
    annotators: the same for each of several people, one of whom, whose number is in the field
      `annotator`, has labelled the pair.
  """
  knobs.share("noise", noise)
  people = [knobs.share(f"annotators[{i}]", share) for i, share in enumerate(annotators)]
  row = addition.sample(rng, digits=digits, answer_format=answer_format)
  answer = row["answer"]
  place = int(rng.integers(len(answer)))
  digit = (int(answer[place]) + int(rng.integers(1, 10))) % 10
  pair = [answer, f"{answer[:place]}{digit}{answer[place + 1:]}"]
  if rng.random() < noise:
    pair.reverse()
  if people:
    row["annotator"] = int(rng.integers(len(people)))
    if rng.random() < people[row["annotator"]]:
      pair.reverse()
  return dict(row, chosen=pair[0], rejected=pair[1])


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is the sum."""
  return addition.check(row, completion)


def key(row: Mapping[str, Any]) -> str:
  """The unordered pair."""
  return addition.key(row)
