"""From a row to answers to one prompt that are compared, and from those to trajectories.

Most often they are two, of which one was chosen. Rows come in the shapes that such data is published
in:

  {"prompt": "1+2=", "chosen": "3", "rejected": "4"}                         prompt and two texts
  {"chosen": [{role, content}, ...], "rejected": [...]}                      two conversations
  {"prompt": [{role, content}, ...], "chosen": [...], "rejected": [...]}     the same, prompt apart
  {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}        two transcripts (HH-RLHF)
  {"prompt": "1+2=", "answers": [{"text": "3", "rank": 1}, ...]}             any number, with labels
  {"prompt": "1+2=", "answer": "3", "rating": 4}                             one answer with labels
  {"prompt": "1+2=", "chosen": "3", "rejected": "9", "weaker": {"prompt": "2+3=", "chosen": "5", ...}}
                                              a pair, and one whose preference is not as strong
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
import os
from typing import Any

from jaxrl.batch import PREFERENCE
from jaxrl.batch import STRONGER
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.batch import TUPLE
from jaxrl.data import conversations
from jaxrl.data import parts
from jaxrl.data.examples import present
from jaxrl.data.examples import supervised
from jaxrl.data.examples import TaskBuilder
from jaxrl.data.sources import BadRow
from jaxrl.data.sources import Source
from jaxrl.data.tokenizers import Tokenizer

AS_IT_IS = "{solution}"  # the template that changes nothing


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A prompt and answers to it.

  Attributes:
    task: the prompt.
    answers: their texts; of a pair the chosen one first.
    columns: of every answer, constants that losses read. `preference` is among them: the probability
      that it is the best one, 0.5 twice for a tie; of a single answer, that it is a good one.
    critiques: texts about every answer, empty where there is none; no texts if nobody asked for them.
    steps: of every answer, each with its label; nothing if steps are not labelled.
    weaker: a pair whose preference is not as strong; None where preferences are not compared.
    bare: the answers as rows hold them, without `tasks.solution_template`.
    replies: tokens of the answers with what ends them, where a chat template wrote them; empty elsewhere.
    end_id: token that ends steps and critiques as it ends other answers; None is EOS.
  """

  task: Task
  answers: tuple[str, ...]
  columns: tuple[dict[str, float], ...]
  critiques: tuple[str, ...] = ()
  steps: tuple[tuple[parts.Step, ...], ...] = ()
  weaker: "Comparison | None" = None
  bare: tuple[str, ...] = ()
  replies: tuple[list[int], ...] = ()
  end_id: int | None = None


@dataclasses.dataclass
class PairBuilder:
  """Turns rows into comparisons; bad rows are treated and counted as `tasks.on_bad_row` says.

  Attributes:
    tasks: makes the prompt, from its own fields where rows hold one. Otherwise the prompt is what
      both conversations or transcripts begin with, and is put into those fields: conversations into
      `fields.messages`, transcripts into `fields.question`.
    chosen: field with the better answer, or with the text of each one.
    rejected: field with the other answer; empty for rows that do not hold pairs.
    answers: field with a list of mappings, each with the text of an answer in `chosen` and with its
      own labels; empty for none.
    preference: field with the probability that `chosen` is better, 0 to 1; empty for 1 (in lists,
      for 1 / number of answers).
    columns: fields with numbers that losses read as columns of the batch, such as margins: of the
      row, or of each mapping of a list.
    turn: what begins an assistant's turn in transcripts, such as "\\n\\nAssistant:"; the prompt then
      ends with the last of them that both texts share. Empty for texts that are answers only.
    other_turn: what begins anybody else's turn; an answer that holds it is a bad row.
    critique: ending of the fields with a text about an answer, which may be missing: of pairs, after the
      names of their answers ("critique": `chosen_critique`, `rejected_critique`); of lists and single
      answers, the whole name. Empty for none.
    step_labels: field with the probabilities that steps are right, 0 to 1 or yes and no, null for unknown;
      `chosen` then holds a list of as many texts. Empty for answers in one piece.
    step_end: what is put behind every step, so that its end can be found.
    weaker: field with the row of a pair whose preference is not as strong; empty for none.
    ranges: least and greatest number by column, for rows with others are bad.

  Raises:
    ValueError: for settings that no row could satisfy.
  """

  tasks: TaskBuilder
  chosen: str = "chosen"
  rejected: str = "rejected"
  answers: str = ""
  preference: str = ""
  columns: Sequence[str] = ()
  turn: str = ""
  other_turn: str = "\n\nHuman:"
  critique: str = ""
  step_labels: str = ""
  step_end: str = "\n"
  weaker: str = ""
  ranges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not self.chosen or self.chosen == self.rejected:
      raise ValueError(f"chosen={self.chosen!r} and rejected={self.rejected!r} must name two fields, "
                       "or rejected none")
    if self.answers and self.rejected:
      raise ValueError(f"answers={self.answers!r} lists mappings that hold their text in one field, "
                       f"chosen={self.chosen!r}: set rejected=''")
    if PREFERENCE in self.columns or isinstance(self.columns, str):
      raise ValueError(f"columns={self.columns!r} must list fields with constants of answers, other "
                       f"than {PREFERENCE!r}, which every batch of comparisons has")
    if self.step_labels and (self.rejected or self.critique or self.tasks.solution_template != AS_IT_IS):
      raise ValueError(f"step_labels={self.step_labels!r} labels the steps of single answers or lists: set "
                       f"rejected='', critique='' and solution_template={AS_IT_IS!r}")
    if self.turn and (self.tasks.fields.messages or not self.tasks.fields.question):
      raise ValueError(f"turn={self.turn!r} cuts transcripts, whose prompt is text: set "
                       "fields.question, and leave fields.messages empty")
    if self.turn and not self.rejected:
      raise ValueError(f"turn={self.turn!r} finds what two transcripts share: set rejected")

  def fresh(self, on_bad_row: str = "") -> "PairBuilder":
    """As `TaskBuilder.fresh`."""
    return dataclasses.replace(self, tasks=self.tasks.fresh(on_bad_row))

  def read(self, source: Source, index: int) -> Comparison | None:
    """The comparison of one row of a source; None where the row is skipped.

    Raises:
      BadRow: as `tasks.on_bad_row` says. Beside the reasons of `TaskBuilder` there are
        `no_shared_prompt` and `same_answers`.
    """
    return self.tasks.guarded(lambda: self._comparison(source[index], source.where(index)))

  def to_comparison(self, row: Mapping[str, Any], where: str) -> Comparison | None:
    """As `read`, for a row that stands at `where`."""
    return self.tasks.guarded(lambda: self._comparison(row, where))

  def _comparison(self, row, where):
    if not isinstance(row, Mapping):
      raise BadRow("wrong_type", where, f"a row is a mapping, but this is a {type(row).__name__}")
    steps, critiques = [], []
    if self.rejected:
      prompt, answers = self._of_pair(row, where)
      label, constants = self._label(row, where, 1.0), self._constants(row, where)
      columns = [{**constants, PREFERENCE: p} for p in (label, 1 - label)]
      if self.critique:
        critiques = [self._critique(row, f"{name}_{self.critique}", where)
                     for name in (self.chosen, self.rejected)]
    else:
      items = self._items(row, where)
      if self.step_labels:
        steps = [self._steps(item, where) for item in items]
        prompt, answers = {}, ["".join(text for text, _ in own) for own in steps]
      else:
        prompt, answers = {}, [self._text(item, where) for item in items]
      columns = [{**self._constants(item, where), PREFERENCE: self._label(item, where, 1 / len(items))}
                 for item in items]
      if self.critique:
        critiques = [self._critique(item, self.critique, where) for item in items]
    whole, written = {**row, **prompt}, []
    task = self.tasks.parse(whole, where, False)
    found = []  # the same task with each answer
    for number, answer in enumerate(answers):
      name = (f"answer {number + 1} in field {self.answers!r}" if self.answers else
              f"answer in field {(self.chosen, self.rejected)[number]!r}")
      if not answer.strip():
        raise BadRow("empty", where, f"the {name} is empty")
      found.append(self._answered(task, answer, whole, where, bool(steps)))
      written.append(found[-1].solution)
      self.tasks.check_completion(written[-1], name, where, found[-1].reply)
      if answer in answers[:number]:
        raise BadRow("same_answers", where, f"the {name} is the same answer as an earlier one, so "
                     "nothing is preferred")
    if any(own.prompt != found[0].prompt for own in found):
      raise BadRow("no_shared_prompt", where, "the chat template writes the prompt with other tokens before "
                   "each of the answers")
    weaker = self._weaker(row, where) if self.weaker else None
    return Comparison(
        dataclasses.replace(task, prompt=found[0].prompt), tuple(written), tuple(columns), tuple(critiques),
        tuple(steps), weaker, tuple(answers), tuple(own.reply for own in found), self.tasks.turn_end)

  def _weaker(self, row, where):
    inner = present(row, self.weaker, "weaker", where)
    return self._of_weaker._comparison(inner, f"{where}, field {self.weaker!r}")

  def _answered(self, task, answer, row, where, in_steps):
    """The task with an answer as `tasks.solution_template` has it, and as the chat template ends it."""
    chats = self.tasks.turn_end is not None and not in_steps
    if chats or self.tasks.solution_template != AS_IT_IS:
      return self._uncounted.parse(row, where, False, solution=answer)
    return dataclasses.replace(task, solution=answer)

  @functools.cached_property
  def _uncounted(self):
    return self.tasks.fresh()

  @functools.cached_property
  def _of_weaker(self):
    return dataclasses.replace(self, weaker="")

  def _critique(self, row, field, where):
    """A text about an answer, empty if there is none."""
    text = row.get(field)
    if text is None or text == "":
      return ""
    if not isinstance(text, str):
      raise BadRow("wrong_type", where, f"field {field!r} has to hold text, not a {type(text).__name__}")
    self.tasks.check_completion(text, f"critique in field {field!r}", where)
    return text

  def _steps(self, item, where):
    """Texts of the steps of an answer, with what ends them, and their labels."""
    texts = present(item, self.chosen, "chosen", where)
    labels = present(item, self.step_labels, "step_labels", where)
    if not isinstance(texts, list) or not isinstance(labels, list) or not len(texts) == len(labels) > 0:
      raise BadRow("wrong_type", where, f"fields {self.chosen!r} and {self.step_labels!r} have to hold two "
                   "lists of the same length, the steps of an answer and their labels")
    for text, label in zip(texts, labels):
      if not isinstance(text, str) or not text.strip():
        raise BadRow("wrong_type", where, f"field {self.chosen!r} holds {text!r}, but a step is text")
      if label is not None and not (isinstance(label, int | float) and 0 <= label <= 1):
        raise BadRow("wrong_type", where, f"field {self.step_labels!r} holds {label!r}, but the label of a "
                     "step is a probability from 0 to 1, true, false or null")
    return tuple((text + self.step_end, None if label is None else float(label))
                 for text, label in zip(texts, labels))

  def _of_pair(self, row, where):
    """What belongs to the prompt, and both answers."""
    both = [present(row, getattr(self, role), role, where) for role in ("chosen", "rejected")]
    kinds = {type(value) for value in both}
    if kinds == {list}:
      return self._of_conversations(row, both, where)
    if kinds != {str}:
      raise BadRow("wrong_type", where, f"fields {self.chosen!r} and {self.rejected!r} must both "
                   f"hold text or both lists of messages, not "
                   f"{' and '.join(type(value).__name__ for value in both)}")
    return self._of_transcripts(both, where) if self.turn else ({}, both)

  def _items(self, row, where):
    """The mappings that hold one answer each."""
    if not self.answers:
      return [row]
    items = present(row, self.answers, "answers", where)
    if not isinstance(items, list) or not items or not all(isinstance(x, Mapping) for x in items):
      raise BadRow("wrong_type", where, f"field {self.answers!r} has to hold a list of mappings, each "
                   f"with the text of an answer in {self.chosen!r}")
    return items

  def _text(self, item, where):
    text = present(item, self.chosen, "chosen", where)
    if not isinstance(text, str):
      raise BadRow("wrong_type", where, f"field {self.chosen!r} has to hold text, not a "
                   f"{type(text).__name__}")
    return text

  def _constants(self, item, where):
    found = {name: self._number(item, name, "columns", where) for name in self.columns}
    for name, value in found.items():
      low, high = self.ranges.get(name, (value, value))
      if not low <= value <= high:
        raise BadRow("wrong_type", where, f"field {name!r} holds {value:g}, but config.objective has a loss "
                     f"for numbers from {low:g} to {high:g}")
    return found

  def _label(self, item, where, default):
    if not self.preference:
      return default
    value = self._number(item, self.preference, "preference", where)
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
      if more := [key for keys in conversations.BESIDES for key in keys if last.get(key)]:
        raise BadRow("wrong_type", where, f"the last message in field {name!r} has {more[0]!r} beside its "
                     "content, and answers that are compared are text: take it out, or write it into the content")
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


def compared(comparison: Comparison, tokenizer: Tokenizer, *, group: int,
             max_completion_tokens: int = 0) -> list[Trajectory]:
  """The answers as trajectories of one group, with their columns.

  Args:
    comparison: read with the same tokenizer.
    tokenizer: the one that wrote the prompt.
    group: of all of them.
    max_completion_tokens: as in `supervised`.
  """
  found, limit = [], dict(max_completion_tokens=max_completion_tokens)
  ended = dict(limit, end_id=comparison.end_id)
  for number, (text, columns) in enumerate(zip(comparison.answers, comparison.columns)):
    if comparison.steps:
      trajectory = parts.stepwise(comparison.task, comparison.steps[number], tokenizer, **ended)
    else:
      task = dataclasses.replace(comparison.task, solution=text, reply=comparison.replies[number], said=[])
      trajectory = supervised(task, tokenizer, **limit)
    if comparison.critiques:
      trajectory = parts.with_critique(trajectory, comparison.critiques[number], tokenizer, **ended)
    trajectory.group, trajectory.columns = group, dict(columns)
    found.append(trajectory)
  return found


def linked(comparisons: Sequence[Comparison]) -> list[Comparison]:
  """Comparisons with their weaker ones behind them, and columns that say which belong together: `tuple`,
  the number of the two in the batch, and `stronger`, 1 or 0. Those without stay as they are."""
  found = []
  for number, comparison in enumerate(comparisons):
    if comparison.weaker is None:
      found.append(comparison)
      continue
    for own, stronger in ((comparison, 1.0), (comparison.weaker, 0.0)):
      columns = tuple({**c, TUPLE: float(number), STRONGER: stronger} for c in own.columns)
      found.append(dataclasses.replace(own, columns=columns, weaker=None))
  return found


def mismatched(comparisons: Sequence[Comparison], tokenizer: Tokenizer, *, group: int,
               max_completion_tokens: int = 0) -> list[Trajectory]:
  """The prompt of every comparison with the answers of the next one, which nobody rates.

  Their tokens carry the signal `mismatched`, 1 where the answer is; they are unscored, so they count
  in no mean. KTO estimates its KL with them (arXiv:2402.01306, section 4.1).

  Args:
    comparisons: of one batch.
    tokenizer: the one that wrote the prompts.
    group: of the first of them; the others follow.
    max_completion_tokens: as in `supervised`.
  """
  found = []
  for own, other in zip(comparisons, [*comparisons[1:], *comparisons[:1]]):
    swapped = dataclasses.replace(other, task=own.task)
    for trajectory in compared(swapped, tokenizer, group=group,
                               max_completion_tokens=max_completion_tokens):
      trajectory.group, trajectory.scored = group + len(found), False
      trajectory.signals["mismatched"] = trajectory.loss_mask.astype("float32")
      found.append(trajectory)
  return found
