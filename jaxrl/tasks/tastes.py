"""Items of two-valued attributes, compared by people who look at one attribute each.

An item has a digit for every attribute: 2i or 2i + 1 for attribute i, so `1247` has the attributes 1, 0,
0 and 1. The criterion `2+` prefers the item whose attribute 2 is 1, `2-` the one where it is 0. Nothing in
the question says which criterion is meant: only other preferences of the same person can.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from jaxrl.tasks import knobs


def sample(rng: np.random.Generator, *, attributes: int = 4, criteria: str = "", noise: float = 0.0
           ) -> dict[str, Any]:
  """Two items, and which of them somebody prefers, with the field `criterion`.

  Args:
    rng: source of randomness.
    attributes: of an item, 2 to 5.
    criteria: that are drawn from, as in "0+ 0- 1+"; empty is all.
    noise: share of the pairs whose answers are exchanged, at random.
  """
  knobs.integer("attributes", attributes, 2, 5)
  knobs.share("noise", noise)
  names = criteria.split() or [f"{i}{sign}" for i in range(attributes) for sign in "+-"]
  for name in names:
    if not re.fullmatch(r"[0-4][+-]", name) or int(name[0]) >= attributes:
      raise ValueError(f"criteria={criteria!r}: {name!r} is no attribute below {attributes} with + or -")
  criterion = names[rng.integers(len(names))]
  place, wanted = int(criterion[0]), int(criterion[1] == "+")
  better, worse = rng.integers(2, size=(2, attributes))
  better[place], worse[place] = wanted, 1 - wanted
  pair = ["".join(str(2 * i + x) for i, x in enumerate(item)) for item in (better, worse)]
  if rng.random() < noise:
    pair.reverse()
  return dict(question="=", answer=criterion, solution=pair[0], criterion=criterion, chosen=pair[0],
              rejected=pair[1])


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is the preferred item."""
  return completion.strip() == row["chosen"]


def key(row: Mapping[str, Any]) -> str:
  """The two items, in any order."""
  return " ".join(sorted([row["chosen"], row["rejected"]]))
