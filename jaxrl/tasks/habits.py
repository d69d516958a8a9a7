"""Addition by a pool of policies with habits: how they write an answer, and what they get wrong.

A policy is a style and an error. It writes in its own style mostly, and errs in its own way always: not
at all, in the last digit, or in the first digits. So two answers tell whether they may be of one policy.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.tasks import addition, knobs

STYLES = ("{}", "+{}", "{}+", "={}=")
ERRORS = ("none", "last", "first")
POLICIES = tuple(f"{style}{error}" for style in range(len(STYLES)) for error in range(len(ERRORS)))


def sample(rng: np.random.Generator, *, digits: int = 2, policies: str = "", shown: int = 4,
           faithful: float = 0.8, ranked: bool = False) -> dict[str, Any]:
  """Two operands, and answers: two of each of some policies, or three that are ranked.

  Args:
    rng: source of randomness.
    digits: of each operand, 2 to 9.
    policies: that are drawn from, as in "00 12 31" (style 0 to 3, error 0 to 2); empty is all.
    shown: policies whose answers a row has, at least 2.
    faithful: chance that a policy writes in its own style, and not in any.
    ranked: the answers are of one style each, with 0, 1 and at least 2 wrong digits, and have a `rank`.
  """
  knobs.integer("digits", digits, 2, 9)
  knobs.share("faithful", faithful)
  names = policies.split() or list(POLICIES)
  if set(names) - set(POLICIES):
    raise ValueError(f"policies={policies!r} must be some of {' '.join(POLICIES)}")
  row = addition.sample(rng, digits=digits)
  row["answer_format"] = "plain"
  if ranked:
    row["answers"] = [dict(text=_styled(rng, _wrong(rng, row["answer"], count)), rank=count + 1)
                      for count in range(3)]
    return row
  knobs.integer("shown", shown, 2, len(names))
  row["answers"] = [dict(policy=name, text=answer(rng, row["answer"], name, faithful))
                    for name in rng.permutation(names)[:shown].tolist() for _ in range(2)]
  return row


def answer(rng: np.random.Generator, right: str, policy: str, faithful: float) -> str:
  """What a policy says where `right` is the sum."""
  style, error = int(policy[0]), ERRORS[int(policy[1])]
  if error == "last":
    right = right[:-1] + _other(rng, right[-1])
  elif error == "first":
    right = "".join(_other(rng, d) for d in right[:-1]) + right[-1]
  return STYLES[style].format(right) if rng.random() < faithful else _styled(rng, right)


def _other(rng, digit):
  return str((int(digit) + int(rng.integers(1, 10))) % 10)


def _styled(rng, text):
  return STYLES[rng.integers(len(STYLES))].format(text)


def _wrong(rng, right, count):
  """The answer with no, one, or all digits wrong."""
  places = rng.permutation(len(right))[:count if count < 2 else len(right)]
  return "".join(_other(rng, d) if i in places else d for i, d in enumerate(right))


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is the sum, bare."""
  return addition.check(row, completion)


def key(row: Mapping[str, Any]) -> str:
  """The unordered pair of operands."""
  return addition.key(row)
