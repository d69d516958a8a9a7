"""Copying text: `xqzb=` -> `xqzb`."""

from collections.abc import Mapping
import string
from typing import Any

import numpy as np

from jaxrl.tasks import knobs


def sample(rng: np.random.Generator, *, shortest: int = 1, longest: int = 8,
           alphabet: str = string.ascii_lowercase) -> dict[str, Any]:
  """A random text.

  Args:
    rng: source of randomness.
    shortest, longest: the length is uniform between them, both included; 1 to 1000.
    alphabet: characters, each equally likely; no white space, and not the `=` that ends a question.
  """
  shortest, longest = knobs.lengths(shortest, longest, 1000)
  if not alphabet or any(c.isspace() or c == "=" for c in alphabet):
    raise ValueError(f"alphabet={alphabet!r}: use characters other than white space and '='")
  length = rng.integers(shortest, longest + 1)
  text = "".join(alphabet[i] for i in rng.integers(len(alphabet), size=length))
  return dict(question=f"{text}=", answer=text, solution=text)


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is the question without its last character."""
  return completion.strip() == row["question"][:-1]


def key(row: Mapping[str, Any]) -> str:
  """The text."""
  return row["question"][:-1]
