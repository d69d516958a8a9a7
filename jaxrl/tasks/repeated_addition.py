"""One token of a text, after a thought: `12+34=4++3=` -> `640=6`, text, budget, thought, token.

Texts add a number twice, `12+34=46+34=80`: some tokens are template, some copies, some sums. The
thought is the sum that is being written, from its last digit, and zeros elsewhere.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from jaxrl.tasks import addition, knobs


def sample(rng: np.random.Generator, *, digits: int = 2, budget: int = 6, jitter: int = 2,
           plain: float = 0.0) -> dict[str, Any]:
  """A text as `document`, and a question about one of its tokens behind the first "=".

  Args:
    rng: source of randomness.
    digits: of both numbers, 1 to 18.
    budget: the budget in the question is uniform from 1 to this, at most 9.
    jitter: tokens by which the thought of a solution may miss its budget, to either side.
    plain: share of the rows that ask for the rest of a text, without any thought.
  """
  knobs.integer("digits", digits, 1, 18)
  knobs.integer("budget", budget, 1, 9)
  knobs.integer("jitter", jitter, 0, 9)
  if isinstance(plain, bool) or not isinstance(plain, int | float) or not 0 <= plain <= 1:
    raise ValueError(f"plain={plain!r}: use a share from 0 to 1")
  row = addition.sample(rng, digits=digits)
  a, b = row["a"], row["b"]
  sums = str(a + b), str(a + 2 * b)
  text = f"{a}+{b}={sums[0]}+{b}={sums[1]}"
  row = dict(a=a, b=b, document=text)
  start = text.index("=") + 1
  at = int(rng.integers(start, len(text)))
  if plain and rng.random() < plain:
    return dict(row, question=text[:1], answer=text[1:], solution=text[1:], plain=True)
  wanted = int(rng.integers(1, budget + 1))
  length = max(0, wanted + int(rng.integers(-jitter, jitter + 1)))
  total = sums[0] if at < start + len(sums[0]) else sums[1] if at > text.rindex("=") else ""
  thought = total[::-1].ljust(length, "0")[:length]
  return dict(row, question=f"{text[:at]}++{wanted}=", answer=text[at],
              solution=f"{thought}={text[at]}", plain=False)


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is digits, "=" and the token, or the rest of a plain text."""
  if row["plain"]:
    return completion.strip() == row["answer"]
  match = re.fullmatch(r"[0-9]*=([0-9+=])", completion.strip())
  return match is not None and match[1] == row["answer"]


def key(row: Mapping[str, Any]) -> str:
  """The unordered pair: 1+2 gives no more away than 2+1."""
  return addition.key(row)
