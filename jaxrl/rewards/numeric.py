"""Numeric answers, compared by value through `math-verify` (which parses with SymPy)."""

import decimal
import logging
import re
import typing

from jaxrl.rewards.criterion import Criterion, declare, ok, unscorable

if typing.TYPE_CHECKING:
  from jaxrl.batch import Task, Trajectory

LONGEST_ANSWER = 256  # characters that a pattern may capture; a longer "answer" is not a number

# Notations that math-verify misreads: "3e2" as 3, "-$5" as 5, "- 3" as 3, "+3" as nothing.
_SCIENTIFIC = re.compile(r"(?<![\w.])\d+(?:\.\d+)?[eE][+-]?\d{1,3}(?!\w)")
_NEGATIVE_MONEY = re.compile(r"(?<![^\s=:(])-[$€£](?=\d)")
_SIGN = re.compile(r"\A([+-])\s*(?=[\d.$€£])")


def _load():
  """Imports math-verify; seconds, so not at the top of a file that the main process reads."""
  import math_verify
  # It warns that it runs without its own time-outs. They are SIGALRM handlers, which work in main
  # threads only and cannot interrupt a long computation in C; the scorer's end the process instead.
  for name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(name).setLevel(logging.ERROR)
  return math_verify


def _warm_up():
  _parse("$1$")  # builds the grammar and compiles the expressions


def _check(*, pattern=None):
  if pattern is None:
    return
  try:
    groups = re.compile(pattern).groups
  except (re.error, TypeError) as error:
    raise ValueError(f"pattern={pattern!r} is not a regular expression: {error}") from error
  if groups != 1:
    raise ValueError(f"pattern={pattern!r} has {groups} groups; it needs exactly one, around the "
                     r"answer, as in '####\s*(.+)'; write further ones as (?:...)")


@declare(warm_up=_warm_up, check=_check)
def numeric_answer(task: "Task", completion: "Trajectory", *, pattern: str | None = None
                   ) -> Criterion:
  """1 if the completion's answer has the value of the reference answer, else 0.

  `1,234`, `$18.00`, `1/2`, `3e2`, `\\frac{1}{2}` and `\\boxed{18}` are understood; `50%` equals
  both 0.5 and 50. Decimals are compared to 6 places. A completion without a readable answer scores
  0; a reference without one makes the sample unscorable. An answer that takes too long to evaluate
  (`9^9^9^9`) is ended by the scorer's time-out.

  Args:
    task: supplies `answer`.
    completion: supplies `text`.
    pattern: regular expression whose one group is the answer, such as `####\\s*(.+)`; the last
      match counts. None lets math-verify look: a boxed expression or the number after "answer is",
      else the last expression or number. In running text LaTeX needs `$...$` or a box.
  """
  try:
    reference = _parse(_as_answer(task.answer))
  except Exception:
    reference = []
  if not reference:
    return unscorable(f"no number in the reference answer {task.answer[:80]!r}")

  text, detail = completion.text, ""
  if pattern is not None:
    matches = re.findall(pattern, text)
    if not matches:
      return ok(0.0, "no answer found")
    if len(matches[-1]) > LONGEST_ANSWER:
      return ok(0.0, f"answer of {len(matches[-1])} characters")
    detail = repr(matches[-1].strip())
    text = matches[-1]
  answer_only = pattern is not None or len(text.split()) == 1
  try:
    answer = _parse(_as_answer(text) if answer_only else _plain_notation(text))
    if not answer:
      return ok(0.0, detail or "no answer found")
    return ok(_load().verify(reference, answer, timeout_seconds=None, raise_on_error=True), detail)
  except MemoryError:
    raise
  except Exception as error:
    # SymPy stumbles over nonsense (1/0, sets where numbers belong): that is a wrong answer.
    return ok(0.0, f"{detail} cannot be compared: {type(error).__name__}".strip())


def _parse(text):
  """The SymPy expression that answers, in a list; empty if there is none."""
  return _load().parse(text, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)


def _plain_notation(text):
  text = _NEGATIVE_MONEY.sub("-", text.replace("\N{MINUS SIGN}", "-"))
  return _SCIENTIFIC.sub(lambda number: format(decimal.Decimal(number.group()), "f"), text)


def _as_answer(text):
  """Text that is an answer and nothing else, marked so that all of it is read."""
  text = text.strip().replace("\N{MINUS SIGN}", "-")
  text = _plain_notation(_SIGN.sub(lambda sign: sign.group(1).strip("+"), text))
  bare_latex = "\\" in text and "$" not in text and "\\boxed" not in text
  return f"\\boxed{{{text}}}" if bare_latex else text
