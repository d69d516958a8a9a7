"""Criteria that compare a completion with how a text goes on."""

import re
import string
import typing

from jaxrl.rewards.criterion import Criterion, declare, ok, unscorable

if typing.TYPE_CHECKING:
  from jaxrl.batch import Task, Trajectory

SENTENCE = r"[^.!?]+[.!?]*\s*|[.!?]+\s*"  # up to and with what ends it


def _check(*, pattern, segments=SENTENCE, window=3, ends=""):
  del ends
  for name, value in (("pattern", pattern), ("segments", segments)):
    try:
      groups = re.compile(value).groups
    except (re.error, TypeError) as error:
      raise ValueError(f"{name}={value!r} is not a regular expression: {error}") from error
    if groups != (name == "pattern"):
      raise ValueError(f"{name}={value!r} has {groups} groups; pattern needs exactly one, around "
                       "the prediction, segments none: write others as (?:...)")
  if isinstance(window, bool) or not isinstance(window, int) or window < 1:
    raise ValueError(f"window={window!r}: use the number of segments that may be predicted, at "
                     "least 1")


@declare(check=_check)
def continues_text(task: "Task", completion: "Trajectory", *, pattern: str,
                   segments: str = SENTENCE, window: int = 3, ends: str = "") -> Criterion:
  """1 if a prediction is how the text goes on, by one segment at least (RLPT, arXiv:2509.19249).

    1[prediction is a prefix of s_i .. s_(i + window - 1), and is not shorter than s_i]

  The paper's judge decides whether it is a prefix in meaning; here the strings decide. Comparing
  with s_i alone (`window=1`) turns predictions away that go on. A part of s_i earns nothing, or one
  word would do.

  Args:
    task: supplies `answer`, the text from s_i on; an empty one makes the sample unscorable.
    completion: supplies `text`, of which white space around it does not count.
    pattern: regular expression for all of it, in which `.` matches newlines too, with one group,
      the prediction; without a match the score is 0.
    segments: regular expression whose matches are the segments.
    window: segments of the text that a prediction may go through, s_i included.
    ends: characters that a prediction may lack at the end of s_i, beside white space.
  """
  found = re.findall(segments, task.answer)[:window]
  if not found:
    return unscorable("the task has no text that goes on")
  match = re.fullmatch(pattern, completion.text.strip(), re.DOTALL)
  if match is None or match[1] is None:
    return ok(0.0, "no prediction")
  prediction, least = match[1].strip(), found[0].rstrip(ends + string.whitespace)
  return ok(len(prediction) >= max(len(least), 1) and "".join(found).startswith(prediction))
