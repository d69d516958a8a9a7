"""Words compared by members of a society who weigh three values differently.

The values of a word are how many a, b and c it has. Somebody compares two words by one value, or overall by
the weights of the part of society that he or she belongs to.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.tasks import knobs

LETTERS, VALUES = "abcdefgh", "abc"
WEIGHTS = ((0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8))  # of each part


def sample(rng: np.random.Generator, *, length: int = 8, members: int = 24, overall: float = 0.5,
           sharpness: float = 3.0) -> dict[str, Any]:
  """Two words, and which of them somebody preferred.

  Args:
    rng: source of randomness.
    length: letters of a word, 2 to 64.
    members: of the society; member j belongs to part j mod 3.
    overall: share of comparisons that are by all values, and not by one of them.
    sharpness: the better word is chosen with probability s(sharpness * difference).

  Returns:
    A row with `chosen`, `rejected`, `agent` (the member) and `value` (0 to 2, or -1 for overall).
  """
  knobs.integer("length", length, 2, 64)
  knobs.integer("members", members, 3, 256)
  knobs.share("overall", overall)
  words: list[str] = []
  while len(words) < 2:
    word = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=length))
    words += [] if word in words else [word]
  agent = int(rng.integers(members))
  value = -1 if rng.random() < overall else int(rng.integers(len(VALUES)))
  weights = WEIGHTS[agent % len(WEIGHTS)] if value < 0 else np.eye(len(VALUES))[value]
  difference = sum(w * (words[0].count(v) - words[1].count(v)) for w, v in zip(weights, VALUES))
  if rng.random() > 1 / (1 + np.exp(-sharpness * difference)):
    words.reverse()
  return dict(question=":", answer=words[0], solution=words[0], chosen=words[0], rejected=words[1],
              agent=float(agent), value=float(value))


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is the word that was preferred."""
  return completion == row["answer"]


def key(row: Mapping[str, Any]) -> str:
  """Both words."""
  return " ".join(sorted([row["chosen"], row["rejected"]]))
