"""Addition of two numbers: `123+456=` -> `579`; with a draft behind it, `123+456=589=`; as a
question about an answer, `123+456=589+` -> `0`; or to be put in other words, `=123+456=` -> `456+123=`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.tasks import knobs


def sample(rng: np.random.Generator, *, digits: int = 3, answer_format: str = "plain",
           drafts: float = 0.0, verdicts: float = 0.0, rewrites: float = 0.0) -> dict[str, Any]:
  """Two operands, each uniform over the numbers of exactly `digits` digits.

  Args:
    rng: source of randomness.
    digits: digits of each operand, 1 (0 to 9) to 18.
    answer_format: how the sum is written, `plain` (579) or `reversed` (975: each digit then depends
      on operand digits and one carry only, which a small model learns sooner).
    drafts: share of questions that end with somebody's answer, wrong in a digit as often as right.
    verdicts: share of questions, among the others, that end with such an answer and want to know
      whether it is right, 1, or not, 0.
    rewrites: share of questions, among the others, that want another question with the same answer.
  """
  knobs.integer("digits", digits, 1, 18)
  if answer_format not in ("plain", "reversed"):
    raise ValueError(f"answer_format={answer_format!r}: use 'plain' or 'reversed'")
  for name, share in (("drafts", drafts), ("verdicts", verdicts), ("rewrites", rewrites)):
    knobs.share(name, share)
  smallest = 10 ** (digits - 1) if digits > 1 else 0
  a, b = (int(x) for x in rng.integers(smallest, 10 ** digits, size=2))
  answer = _written(a + b, answer_format)
  question = f"{a}+{b}="
  if drafts and rng.random() < drafts:
    question = f"{question}{_draft(rng, answer)}="
  elif verdicts and rng.random() < verdicts:
    draft = _draft(rng, answer)
    question, answer = f"{question}{draft}+", str(int(draft == answer))
  elif rewrites and rng.random() < rewrites:
    question, answer = f"={question}", f"{b}+{a}="
  return dict(question=question, answer=answer, solution=answer, a=a, b=b,
              answer_format=answer_format)


def _draft(rng, answer):
  """The answer, half the time with another digit somewhere."""
  if rng.random() < 0.5:
    return answer
  place = int(rng.integers(len(answer)))
  digit = (int(answer[place]) + int(rng.integers(1, 10))) % 10
  return f"{answer[:place]}{digit}{answer[place + 1:]}"


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is the sum, written in the row's format, or the verdict or the
  question that is asked for."""
  if row["question"].endswith("+") or row["question"].startswith("="):
    return completion.strip() == row["answer"]
  return completion.strip() == _written(row["a"] + row["b"], row["answer_format"])


def key(row: Mapping[str, Any]) -> str:
  """The unordered pair: 1+2 and 2+1 are one problem."""
  return "+".join(map(str, sorted((row["a"], row["b"]))))


def _written(total, answer_format):
  return str(total)[::-1] if answer_format == "reversed" else str(total)
