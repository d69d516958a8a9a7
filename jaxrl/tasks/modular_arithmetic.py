"""Arithmetic modulo a number: `(45+31*7)%97=` -> `68`."""

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

from jaxrl.tasks import knobs


def sample(rng: np.random.Generator, *, modulus: int = 97, terms: int = 2, operators: str = "+-*"
           ) -> dict[str, Any]:
  """A chain of residues; products bind tighter than sums.

  Args:
    rng: source of randomness.
    modulus: 2 to 10**6; operands are uniform over 0 .. modulus - 1.
    terms: number of operands, 2 to 16.
    operators: what the operators are drawn from, some of `+-*`.
  """
  knobs.integer("modulus", modulus, 2, 10 ** 6)
  knobs.integer("terms", terms, 2, 16)
  if not operators or set(operators) - set("+-*"):
    raise ValueError(f"operators={operators!r}: use one or more of '+-*'")
  numbers = [int(x) for x in rng.integers(modulus, size=terms)]
  chain = [operators[i] for i in rng.integers(len(operators), size=terms - 1)]
  text = str(numbers[0]) + "".join(f"{o}{n}" for o, n in zip(chain, numbers[1:]))
  row = dict(question=f"({text})%{modulus}=", numbers=numbers, operators=chain, modulus=modulus)
  answer = str(_value(row))
  return dict(row, answer=answer, solution=answer)


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is the least non-negative residue."""
  return completion.strip() == str(_value(row))


def key(row: Mapping[str, Any]) -> str:
  """Summands and factors in sorted order: 2*3+1 and 1+3*2 are one problem."""
  summands = sorted((sign, sorted(factors)) for sign, factors in _summands(row))
  return " ".join(sign + "*".join(map(str, factors)) for sign, factors in summands) + (
      f" mod {row['modulus']}")


def _summands(row):
  """The chain as signed products: 1+3*2 -> [("+", [1]), ("+", [3, 2])]."""
  summands = [("+", row["numbers"][:1])]
  for operator, number in zip(row["operators"], row["numbers"][1:]):
    if operator == "*":
      sign, factors = summands.pop()
      summands.append((sign, factors + [number]))
    else:
      summands.append((operator, [number]))
  return summands


def _value(row):
  return sum(int(f"{sign}1") * math.prod(factors) for sign, factors in _summands(row)
             ) % row["modulus"]
