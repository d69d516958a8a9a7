"""Numbers and tags of texts, for scores of pairs that need no model."""

import zlib

from jaxtyping import Float
import numpy as np

BUCKETS = 256


def character_pairs(question: str, answer: str) -> Float[np.ndarray, "256"]:
  """Counts of (character of the question, character of the answer), hashed, per question character."""
  counts = np.zeros(BUCKETS)
  for a in question:
    for b in answer:
      counts[zlib.crc32(f"{a}\0{b}".encode()) % BUCKETS] += 1 / len(question)
  return counts


def words(question: str) -> set[str]:
  """The different words of a question, as its tags."""
  return set(question.lower().split())
