"""Running sums without tens, worked step by step and sometimes wrong: `3+9+4=` -> `3=2=6=`.

A step is right if it is the step before it, as written, plus its term; a wrong one is any other digit.
Of two answers the one with fewer wrong steps is better. A critique lists the numbers of the wrong steps,
`13`, or says `0`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl.tasks import knobs


def sample(rng: np.random.Generator, *, shortest: int = 4, longest: int = 6, wrong: float = 0.3,
           critiques: float = 1.0, shuffled: bool = False) -> dict[str, Any]:
  """Terms and two worked answers, as a pair with critiques and as a list with a label for every step.

  Args:
    rng: source of randomness.
    shortest, longest: number of terms, uniform between these, 2 to 9.
    wrong: chance that a step is wrong, above 0.
    critiques: share of the answers that have a critique.
    shuffled: critiques are those of other answers.
  """
  knobs.lengths(shortest, longest, 9)
  if shortest < 2:
    raise ValueError(f"shortest={shortest}: use an integer from 2 to {longest}")
  if not 0 < knobs.share("wrong", wrong) < 1:
    raise ValueError(f"wrong={wrong}: use a share above 0 and below 1, or no two answers would differ")
  knobs.share("critiques", critiques)
  terms = [int(x) for x in rng.integers(10, size=rng.integers(shortest, longest + 1))]
  while True:
    pair = sorted((_worked(rng, terms, wrong) for _ in range(2)), key=lambda steps: len(faults(terms, steps)))
    counts = [len(faults(terms, steps)) for steps in pair]
    if counts[0] < counts[1]:
      break
  row = dict(question="+".join(map(str, terms)) + "=", answer=str(sum(terms) % 10),
             solution=written(_worked(rng, terms, 0.0)), terms=terms)
  for name, steps in zip(("chosen", "rejected"), pair):
    row[name] = written(steps)
    said = _worked(rng, terms, wrong) if shuffled else steps
    row[f"{name}_critique"] = (critique(terms, said) if rng.random() < critiques else None)
  row["answers"] = [dict(steps=[str(s) for s in steps],
                         labels=[i + 1 not in faults(terms, steps) for i in range(len(terms))])
                    for steps in pair]
  return row


def _worked(rng, terms, wrong):
  steps: list[int] = []
  for term in terms:
    right = ((steps[-1] if steps else 0) + term) % 10
    off = int(rng.integers(1, 10)) if rng.random() < wrong else 0
    steps.append((right + off) % 10)
  return steps


def faults(terms: Sequence[int], steps: Sequence[int]) -> list[int]:
  """Numbers of the wrong steps, from 1."""
  before = [0, *steps[:-1]]
  return [i for i, (b, t, s) in enumerate(zip(before, terms, steps), start=1) if (b + t) % 10 != s]


def critique(terms: Sequence[int], steps: Sequence[int]) -> str:
  """The numbers of the wrong steps as text."""
  return "".join(map(str, faults(terms, steps))) or "0"


def written(steps: Sequence[int]) -> str:
  """Steps as an answer."""
  return "".join(f"{s}=" for s in steps)


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion has all steps, and none is wrong."""
  steps = np.cumsum(row["terms"]) % 10
  return completion.strip() == written(steps)


def key(row: Mapping[str, Any]) -> str:
  """The terms, in any order."""
  return "+".join(map(str, sorted(row["terms"])))
