"""The last digit of a long sum, in pieces: `3+4+5+6+7=` -> `372++32` -> `85=5`.

A piece holds the sums so far, without tens, of a few more terms. Then "++" and a summary, how many
terms are done and their sum, or "=" and the answer. A question may end with such a summary,
`3+4+5+6+7=32+`, which is gone on from, or with two, `3+4+5+6+7=13+32+`, of which the last counts.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from jaxrl.tasks import knobs


def sample(rng: np.random.Generator, *, shortest: int = 6, longest: int = 9, piece: int = 0,
           resumed: float = 0.0) -> dict[str, Any]:
  """Terms of one digit, and one piece of the way to their sum as the solution.

  Args:
    rng: source of randomness.
    shortest, longest: number of terms, uniform between these, 1 to 9.
    piece: terms of a solution, uniform from 1 to this; 0 is all that are left.
    resumed: share of the questions of several terms that end with a summary of their first.
  """
  knobs.lengths(shortest, longest, 9)
  knobs.integer("piece", piece, 0, 9)
  if isinstance(resumed, bool) or not isinstance(resumed, int | float) or not 0 <= resumed <= 1:
    raise ValueError(f"resumed={resumed!r}: use a share from 0 to 1")
  count = int(rng.integers(shortest, longest + 1))
  terms = [int(x) for x in rng.integers(10, size=count)]
  sums = [int(x) % 10 for x in np.cumsum(terms)]
  done = int(rng.integers(1, count)) if count > 1 and rng.random() < resumed else 0
  after = min(count, done + int(rng.integers(1, piece + 1))) if piece else count
  question = "+".join(map(str, terms)) + "="
  if done and (earlier := int(rng.integers(done))):
    question += f"{earlier}{sums[earlier - 1]}+"
  if done:
    question += f"{done}{sums[done - 1]}+"
  thought = "".join(map(str, sums[done:after]))
  ending = f"={sums[-1]}" if after == count else f"++{after}{sums[after - 1]}"
  return dict(question=question, answer=str(sums[-1]), solution=thought + ending, terms=terms)


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is digits, "=" and the last digit of the sum."""
  match = re.fullmatch(r"[0-9]*=([0-9])", completion.strip())
  return match is not None and int(match[1]) == sum(row["terms"]) % 10


def key(row: Mapping[str, Any]) -> str:
  """The terms, in any order."""
  return "+".join(map(str, sorted(row["terms"])))
