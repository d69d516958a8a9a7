"""Criteria that look at a part of a completion."""

from collections.abc import Mapping
import copy
import re
import typing
from typing import Any

from jaxrl import compose
from jaxrl.rewards.criterion import Criterion, declare, judge as judged, ok

if typing.TYPE_CHECKING:
  from jaxrl.batch import Task, Trajectory


def _check(*, pattern, judge="exact_match"):
  try:
    groups = re.compile(pattern).groups
  except (re.error, TypeError) as error:
    raise ValueError(f"pattern={pattern!r} is not a regular expression: {error}") from error
  if groups != 1:
    raise ValueError(f"pattern={pattern!r} has {groups} groups; it needs exactly one, around the "
                     "part that is judged; write others as (?:...)")
  _criterion(judge)


@declare(check=_check)
def in_span(task: "Task", completion: "Trajectory", *, pattern: str,
            judge: str | Mapping[str, Any] = "exact_match") -> Criterion:
  """What another criterion says of a part of the completion; 0 where there is no such part.

  Args:
    task: what the judge needs of it.
    completion: supplies `text`, of which white space around it does not count.
    pattern: regular expression for all of it, in which `.` matches newlines too, with one group:
      the part.
    judge: criterion that is given the part as the text.
  """
  match = re.fullmatch(pattern, completion.text.strip(), re.DOTALL)
  if match is None or match[1] is None:
    return ok(0.0, "no such part")
  part = copy.copy(completion)
  part.text = match[1]
  return judged(_criterion(judge), task, part)


def _criterion(judge):
  from jaxrl import rewards  # which imports this file
  return compose.build(judge, rewards, where="judge")
