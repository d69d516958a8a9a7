"""Addition with a scratchpad or without one: `12+39=` -> `=51`, or `+15=51`.

The scratchpad is the sum from its last digit: carries then come before the digits that need them.
Short sums do without; for long ones it pays to write it. Solutions may be flawed in one of three ways:
a wrong digit, an answer that is not what the scratchpad says, or an operand that nobody asked for.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from jaxrl.tasks import addition, knobs

FLAWS = ("correctness", "logic", "hallucination")


def sample(rng: np.random.Generator, *, shortest: int = 1, longest: int = 3, scratchpad: float = 0.5,
           flaws: float = 0.0) -> dict[str, Any]:
  """Two operands of as many digits; the answer is the sum, and so ends the solution.

  Args:
    rng: source of randomness.
    shortest, longest: digits of the operands, uniform between these, 1 to 18.
    scratchpad: share of the solutions that have one, whatever the problem is.
    flaws: share of the solutions with an error of a random kind.
  """
  knobs.lengths(shortest, longest, 18)
  if not 0 <= scratchpad <= 1:
    raise ValueError(f"scratchpad={scratchpad!r} is a share of the solutions: use 0 to 1")
  knobs.share("flaws", flaws)
  row = addition.sample(rng, digits=int(rng.integers(shortest, longest + 1)))
  total = row["answer"]
  thought = f"+{total[::-1]}" if rng.random() < scratchpad else ""
  solution = f"{thought}={total}"
  if flaws and rng.random() < flaws:
    solution = flawed(rng, solution, FLAWS[rng.integers(len(FLAWS))]) or solution
  return dict(question=row["question"], answer=total, solution=solution, a=row["a"], b=row["b"])


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is "=" and the sum, behind any scratchpad or none."""
  match = re.fullmatch(r"(?:\+\d*)?=(\d+)", completion.strip())
  return match is not None and match[1] == str(row["a"] + row["b"])


def key(row: Mapping[str, Any]) -> str:
  """The unordered pair."""
  return addition.key(row)


def flawed(rng: np.random.Generator, text: str, kind: str) -> str | None:
  """An answer with one error put in, otherwise of the same form; None for a text without that form, or
  for an error in a scratchpad where there is none.

    correctness     +15=51 -> +25=52, =51 -> =52     one digit of the sum is another
    logic           +15=51 -> +15=61                 the answer is not what the scratchpad says
    hallucination   +15=51 -> +15+3=54               an operand is added that nobody asked for

  Raises:
    ValueError: another kind.
  """
  if kind not in FLAWS:
    raise ValueError(f"flawed: kind={kind!r}; there are {', '.join(map(repr, FLAWS))}")
  match = re.fullmatch(r"(\+\d+)?=(\d+)", text.strip())
  if not match or (kind != "correctness" and match[1] is None):
    return None
  thought, total = match[1] or "", match[2]
  if kind == "hallucination":
    more = int(rng.integers(1, 10))
    return f"{thought}+{more}={int(total) + more}"
  place, digits = int(rng.integers(len(total))), list(total)
  digits[place] = str((int(digits[place]) + int(rng.integers(1, 10))) % 10)
  wrong = "".join(digits)
  if kind == "correctness" and thought:
    thought = f"+{wrong[::-1]}"
  return f"{thought}={wrong}"


def flaw_of(row: Mapping[str, Any], completion: str) -> str:
  """The kind of error that a completion shows: "" for none, "form" for another form than solutions
  have, else one of `FLAWS`."""
  match = re.fullmatch(r"(?:\+(\d*)((?:\+\d*)*))?=(\d+)", completion.strip())
  if not match:
    return "form"
  if match[2]:
    return "hallucination"
  if match[1] and match[1][::-1] != match[3]:
    return "logic"
  return "" if match[3] == str(row["a"] + row["b"]) else "correctness"
