"""Criteria that compare a completion with rules: `(task, completion, *, ...) -> score`.

`completion.text` is the decoded completion, `completion.tokens` the prompt and the completion.
Their types are imported for type checkers only: worker processes load this file, and the types
would load JAX.
"""

import re
import typing

from jaxrl.rewards.criterion import Criterion, declare, ok, unscorable

if typing.TYPE_CHECKING:
  from jaxrl.batch import Task, Trajectory


@declare(inline=True)
def exact_match(task: "Task", completion: "Trajectory", *, strip: bool = True,
                ignore_case: bool = False) -> Criterion:
  """1 if the completion is the reference answer, character for character, else 0.

  Args:
    task: supplies `answer`; an empty one makes the sample unscorable.
    completion: supplies `text`.
    strip: ignore white space around both.
    ignore_case: ignore the difference between upper and lower case.
  """
  if not task.answer:
    return unscorable("the task has no reference answer")
  found, wanted = completion.text, task.answer
  if strip:
    found, wanted = found.strip(), wanted.strip()
  if ignore_case:
    found, wanted = found.casefold(), wanted.casefold()
  return ok(found == wanted)


def _check_pattern(*, pattern):
  try:
    re.compile(pattern)
  except (re.error, TypeError) as error:
    raise ValueError(f"pattern={pattern!r} is not a regular expression: {error}") from error


@declare(check=_check_pattern)
def matches_format(task: "Task", completion: "Trajectory", *, pattern: str) -> bool:
  """1 if the whole completion matches a regular expression, in which `.` matches newlines too.

  Args:
    task: unused.
    completion: supplies `text`.
    pattern: Python regular expression, such as `<think>.*</think>\\s*<answer>.*</answer>`.
  """
  del task
  return re.fullmatch(pattern, completion.text, re.DOTALL) is not None


def _check_overlong(*, max_tokens, buffer):
  if not 0 <= buffer <= max_tokens:
    raise ValueError(f"buffer={buffer} is not between 0 and max_tokens={max_tokens}")


@declare(inline=True, check=_check_overlong)
def overlong(task: "Task", completion: "Trajectory", *, max_tokens: int, buffer: int) -> float:
  """Soft overlong punishment (DAPO, arXiv:2503.14476, equation 13).

  With n completion tokens:

    0                                      n <= max_tokens - buffer
    ((max_tokens - buffer) - n) / buffer   max_tokens - buffer < n <= max_tokens
    -1                                     max_tokens < n

  Args:
    task: unused.
    completion: supplies `tokens` and `prompt_length`; everything after the prompt counts.
    max_tokens: length at which the punishment is full; in a config, `rollout.max_tokens` unless given.
    buffer: tokens over which it grows; 0 makes it a step.
  """
  del task
  excess = len(completion.tokens) - completion.prompt_length - (max_tokens - buffer)
  if excess <= 0:
    return 0.0
  return -excess / buffer if excess <= buffer else -1.0


@declare(inline=True)
def finished(task: "Task", completion: "Trajectory") -> bool:
  """1 if the completion ended by itself (end of sequence, stop string), 0 if it was cut off."""
  del task
  return completion.finish == "stop"
