"""Items with attributes, compared by people who look at one attribute each.

An item has a digit for every attribute: with five values, 0 to 4 for attribute 0 and 5 to 9 for attribute 1,
so `27` has the values 2 and 2. The criterion `1+` prefers the item with the larger value of attribute 1, `1-`
the one with the smaller. Nothing in the question says which criterion is meant: only other preferences of
the same person can.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from jaxrl.tasks import knobs


def sample(rng: np.random.Generator, *, attributes: int = 2, values: int = 5, criteria: str = "",
           noise: float = 0.0) -> dict[str, Any]:
  """Two items, and which of them somebody prefers, with the field `criterion`.

  Args:
    rng: source of randomness.
    attributes: of an item, 2 to 5.
    values: of an attribute, at least 2; `attributes * values` digits are at most 10.
    criteria: that are drawn from, as in "0+ 0- 1+"; empty is all.
    noise: share of the pairs whose answers are exchanged, at random.
  """
  knobs.integer("attributes", attributes, 2, 5)
  knobs.integer("values", values, 2, 10 // attributes)
  knobs.share("noise", noise)
  names = criteria.split() or [f"{i}{sign}" for i in range(attributes) for sign in "+-"]
  for name in names:
    if not re.fullmatch(r"[0-4][+-]", name) or int(name[0]) >= attributes:
      raise ValueError(f"criteria={criteria!r}: {name!r} is no attribute below {attributes} with + or -")
  criterion = names[rng.integers(len(names))]
  place = int(criterion[0])
  pair = rng.integers(values, size=(2, attributes))
  pair[:, place] = rng.permutation(values)[:2]
  pair = sorted(pair.tolist(), key=lambda item: item[place], reverse=criterion[1] == "+")
  texts = ["".join(str(values * i + x) for i, x in enumerate(item)) for item in pair]
  if rng.random() < noise:
    texts.reverse()
  return dict(question="=", answer=criterion, solution=texts[0], criterion=criterion, chosen=texts[0],
              rejected=texts[1])


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is the preferred item."""
  return completion.strip() == row["chosen"]


def key(row: Mapping[str, Any]) -> str:
  """The two items, in any order."""
  return " ".join(sorted([row["chosen"], row["rejected"]]))
