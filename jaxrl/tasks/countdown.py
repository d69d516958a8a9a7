"""Countdown: reach a target with + - * / and each number at most once: `3,8,1=24:` -> `3*8*1`.

A problem has many solutions, so only `check` can tell: no text is compared.
"""

import collections
from collections.abc import Mapping
from fractions import Fraction
import operator
import re
from typing import Any

import numpy as np

from jaxrl.tasks import knobs

LONGEST = 200  # characters of a completion that are worth parsing; also bounds the recursion
DRAWS = 1000
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def sample(rng: np.random.Generator, *, numbers: int = 3, largest: int = 20, target: int = 100
           ) -> dict[str, Any]:
  """Numbers and a target that is reached by construction, with the expression that reaches it.

  The expression combines two or more of the numbers; its intermediate results are non-negative
  integers (other solutions need not keep to that). The target is never one of the numbers.

  Args:
    rng: source of randomness.
    numbers: how many numbers are given, 2 to 8.
    largest: they are uniform over 1 .. largest, with repetition; at most 9999.
    target: the largest target, at most 10**6; the smallest is 1.

  Raises:
    ValueError: a knob is out of range, or hardly any draw reaches a target within the limit.
  """
  knobs.integer("numbers", numbers, 2, 8)
  knobs.integer("largest", largest, 1, 9999)
  knobs.integer("target", target, 1, 10 ** 6)
  for _ in range(DRAWS):
    given = [int(x) for x in rng.integers(1, largest + 1, size=numbers)]
    value, expression = _random_expression(rng, given)
    if 1 <= value <= target and value not in given:
      question = f"{','.join(map(str, given))}={value}:"
      return dict(question=question, answer=str(value), solution=expression, numbers=given,
                  target=value)
  raise ValueError(f"no target in 1..{target} came from {numbers} numbers up to {largest} in "
                   f"{DRAWS} draws: raise target, or change largest")


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is an expression with the target's value that uses no number too often.

  Values are exact fractions. Parentheses and spaces are free; signs, other operators, an equals
  sign and anything else are refused, and so is a division by zero.
  """
  completion = completion.strip()
  if len(completion) > LONGEST or not re.fullmatch(r"[-+*/() 0-9]+", completion):
    return False
  tokens = re.findall(r"[0-9]+|[-+*/()]", completion)
  used = collections.Counter(t for t in tokens if t[0].isdigit())
  if not used <= collections.Counter(map(str, row["numbers"])):
    return False
  try:
    tokens.reverse()
    value = _sum(tokens)
  except (_Malformed, ZeroDivisionError):
    return False
  return not tokens and value == row["target"]


def key(row: Mapping[str, Any]) -> str:
  """The target and the numbers in sorted order."""
  return f"{sorted(row['numbers'])}={row['target']}"


def _random_expression(rng, given):
  """Value and text of a random tree over a random subset of the numbers."""
  chosen = rng.permutation(given)[:rng.integers(2, len(given) + 1)]
  pool = [(int(n), str(n), "") for n in chosen]  # value, text, outermost operator
  while len(pool) > 1:
    left, right = (pool.pop(int(rng.integers(len(pool)))) for _ in range(2))
    if left[0] < right[0]:
      left, right = right, left
    possible = "+-*/" if right[0] and left[0] % right[0] == 0 else "+-*"
    symbol = possible[rng.integers(len(possible))]
    value = OPERATORS[symbol](left[0], right[0]) if symbol != "/" else left[0] // right[0]
    text = _enclosed(left, symbol, False) + symbol + _enclosed(right, symbol, True)
    pool.append((value, text, symbol))
  return pool[0][:2]


def _enclosed(operand, symbol, on_the_right):
  """The text of an operand, in parentheses where its parent would otherwise tear it apart."""
  _, text, inner = operand
  if inner in ("+", "-"):
    torn = symbol in "*/" or (symbol == "-" and on_the_right)
  else:
    torn = inner in ("*", "/") and symbol == "/" and on_the_right
  return f"({text})" if torn else text


class _Malformed(ValueError):
  """The text is not an expression."""


def _sum(tokens):
  return _chain(tokens, "+-", _product)


def _product(tokens):
  return _chain(tokens, "*/", _operand)


def _chain(tokens, symbols, operand):
  """Consumes `operand (symbol operand)*` from the end of the reversed token list."""
  value = operand(tokens)
  while tokens and tokens[-1] in symbols:
    value = OPERATORS[tokens.pop()](value, operand(tokens))
  return value


def _operand(tokens):
  token = tokens.pop() if tokens else ""
  if token.isdigit():
    return Fraction(token)
  if token != "(":
    raise _Malformed
  value = _sum(tokens)
  if not tokens or tokens.pop() != ")":
    raise _Malformed
  return value
