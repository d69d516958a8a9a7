"""Votes between words with some of one letter: better, worse or equal, as an arena collects them.

The words and their gold reward are those of `letters`. A user feels the difference of the two with
logistic noise, and calls small ones a tie (Rao and Kupper, 1967).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.tasks import knobs, letters

TIES = ("soft", "drop", "coin")


def sample(rng: np.random.Generator, *, length: int = 8, share: float = 0.25, sharpness: float = 8.0,
           threshold: float = 1.0, ties: str = "soft") -> dict[str, Any]:
  """A letter, two words, and the vote, as fields of a pair with its `preference`.

    felt = sharpness * (gold of a - gold of b) + logistic noise;  a tie if |felt| < threshold

  Args:
    rng: source of randomness.
    length, share: as in `letters`.
    sharpness: of users; 0 knows nothing.
    threshold: of felt differences below which words are equal, 0 or more.
    ties: what becomes of them: "soft" is a preference of 0.5, "drop" draws other words, "coin" lets a
      coin decide.
  """
  if ties not in TIES:
    raise ValueError(f"ties={ties!r}: use {', '.join(TIES)}")
  for name, value in (("sharpness", sharpness), ("threshold", threshold)):
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
      raise ValueError(f"{name}={value!r}: use a number from 0")
  knobs.integer("length", length, 2, 64)
  while True:
    row = letters.sample(rng, length=length, share=share, sharpness=0.0, noise=0.0)
    words = row["chosen"], row["rejected"]
    gold = [letters.gold_reward(row, word) for word in words]
    noise = rng.logistic()
    felt = sharpness * (gold[0] - gold[1]) + noise
    if abs(felt) >= threshold or ties != "drop":
      break
  tie = abs(felt) < threshold
  if tie and ties == "coin":
    felt, tie = float(rng.integers(2)) - 0.5, False
  if felt < 0:
    words = words[::-1]
  return dict(row, chosen=words[0], rejected=words[1], preference=0.5 if tie else 1.0)


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is as good as a word can be."""
  return letters.check(row, completion)


def key(row: Mapping[str, Any]) -> str:
  """The letter and both words."""
  return letters.key(row)
