"""Criteria for answers that state how sure they are, scored with a proper rule.

A completion has the form of a regular expression with the named groups `answer` and `confidence`.
With F = 1 if it has, and the confidence is a number q from 0 to 1, else F = 0, and c = 1 if a
verifier finds the answer right, else 0 (RLCR, arXiv:2507.16806):

  well_formed         F
  correct_and_formed  F * c
  brier               F * (1 - (c - q)^2)
  confidence          q, to be recorded; unscorable where F = 0

At a chance p of being right the mean of c - (c - q)^2 is largest at q = p, where it is p^2: so it
pays to be honest, and to give the answer that is most likely right. Unbounded rules lack the
second: the log score pays p + p log p + (1 - p) log(1 - p), which is larger for surely wrong
answers than for unlikely ones.
"""

from collections.abc import Mapping
import copy
import re
import typing
from typing import Any

from jaxrl import compose
from jaxrl.rewards.criterion import Criterion, declare, judge as judged, ok, unscorable

if typing.TYPE_CHECKING:
  from jaxrl.batch import Task, Trajectory


def _check(*, pattern, scale=1.0, judge="exact_match"):
  try:
    groups = set(re.compile(pattern).groupindex)
  except (re.error, TypeError) as error:
    raise ValueError(f"pattern={pattern!r} is not a regular expression: {error}") from error
  if not {"answer", "confidence"} <= groups:
    raise ValueError(f"pattern={pattern!r} needs the groups (?P<answer>...) and "
                     f"(?P<confidence>...); it has {sorted(groups) or 'none'}")
  if not scale > 0:
    raise ValueError(f"scale={scale} must be above 0: the number that is written for certainty")
  _verifier(judge)


@declare(check=_check)
def well_formed(task: "Task", completion: "Trajectory", *, pattern: str, scale: float = 1.0
                ) -> bool:
  """1 if the completion states an answer and a confidence (F above).

  Args:
    task: unused.
    completion: supplies `text`; white space around it does not count.
    pattern: regular expression for all of it, in which `.` matches newlines too, with the groups
      `answer` and `confidence`, such as
      `.*<answer>(?P<answer>.*?)</answer>.*<confidence>(?P<confidence>.*?)</confidence>`.
    scale: what is written for certainty: 1, or 100 for per cent.
  """
  del task
  return _read(completion.text, pattern, scale) is not None


@declare(check=_check)
def confidence(task: "Task", completion: "Trajectory", *, pattern: str, scale: float = 1.0
               ) -> Criterion:
  """The confidence q; unscorable in a completion of another form. Arguments as in `well_formed`."""
  del task
  found = _read(completion.text, pattern, scale)
  return unscorable("no answer with a confidence") if found is None else ok(found[1])


@declare(check=_check)
def correct_and_formed(task: "Task", completion: "Trajectory", *, pattern: str, scale: float = 1.0,
                       judge: str | Mapping[str, Any] = "exact_match") -> Criterion:
  """1 if the completion has the form and its answer is right (F * c above), else 0.

  Args:
    task: what the judge needs of it.
    completion, pattern, scale: as in `well_formed`.
    judge: criterion that is given the answer alone and finds it right with a score of 1.
  """
  verdict, _ = _verdict(task, completion, pattern, scale, judge)
  return verdict


@declare(check=_check)
def brier(task: "Task", completion: "Trajectory", *, pattern: str, scale: float = 1.0,
          judge: str | Mapping[str, Any] = "exact_match") -> Criterion:
  """`1 - (c - q)^2` for a completion of the form, else 0. Arguments as in `correct_and_formed`."""
  verdict, stated = _verdict(task, completion, pattern, scale, judge)
  if stated is None or verdict.status != "ok":
    return verdict
  return ok(1 - (verdict.score - stated) ** 2)


def _verdict(task, completion, pattern, scale, judge):
  """Whether the stated answer is right, 0 or 1 or what the judge said instead, and q or None."""
  found = _read(completion.text, pattern, scale)
  if found is None:
    return ok(0.0, "no answer with a confidence"), None
  answer = copy.copy(completion)
  answer.text = found[0]
  verdict = judged(_verifier(judge), task, answer)
  return (ok(verdict.score >= 1) if verdict.status == "ok" else verdict), found[1]


def _read(text, pattern, scale):
  """Answer and confidence, None where the text has another form."""
  match = re.fullmatch(pattern, text.strip(), re.DOTALL)
  try:
    stated = float(match["confidence"]) / scale
  except (TypeError, ValueError):  # no match, or no number
    return None
  return (match["answer"], stated) if 0 <= stated <= 1 else None


def _verifier(judge):
  from jaxrl import rewards  # which imports this file
  return compose.build(judge, rewards, where="judge")
