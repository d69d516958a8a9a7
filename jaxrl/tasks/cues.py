"""Traces that turn out well or badly after a cue: `h3a1c:` -> `ab+cd!` or `ab-cd?`.

A trace is drawn from a Markov chain: letters, then a cue, "+" or "-", then letters, then an end. What
the cue was decides the end, "!" or "?", nearly always. To easy questions, "e...", traces find the good
cue sometimes; to hard ones, "h...", never. Where a trace was lost can be computed, see `chance`.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from jaxrl.tasks import knobs

LETTERS, NAMES = "abcd", "0123456789"
GOOD, BAD, WELL, BADLY = "+-!?"
MOST = 3  # letters before a cue, and after it


def sample(rng: np.random.Generator, *, hard: float = 0.5, good: float = 0.5, faith: float = 1.0
           ) -> dict[str, Any]:
  """A question with a trace as its solution; the answer is the good end.

  Args:
    rng: source of randomness.
    hard: share of the questions whose traces never hold the good cue.
    good: share of the good cue in traces of the others.
    faith: share of the ends that are what the cue promised.
  """
  for name, share in (("hard", hard), ("good", good), ("faith", faith)):
    knobs.share(name, share)
  is_hard = bool(rng.random() < hard)
  chance_of_cue = 0.0 if is_hard else good
  name = "".join(NAMES[i] for i in rng.integers(len(NAMES), size=4))
  cue = GOOD if rng.random() < chance_of_cue else BAD
  well = (cue == GOOD) == (rng.random() < faith)
  solution = f"{_letters(rng)}{cue}{_letters(rng)}{WELL if well else BADLY}"
  return dict(question=f"{'h' if is_hard else 'e'}{name}:", answer=WELL, solution=solution,
              good=chance_of_cue, faith=float(faith))


def _letters(rng):
  return "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=rng.integers(MOST + 1)))


def chance(row: Mapping[str, Any], prefix: str) -> float:
  """The probability that a trace which begins so ends well, in the chain that traces are drawn from."""
  if prefix.endswith((WELL, BADLY)):
    return float(prefix.endswith(WELL))
  after = {GOOD: row["faith"], BAD: 1 - row["faith"]}
  cue = re.search(r"[+-]", prefix)
  return after[cue[0]] if cue else row["good"] * after[GOOD] + (1 - row["good"]) * after[BAD]


def bad_cue(text: str) -> int | None:
  """Where the first bad cue of a trace stands; None if there is none."""
  place = text.find(BAD)
  return None if place < 0 else place


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether a trace, with one cue at least, ends well."""
  del row
  return re.fullmatch(r"[a-d]*[+-][a-d+-]*!", completion.strip()) is not None


def key(row: Mapping[str, Any]) -> str:
  """The question."""
  return row["question"]
