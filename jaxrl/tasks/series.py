"""How a series goes on: `123+456+` -> `975=579+035`, a thought, "=" and one or more terms.

Each term is the sum of the two before it, without the last carry. The thought is the next term from
its last digit. In `123+456+=035+` a term is missing, between 456 and 035.
"""

from collections.abc import Mapping
import functools
from typing import Any

import numpy as np

from jaxrl.tasks import knobs

LARGEST = 3  # digits whose cycles are few enough to tell apart


def sample(rng: np.random.Generator, *, digits: int = 3, terms: int = 6, missing: float = 0.0,
           most: int = 3) -> dict[str, Any]:
  """A series as `document`, and a question about its third or a later term but the last.

  The answer is what the document goes on with, the solution as much of it as chance decides.

  Args:
    rng: source of randomness.
    digits: of each term, with leading zeros, 2 or 3.
    terms: of a document, 4 to 64.
    missing: share of the questions in which the term after the one in question is given too.
    most: terms of a solution, at most.
  """
  knobs.integer("digits", digits, 2, LARGEST)
  knobs.integer("terms", terms, 4, 64)
  knobs.integer("most", most, 1, terms)
  if isinstance(missing, bool) or not isinstance(missing, int | float) or not 0 <= missing <= 1:
    raise ValueError(f"missing={missing!r}: use a share from 0 to 1")
  modulus = 10 ** digits
  series = [int(x) for x in rng.integers(modulus, size=2)]
  while len(series) < terms:
    series.append((series[-2] + series[-1]) % modulus)
  written = [f"{x:0{digits}}" for x in series]
  at = int(rng.integers(2, terms - 1))
  question = "".join(f"{x}+" for x in written[:at])
  if missing and rng.random() < missing:
    question += f"={written[at + 1]}+"
  rest = written[at:]
  shown = rest[:int(rng.integers(1, most + 1))]
  return dict(question=question, answer="+".join(rest), document="".join(f"{x}+" for x in written),
              solution=f"{rest[0][::-1]}={'+'.join(shown)}", first=series[:2], digits=digits)


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is digits, "=" and whole terms as the document goes on."""
  thought, mark, terms = completion.strip().partition("=")
  thought_is_digits = thought.isascii() and (thought.isdigit() or not thought)
  return bool(mark and terms) and thought_is_digits and (
      f"{row['answer']}+".startswith(f"{terms}+"))


def key(row: Mapping[str, Any]) -> str:
  """The cycle that the series runs through, so that no two splits share any part of one."""
  a, b = row["first"]
  return str(_cycles(10 ** row["digits"])[a * 10 ** row["digits"] + b])


@functools.cache
def _cycles(modulus):
  """The smallest a * modulus + b of the cycle of each pair (a, b). [modulus ** 2]"""
  a, b = np.divmod(np.arange(modulus ** 2, dtype=np.int32), modulus)
  following, smallest = b * modulus + (a + b) % modulus, a * modulus + b
  for _ in range((6 * modulus).bit_length()):  # no Fibonacci cycle is longer than 6 * modulus
    smallest = np.minimum(smallest, smallest[following])  # of twice as many pairs as before
    following = following[following]
  return smallest
