"""From a row to a pair of answers to one prompt, and from a pair to two trajectories.

Rows come in the shapes that preference data is published in:

  {"prompt": "1+2=", "chosen": "3", "rejected": "4"}                         prompt and two texts
  {"chosen": [{role, content}, ...], "rejected": [...]}                      two conversations
  {"prompt": [{role, content}, ...], "chosen": [...], "rejected": [...]}     the same, prompt apart
  {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}        two transcripts (HH-RLHF)
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import os
from typing import Any

from jaxrl.batch import PREFERENCE
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.data.examples import present
from jaxrl.data.examples import supervised
from jaxrl.data.examples import TaskBuilder
from jaxrl.data.sources import BadRow
from jaxrl.data.sources import Source
from jaxrl.data.tokenizers import Tokenizer

@dataclasses.dataclass(frozen=True)
class Pair:
  """A prompt and two answers to it.

  Attributes:
    task: the prompt.
    chosen, rejected: text of the answers.
    preference: probability that `chosen` is the better one; 0.5 is a tie.
    columns: constants of the pair, such as a margin.
  """

  task: Task
  chosen: str
  rejected: str
  preference: float = 1.0
  columns: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class PairBuilder:
  """Turns rows into pairs; bad rows are treated and counted as `tasks.on_bad_row` says.

  Attributes:
    tasks: makes the prompt, from its own fields where rows hold one. Otherwise the prompt is what
      both conversations or transcripts begin with, and is put into those fields: conversations into
      `fields.messages`, transcripts into `fields.question`.
    chosen, rejected: fields with the answers.
    preference: field with the probability that `chosen` is better, 0 to 1; empty for 1.
    columns: fields with numbers that losses read as columns of the batch, such as margins.
    turn: what begins an assistant's turn in transcripts, such as "\\n\\nAssistant:"; the prompt then
      ends with the last of them that both texts share. Empty for texts that are answers only.
    other_turn: what begins anybody else's turn; an answer that holds it is a bad row.

  Raises:
    ValueError: for settings that no row could satisfy.
  """

  tasks: TaskBuilder
  chosen: str = "chosen"
  rejected: str = "rejected"
  preference: str = ""
  columns: Sequence[str] = ()
  turn: str = ""
  other_turn: str = "\n\nHuman:"

  def __post_init__(self):
    if not self.chosen or not self.rejected or self.chosen == self.rejected:
      raise ValueError(f"chosen={self.chosen!r} and rejected={self.rejected!r} must name two fields")
    if PREFERENCE in self.columns or isinstance(self.columns, str):
      raise ValueError(f"columns={self.columns!r} must list fields with constants of pairs, other "
                       f"than {PREFERENCE!r}, which every batch of pairs has")
    if self.turn and (self.tasks.fields.messages or not self.tasks.fields.question):
      raise ValueError(f"turn={self.turn!r} cuts transcripts, whose prompt is text: set "
                       "fields.question, and leave fields.messages empty")

  def fresh(self, on_bad_row: str = "") -> "PairBuilder":
    """As `TaskBuilder.fresh`."""
    return dataclasses.replace(self, tasks=self.tasks.fresh(on_bad_row))

  def read(self, source: Source, index: int) -> Pair | None:
    """The pair of one row of a source; None where the row is skipped.

    Raises:
      BadRow: as `tasks.on_bad_row` says. Beside the reasons of `TaskBuilder` there are
        `no_shared_prompt` and `same_answers`.
    """
    return self.tasks.guarded(lambda: self._pair(source[index], source.where(index)))

  def to_pair(self, row: Mapping[str, Any], where: str) -> Pair | None:
    """As `read`, for a row that stands at `where`."""
    return self.tasks.guarded(lambda: self._pair(row, where))

  def _pair(self, row, where):
    if not isinstance(row, Mapping):
      raise BadRow("wrong_type", where, f"a row is a mapping, but this is a {type(row).__name__}")
    both = [present(row, getattr(self, role), role, where) for role in ("chosen", "rejected")]
    kinds = {type(value) for value in both}
    if kinds == {list}:
      prompt, answers = self._of_conversations(row, both, where)
    elif kinds != {str}:
      raise BadRow("wrong_type", where, f"fields {self.chosen!r} and {self.rejected!r} must both "
                   f"hold text or both lists of messages, not "
                   f"{' and '.join(type(value).__name__ for value in both)}")
    elif self.turn:
      prompt, answers = self._of_transcripts(both, where)
    else:
      prompt, answers = {}, both
    for field, answer in zip((self.chosen, self.rejected), answers):
      if not answer.strip():
        raise BadRow("empty", where, f"the answer in field {field!r} is empty")
      self.tasks.check_completion(answer, f"answer in field {field!r}", where)
    if answers[0] == answers[1]:
      raise BadRow("same_answers", where, f"fields {self.chosen!r} and {self.rejected!r} hold the "
                   "same answer, so nothing is preferred")
    task = self.tasks.parse({**row, **prompt}, where, False)
    columns = {name: self._number(row, name, "columns", where) for name in self.columns}
    return Pair(task, *answers, self._label(row, where), columns)

  def _label(self, row, where):
    if not self.preference:
      return 1.0
    value = self._number(row, self.preference, "preference", where)
    if not 0 <= value <= 1:
      raise BadRow("wrong_type", where, f"field {self.preference!r} holds {value!r}, but a "
                   "preference is a probability from 0 to 1")
    return value

  def _number(self, row, field, role, where):
    value = present(row, field, role, where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
      raise BadRow("wrong_type", where, f"field {field!r} holds {value!r}, but data.{role} needs a "
                   "finite number")
    return float(value)

  def _of_conversations(self, row, both, where):
    """What both begin with, and the final message of each."""
    field = self.tasks.fields.messages
    if not field:
      raise BadRow("wrong_type", where, f"fields {self.chosen!r} and {self.rejected!r} hold messages, "
                   "so the prompt is messages too: set fields.messages")
    answers = []
    for name, messages in zip((self.chosen, self.rejected), both):
      last = messages[-1] if messages else None
      if not isinstance(last, Mapping) or last.get("role") != "assistant" or not isinstance(
          last.get("content"), str):
        raise BadRow("wrong_type", where, f"field {name!r} has to end in a message of the assistant "
                     "with text as its content")
      answers.append(last["content"])
    starts = [messages[:-1] for messages in both]
    if starts[0] != starts[1]:
      raise BadRow("no_shared_prompt", where, f"fields {self.chosen!r} and {self.rejected!r} differ "
                   "before their last message, so they answer different prompts")
    if starts[0] and row.get(field) not in (None, starts[0]):
      raise BadRow("no_shared_prompt", where, f"field {field!r} is not what {self.chosen!r} begins "
                   "with: keep the prompt in one of them")
    return ({field: starts[0]} if starts[0] else {}), answers

  def _of_transcripts(self, both, where):
    """The transcript up to the last turn that both share, and what follows in each."""
    end = os.path.commonprefix(both).rfind(self.turn)
    if end < 0:
      raise BadRow("no_shared_prompt", where, f"fields {self.chosen!r} and {self.rejected!r} share no "
                   f"beginning with turn={self.turn!r}")
    end += len(self.turn)
    answers = [text[end:] for text in both]
    for name, answer in zip((self.chosen, self.rejected), answers):
      if self.turn in answer or (self.other_turn and self.other_turn in answer):
        raise BadRow("no_shared_prompt", where, f"after what both texts share, field {name!r} goes on "
                     "for more than one turn, so its last answer has a prompt of its own")
    return {self.tasks.fields.question: both[0][:end]}, answers


def compared(pair: Pair, tokenizer: Tokenizer, *, group: int, max_completion_tokens: int = 0
             ) -> list[Trajectory]:
  """The two answers as trajectories of one group, chosen first, with the column `preference` and
  those of the pair.

  Args:
    pair: read with the same tokenizer.
    tokenizer: the one that wrote the prompt.
    group: of both.
    max_completion_tokens: as in `supervised`.
  """
  found = []
  for text, label in ((pair.chosen, pair.preference), (pair.rejected, 1 - pair.preference)):
    task = dataclasses.replace(pair.task, solution=text)
    trajectory = supervised(task, tokenizer, max_completion_tokens=max_completion_tokens)
    trajectory.group, trajectory.columns = group, {**pair.columns, PREFERENCE: label}
    found.append(trajectory)
  return found
