"""A world of states and actions: `12+34=` -> `64` is the next state, `12=64+` -> `34` the action.

The next state is the sum without its last carry, written from its last digit, so that state and
next state determine the action.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.tasks import knobs


def sample(rng: np.random.Generator, *, digits: int = 2, inverse: float = 0.0) -> dict[str, Any]:
  """A state, an action, and what follows, as `state`, `action` and `next` too.

  Args:
    rng: source of randomness.
    digits: digits of states and actions, 1 to 18, with leading zeros.
    inverse: share of the questions that ask for the action.
  """
  knobs.integer("digits", digits, 1, 18)
  if isinstance(inverse, bool) or not isinstance(inverse, int | float) or not 0 <= inverse <= 1:
    raise ValueError(f"inverse={inverse!r}: use a share from 0 to 1")
  x, z = (int(v) for v in rng.integers(0, 10 ** digits, size=2))
  state, action = f"{x:0{digits}}", f"{z:0{digits}}"
  following = f"{(x + z) % 10 ** digits:0{digits}}"[::-1]
  question, answer = f"{state}+{action}=", following
  if inverse and rng.random() < inverse:
    question, answer = f"{state}={following}+", action
  return dict(question=question, answer=answer, solution=answer, state=state, action=action,
              next=following)


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is what was asked for."""
  return completion.strip() == row["answer"]


def key(row: Mapping[str, Any]) -> str:
  """State and action, whichever way they are asked about."""
  return f"{row['state']}+{row['action']}"
