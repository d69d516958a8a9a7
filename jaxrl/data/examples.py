"""From a row to a `Task`, and from a task to a supervised example.

Whatever a row may do wrong is found here, named with its file, line and field, and dealt with by
one policy, `on_bad_row`.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
import threading
from typing import Any

import numpy as np

from jaxrl import compose
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.data import conversations
from jaxrl.data import templates
from jaxrl.data.sources import BadRow
from jaxrl.data.sources import Source
from jaxrl.data.tokenizers import Tokenizer

POLICIES = ("fail", "skip", "truncate")


@dataclasses.dataclass(frozen=True)
class Fields:
  """Which field of a row holds what; an empty name means that rows have no such field.

  Attributes:
    question: text of the problem.
    answer: text or number that verifiers compare with; `answer_pattern` may pick a part of it.
    solution: text to imitate; without it, the final assistant message, or the whole answer field.
    id: text or number that names the row; without it, `file:line`.
    messages: list of `{role, content}`, instead of a question; other fields of a message, such as
      `tool_calls`, go to the chat template. A final assistant message is no part of the prompt. Supervised
      tuning imitates all of the assistant's messages.
    more: other fields, of text or numbers, that templates use under their own names.
  """

  question: str = "question"
  answer: str = "answer"
  solution: str = ""
  id: str = ""
  messages: str = ""
  more: Sequence[str] = ()


class RowCounts:
  """Counts of rows by what became of them; safe to share between threads."""

  def __init__(self):
    self._counts = collections.Counter()
    self._lock = threading.Lock()

  def add(self, reason: str) -> None:
    """Counts one row."""
    with self._lock:
      self._counts[reason] += 1

  def as_dict(self) -> dict[str, int]:
    """Rows by reason.

    They are `ok`, of which `prompt_truncated`, `completion_truncated` and `answer_rewritten` (see
    `conversations`), or were refused as `unreadable`, `missing_field`, `wrong_type`, `empty`,
    `no_answer`, `not_encodable`, `prompt_too_long` or `completion_too_long`; pairs also as
    `no_shared_prompt` or `same_answers`.
    """
    with self._lock:
      return dict(self._counts)


@dataclasses.dataclass
class TaskBuilder:
  """Turns rows into tasks.

  Attributes:
    tokenizer: writes prompts, and measures solutions.
    fields: which field holds what.
    prompt_template: prompt text; `{question}`, `{answer}`, `{solution}` and the names in
      `fields.more` stand for the row's values. With `chat`, the user message.
    solution_template: text to imitate, likewise.
    answer_pattern: regular expression with one group; its last match in the answer field is the
      reference answer.
    remove_pattern: regular expression; what it matches is cut out of solutions.
    chat: render the prompt with the tokenizer's chat template; so are rows with `fields.messages`.
    max_prompt_tokens: limit, 0 for none.
    max_completion_tokens: limit on a solution with its EOS, 0 for none.
    on_bad_row: `fail` stops at a bad row, `skip` drops and counts it, `truncate` lets pass what is
      only too long and otherwise stops. Cut prompts keep BOS and their end; solutions are cut by
      `supervised`.
    counts: what became of the rows so far.

  Raises:
    ValueError: for settings that no row could satisfy.
  """

  tokenizer: Tokenizer
  fields: Fields = Fields()
  prompt_template: str = "{question}"
  solution_template: str = "{solution}"
  answer_pattern: str = ""
  remove_pattern: str = ""
  chat: bool = False
  max_prompt_tokens: int = 0
  max_completion_tokens: int = 0
  on_bad_row: str = "fail"
  counts: RowCounts = dataclasses.field(default_factory=RowCounts)

  def __post_init__(self):
    fields = self.fields
    if self.on_bad_row not in POLICIES:
      raise ValueError(f"on_bad_row={self.on_bad_row!r}"
                       f"{compose.nearest(self.on_bad_row, POLICIES)}")
    for name in ("max_prompt_tokens", "max_completion_tokens"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}={getattr(self, name)}: use a positive limit, or 0 for none")
    if self.answer_pattern and not fields.answer:
      raise ValueError(f"answer_pattern={self.answer_pattern!r} has no field to look in: set "
                       "data.answer, or remove the pattern")
    if fields.messages and self.prompt_template != "{question}":
      raise ValueError(f"prompt_template={self.prompt_template!r} does nothing when the prompt is "
                       f"the conversation in field {fields.messages!r}: remove one")
    if not fields.messages and not fields.question and "{question}" == self.prompt_template:
      raise ValueError("there is nothing to ask: set data.question, data.messages or a "
                       "prompt_template")
    self._answer = templates.compiled("answer_pattern", self.answer_pattern, groups=1)
    self._remove = templates.compiled("remove_pattern", self.remove_pattern)
    names = ["question"] * bool(fields.question or fields.messages)
    names += ["answer"] * bool(fields.answer) + ["solution"]
    if clash := set(names) & set(fields.more):
      raise ValueError(f"fields.more names {sorted(clash)}, which templates use for the question, "
                       "answer and solution: rename that field of the rows")
    names += fields.more
    self._prompt = templates.parse("prompt_template", self.prompt_template, names)
    self._solution = templates.parse("solution_template", self.solution_template, names)
    self._refuse_specials()
    if self.chat or fields.messages:
      self.tokenizer.render_chat([{"role": "user", "content": "."}], add_generation_prompt=True)

  def _refuse_specials(self):
    for name in ("prompt_template", "solution_template"):
      for special in self.tokenizer.special_tokens:
        if special in getattr(self, name):
          raise ValueError(f"{name} spells out the special token {special!r}, but text is encoded "
                           "letter by letter: use chat=True for turns; BOS and EOS need no writing")

  @functools.cached_property
  def stop_ids(self) -> tuple[int, ...]:
    """Tokens that end an answer: EOS and, in conversations, what ends a turn."""
    return tuple(dict.fromkeys((self.tokenizer.eos_id, *([] if self.turn_end is None else [self.turn_end]))))

  @functools.cached_property
  def turn_end(self) -> int | None:
    """What ends an answer in a conversation; None where there is none, or its template does not tell."""
    return conversations.end_of_turn(self.tokenizer) if self.chat or self.fields.messages else None

  def read(self, source: Source, index: int) -> Task | None:
    """The task of one row of a source; None where the row is skipped.

    Raises:
      BadRow: as `on_bad_row` says.
    """
    return self.guarded(lambda: self.parse(source[index], source.where(index), solved=False))

  def read_solved(self, source: Source, index: int) -> Task | None:
    """As `read`, for supervised tuning: a row without a good solution is a bad row too."""
    return self.guarded(lambda: self.parse(source[index], source.where(index), solved=True))

  def to_task(self, row: Mapping[str, Any], where: str, *, solved: bool = False) -> Task | None:
    """As `read` or, if `solved`, `read_solved`, for a row that stands at `where`."""
    return self.guarded(lambda: self.parse(row, where, solved))

  def fresh(self, on_bad_row: str = "") -> "TaskBuilder":
    """The same with counts of its own, and perhaps another `on_bad_row`."""
    return dataclasses.replace(self, counts=RowCounts(), on_bad_row=on_bad_row or self.on_bad_row)

  def guarded(self, make: Callable[[], Any]) -> Any:
    """What `make` gives, counted; of a BadRow, what `on_bad_row` says."""
    try:
      task = make()
    except BadRow as error:
      self.counts.add(error.reason)
      if self.on_bad_row == "skip":
        return None
      vain = "'truncate' cannot mend this, " if self.on_bad_row == "truncate" else ""
      raise BadRow(error.reason, error.where, f"{error.message}. Mend the row, or choose another "
                   f"on_bad_row: {vain}'skip' drops such rows") from error
    self.counts.add("ok")
    return task

  def parse(self, row: Mapping[str, Any], where: str, solved: bool, *, solution: str | None = None
            ) -> Task:
    """As `to_task`, but a BadRow is raised whatever `on_bad_row` says, and nothing is counted.

    With a `solution`, it stands for that of the row, in templates too; the task has it as its `reply` too where
    a chat template says how answers end.
    """
    if not isinstance(row, Mapping):
      raise BadRow("wrong_type", where, f"a row is a mapping, but this is a {type(row).__name__}")
    fields = self.fields
    values = {name: self._text(row, name, "more", where, numbers=True) for name in fields.more}
    messages, last = self._messages(row, where) if fields.messages else (None, None)
    if messages:
      asked = [m["content"] for m in messages if m["role"] == "user"]
      values["question"] = asked[-1] if asked else ""
    elif fields.question:
      values["question"] = self._text(row, fields.question, "question", where)
    whole = self._text(row, fields.answer, "answer", where, numbers=True) if fields.answer else ""
    values["answer"] = self._reference(whole, where) if self._answer else whole.strip()
    values["solution"] = solution if solution is not None else self._solution_text(
        row, whole if last is None else last["content"], where, solved)
    task_id = self._text(row, fields.id, "id", where, numbers=True) if fields.id else where
    text = templates.fill(self._solution, values)
    if messages is None and self.chat:
      messages = [{"role": "user", "content": templates.fill(self._prompt, values)}]
    own = last is not None and not fields.solution and solution is None
    besides = {k: v for k, v in last.items() if k != "content"} if own else {}
    wanted = solved or (solution is not None and self.turn_end is not None)
    if wanted and messages and (text.strip() or conversations.calls(besides)):
      prompt, reply, said = self._conversation([*messages, {
          "role": conversations.ASSISTANT, **besides, "content": text}], where)
    else:
      prompt, reply, said = self._prompt_tokens(values, messages, where), [], []
    task = Task(id=task_id, prompt=prompt, question=values.get("question", ""), answer=values["answer"],
                solution=text, reply=reply, said=said, row=dict(row))
    if solved:
      self._check_solution(task, where)
    return task

  def _text(self, row, field, role, where, numbers=False):
    """The text in a field, or its number as text where that will do."""
    value = present(row, field, role, where)
    if numbers and isinstance(value, int | float) and not isinstance(value, bool) and (
        abs(value) < math.inf):
      try:
        return str(value)
      except ValueError as error:  # an integer of thousands of digits
        raise BadRow("wrong_type", where, f"field {field!r}: {error}") from error
    if not isinstance(value, str):
      raise BadRow("wrong_type", where, f"field {field!r} holds {_shown(value)}, but data.{role} "
                   f"needs {'text or a finite number' if numbers else 'text'}")
    if not value.strip():
      raise BadRow("empty", where, f"field {field!r} is empty")
    return value

  def _messages(self, row, where):
    """The messages of the prompt, and the final assistant message or None."""
    field = self.fields.messages
    value = present(row, field, "messages", where)
    if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value):
      raise BadRow("wrong_type", where, f"field {field!r} holds {_shown(value)}, but data.messages "
                   "needs a list of objects with role and content")
    messages = []
    for number, message in enumerate(map(conversations.message, value)):
      here = f"{where}: {field}[{number}]"
      alone = conversations.calls(message) and message["content"] == ""
      texts = ("role",) if alone else ("role", "content")
      messages.append({**message, **{key: self._text(message, key, "messages", here) for key in texts}})
    last = messages.pop() if messages and messages[-1]["role"] == conversations.ASSISTANT else None
    if not messages:
      raise BadRow("empty", where, f"field {field!r} has no message to answer")
    return messages, last

  def _reference(self, text, where):
    found = [match.group(1) or "" for match in self._answer.finditer(text)]
    if not found or not found[-1].strip():
      raise BadRow("no_answer", where, f"answer_pattern={self.answer_pattern!r} finds no answer in "
                   f"field {self.fields.answer!r}, which ends in {text[-60:]!r}")
    return found[-1].strip()

  def _solution_text(self, row, default, where, solved):
    field = self.fields.solution
    pieces = self._prompt + (self._solution if solved else [])
    needed = any(name == "solution" for _, name in pieces)
    if not field:
      text = default
    elif not needed and row.get(field) is None:
      text = ""
    else:
      text = self._text(row, field, "solution", where)
    return self._remove.sub("", text) if self._remove else text

  def _conversation(self, messages, where):
    """Prompt, reply and what is said in the prompt, as the chat template has them."""
    try:
      found = conversations.conversation(self.tokenizer, messages)
    except ValueError as error:
      raise BadRow("not_encodable", where, str(error)) from error
    if found.rewritten:
      self.counts.add("answer_rewritten")
    start = found.start
    prompt = self._within(found.tokens[:start], [], where)
    return prompt, found.tokens[start:], found.said[start - len(prompt):start]

  def _prompt_tokens(self, values, messages, where):
    text = templates.fill(self._prompt, values)
    start = []
    try:
      if messages is not None:
        tokens = self.tokenizer.render_chat(messages, add_generation_prompt=True)
      else:
        tokens = self.tokenizer.encode(text)
        start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
    except ValueError as error:
      raise BadRow("not_encodable", where, f"prompt: {error}") from error
    if not start + tokens:
      raise BadRow("empty", where, "the prompt has no tokens, and this tokenizer has no BOS to "
                   "start with: put some text into prompt_template")
    return self._within(tokens, start, where)

  def _within(self, tokens, start, where):
    """A prompt that begins with `start`, within the limit."""
    limit, length = self.max_prompt_tokens, len(start) + len(tokens)
    if limit and length > limit:
      field = self.fields.messages or self.fields.question
      self._too_long("prompt", f"the prompt from field {field!r}", length, where)
      tokens = tokens[length - limit:]
    return start + tokens

  def _check_solution(self, task, where):
    fields = self.fields
    if not task.solution.strip() and not task.reply:
      raise BadRow("empty", where, "there is no solution to imitate in data.solution="
                   f"{fields.solution!r} or data.answer={fields.answer!r}")
    field = fields.solution or fields.messages or fields.answer
    self.check_completion(task.solution, f"solution from field {field!r}", where, task.reply)

  def check_completion(self, text: str, what: str, where: str, reply: Sequence[int] = ()) -> None:
    """Refuses a text that cannot be written, or is, with its EOS, longer than a completion may be; so is a
    `reply`, its tokens."""
    try:
      length = len(reply) or len(self.tokenizer.encode(text)) + 1
    except ValueError as error:
      raise BadRow("not_encodable", where, f"{what}: {error}") from error
    self._check_length(length, what, where)

  def _check_length(self, length, what, where):
    if self.max_completion_tokens and length > self.max_completion_tokens:
      self._too_long("completion", f"the {what}, with EOS,", length, where)

  def _too_long(self, kind, what, length, where):
    """Refuses a row, or only counts it where it will be cut."""
    if self.on_bad_row == "truncate":
      self.counts.add(f"{kind}_truncated")
      return
    limit, kept = f"max_{kind}_tokens", "end" if kind == "prompt" else "start"
    raise BadRow(f"{kind}_too_long", where, f"{what} has {length} tokens, more than "
                 f"{limit}={getattr(self, limit)}; on_bad_row='truncate' would keep its {kept}")


def supervised(task: Task, tokenizer: Tokenizer, *, max_completion_tokens: int = 0) -> Trajectory:
  """Prompt, solution and EOS as one sequence whose loss is on the solution and the EOS.

  In a conversation it is on all that the assistant says, with the token that ends each of its turns.

  Args:
    task: with a solution.
    tokenizer: the one that wrote the prompt.
    max_completion_tokens: a longer completion keeps its start, without EOS; 0 for no limit.

  Raises:
    ValueError: the tokenizer cannot write the solution, or the prompt is empty.
  """
  completion = task.reply or tokenizer.encode(task.solution) + [tokenizer.eos_id]
  text, finish = task.solution, "stop"
  if max_completion_tokens and len(completion) > max_completion_tokens:
    completion = completion[:max_completion_tokens]
    text, finish = tokenizer.decode(completion), "length"
  said = task.said or [False] * len(task.prompt)
  mask = np.array([*said, *[True] * len(completion)])
  if len(mask):
    mask[0] &= not task.said  # nothing predicts the first token, which a prompt that was cut may begin with
  return Trajectory(tokens=np.array(task.prompt + completion, np.int32), loss_mask=mask,
                    task_id=task.id, prompt_length=len(task.prompt), text=text, finish=finish)


def present(row: Mapping[str, Any], field: str, role: str, where: str) -> Any:
  """What a row holds in a field that `data.<role>` names.

  Raises:
    BadRow: nothing.
  """
  value = row.get(field)
  if value is None:
    problem = "is null" if field in row else f"is missing{compose.nearest(field, row)}"
    raise BadRow("missing_field", where, f"field {field!r}, which data.{role} names, {problem}")
  return value


def _shown(value):
  return f"the {type(value).__name__} {value}" if isinstance(value, float | bool) else (
      f"a value of type {type(value).__name__}")
