"""Rows that judge several answers to one question, brought into the shapes that `PairBuilder` reads.

Judgements are published in many shapes. Left: a row of the file; right: what reads it.

  {prompt, chosen, rejected}, two conversations or transcripts     PairBuilder alone
  {question, MODEL: {solution, is_correct}, MODEL: {...}, ...}     labelled_solutions
  {question, solution, correct}, a row for each solution           group_rows
  {instruction, completions: [{response, overall_score}, ...]}     PairBuilder alone, with
        config.data.answers="completions", chosen="response", rejected="", columns=("overall_score",)
  {conversation_a, conversation_b, winner}                         votes
  {question, model_a, model_b, answer_a, answer_b, winner}         jaxrl.data.votes, which ranks models too

Lists of graded answers, whether read or made here, become pairs by `pair_answers`, and rankings by
`rank_answers`. Questions that are in none of the other splits are chosen by `hold_out`.
"""

from collections.abc import Mapping, Sequence
import itertools
import math
import re
from typing import Any

from jaxrl.compose import nearest
from jaxrl.data.examples import present
from jaxrl.data.sources import BadRow
from jaxrl.data.sources import Source
from jaxrl.data.templates import compiled
from jaxrl.data.transforms.derived import Derived

PAIRINGS = ("all", "extremes")


def labelled_solutions(source: Source, *, solutions: Sequence[str] = (), text: str = "solution",
                       label: str = "is_correct", into: str = "answers", remove: str = "") -> Source:
  """Gathers solutions that stand in fields of their own, each with a label, into one list.

  `{question, a: {solution, is_correct}, b: {...}}` becomes
  `{question, answers: [{text, grade, name: "a"}, {..., name: "b"}]}`; a grade is a number, of labels
  that are true or false 1 or 0.

  Args:
    source: such rows.
    solutions: names of those fields; without any, all that hold a mapping with both entries.
    text, label: entries of those.
    into: the field with the list.
    remove: regular expression; what it matches is cut out of solutions.

  Returns:
    A row for each, without the fields that were gathered. Refused are rows with a missing field,
    solutions that are no text and labels that are no number.

  Raises:
    ValueError: `remove` is no regular expression.
  """
  pattern = compiled("labelled_solutions: remove", remove)

  def gather(row, where):
    names = list(solutions) or [name for name, value in row.items() if isinstance(value, Mapping)
                                and text in value and label in value]
    if not names:
      raise BadRow("missing_field", where, f"no field holds a mapping with {text!r} and {label!r}; "
                   f"there are {', '.join(map(repr, row))}")
    answers = []
    for name in names:
      held = present(row, name, "transforms", where)
      found = _text(held, text, f"{where}: {name}")
      answers.append({"text": re.sub(pattern, "", found) if pattern else found, "name": name,
                      "grade": _grade(held, label, f"{where}: {name}")})
    return [{**{k: v for k, v in row.items() if k not in names}, into: answers}]
  return Derived(source, gather, "labelled_solutions")


def group_rows(source: Source, *, by: str = "question", text: str = "solution",
               label: str = "is_correct", into: str = "answers") -> Source:
  """Gathers rows with one solution each into a row for each question.

  `{question, solution, is_correct}` and others of the same question become
  `{question, answers: [{text, grade}, ...]}`, which stands where the first of them does and keeps
  its other fields. All rows are kept in memory; rows that cannot be read stay alone, to be refused.

  Args:
    source: such rows, in any order.
    by: field with the text that is equal in rows that belong together.
    text, label: fields of a solution and of its grade, a number or true or false.
    into: the field with the list.
  """
  groups: dict[Any, list[tuple[str, dict]]] = {}
  for index in range(len(source)):
    where = source.where(index)
    try:
      row = source[index]
      answer = {"text": _text(row, text, where), "grade": _grade(row, label, where)}
      groups.setdefault(_text(row, by, where), []).append((where, {**row, into: [answer]}))
    except BadRow as error:
      groups[index] = [(where, error)]
  return _Groups(list(groups.values()), into, drop=(text, label))


def votes(source: Source, *, first: str = "conversation_a", second: str = "conversation_b",
          winner: str = "winner", first_wins: Sequence[Any] = ("model_a",),
          second_wins: Sequence[Any] = ("model_b",), ties: Sequence[Any] = ("tie", "tie (bothbad)"),
          keep_ties: bool = True) -> Source:
  """Votes between two answers as `{chosen, rejected, preference}`, where a tie has the preference 1/2.

  Read them with `config.data.preference="preference"`. Chosen and rejected are what the fields held,
  texts or conversations.

  Args:
    source: rows of an arena.
    first, second: fields of both answers.
    winner: field of the vote.
    first_wins, second_wins, ties: what it says then.
    keep_ties: False leaves ties out.

  Returns:
    A row for each vote. Refused are rows with a missing field and votes of another kind.
  """
  def choose(row, where):
    both = [present(row, name, "transforms", where) for name in (first, second)]
    vote = present(row, winner, "transforms", where)
    if vote in ties:
      return [{**row, "chosen": both[0], "rejected": both[1], "preference": 0.5}] if keep_ties else []
    if vote not in (*first_wins, *second_wins):
      raise BadRow("wrong_type", where, f"field {winner!r} holds the vote {vote!r}"
                   f"{nearest(str(vote), (*first_wins, *second_wins, *ties))}")
    chosen, rejected = both if vote in first_wins else both[::-1]
    return [{**row, "chosen": chosen, "rejected": rejected, "preference": 1.0}]
  return Derived(source, choose, "votes")


def rank_answers(source: Source, *, answers: str = "answers", grade: str = "grade",
                 into: str = "rank") -> Source:
  """Gives every answer of a list its rank, 1 for the best; equal grades have equal ranks.

  For `plackett_luce`, with the rank among `config.data.columns`.

  Args:
    source: rows with a list of mappings, such as those of UltraFeedback.
    answers: the field with the list.
    grade: their entry with a number, `a.b` for entry b of entry a; more is better.
    into: their new entry.
  """
  def rank(row, where):
    items = _list(row, answers, where)
    grades = [_grade(item, grade, f"{where}: {answers}[{i}]") for i, item in enumerate(items)]
    ranked = [{**item, into: 1 + sum(other > own for other in grades)}
              for item, own in zip(items, grades)]
    return [{**row, answers: ranked}]
  return Derived(source, rank, "rank_answers")


def pair_answers(source: Source, *, answers: str = "answers", text: str = "text",
                 grade: str = "grade", which: str = "all", least: float = 0.0) -> Source:
  """Pairs within a list of graded answers, `{chosen, rejected, margin}`: the better answer first.

  Answers of equal grade are never compared, so a question whose answers are all right, or all wrong,
  gives no pair.

  Args:
    source: rows with a list of mappings.
    answers: the field with the list.
    text: their entry with the answer.
    grade: their entry with a number, `a.b` for entry b of entry a; more is better. `margin` is by how
      much.
    which: "all" pairs, or the "extremes": the best and the worst answer, of equal ones the first.
    least: smallest margin of a pair.

  Returns:
    A row for each pair, with the other fields of its question. Refused are rows whose list, texts or
    grades are none.

  Raises:
    ValueError: another value of `which`.
  """
  if which not in PAIRINGS:
    raise ValueError(f"pair_answers: which={which!r}{nearest(which, PAIRINGS)}")

  def pair(row, where):
    graded = graded_answers(row, where, answers=answers, text=text, grade=grade)
    if which == "extremes":
      pairs = [(max(graded, key=lambda x: x[1]), min(graded, key=lambda x: x[1]))]
    else:
      pairs = [sorted(two, key=lambda x: -x[1]) for two in itertools.combinations(graded, 2)]
    rest = {name: value for name, value in row.items() if name != answers}
    return [{**rest, "chosen": better[0], "rejected": worse[0], "margin": better[1] - worse[1]}
            for better, worse in pairs if better[1] > worse[1] and better[1] - worse[1] >= least]
  return Derived(source, pair, "pair_answers")


def graded_answers(row: Mapping[str, Any], where: str, *, answers: str = "answers",
                   text: str = "text", grade: str = "grade") -> list[tuple[str, float]]:
  """Texts and grades of a list of answers, see `pair_answers`.

  Raises:
    BadRow: there is no such list, or one of its entries lacks text or number.
  """
  items = _list(row, answers, where)
  return [(_text(item, text, f"{where}: {answers}[{i}]"),
           _grade(item, grade, f"{where}: {answers}[{i}]")) for i, item in enumerate(items)]


class _Groups:
  """Rows of one question each."""

  def __init__(self, groups, into, drop):
    self._groups, self._into, self._drop = groups, into, drop

  def __len__(self) -> int:
    return len(self._groups)

  def __getitem__(self, index: int) -> dict[str, Any]:
    rows = [row for _, row in self._groups[index]]
    if isinstance(rows[0], BadRow):
      raise rows[0]
    whole = {k: v for k, v in rows[0].items() if k not in self._drop}
    return {**whole, self._into: [row[self._into][0] for row in rows]}

  def where(self, index: int) -> str:
    """Where the first row of the question stands."""
    return self._groups[index][0][0]


def _list(row, field, where):
  items = present(row, field, "transforms", where)
  if not isinstance(items, list) or not items or not all(isinstance(x, Mapping) for x in items):
    raise BadRow("wrong_type", where, f"field {field!r} has to hold a list of mappings, at least one")
  return items


def _text(row, field, where):
  value = present(row, field, "transforms", where)
  if not isinstance(value, str) or not value.strip():
    raise BadRow("wrong_type", where, f"field {field!r} has to hold text, not {_shown(value)}")
  return value


def _grade(row, field, where):
  value = row
  for name in field.split("."):
    if not isinstance(value, Mapping):
      raise BadRow("wrong_type", where, f"there is no {name!r} in {_shown(value)}, of {field!r}")
    value = present(value, name, "transforms", where)
  try:
    number = float(value)  # of true and false, and of numbers that stand there as text
  except (TypeError, ValueError):
    number = math.nan
  if not abs(number) < math.inf:
    raise BadRow("wrong_type", where, f"field {field!r} holds {_shown(value)}, but a grade is a finite "
                 "number, or true or false")
  return number


def _shown(value):
  return repr(value) if isinstance(value, str | int | float | bool) and len(repr(value)) < 60 else (
      f"a {type(value).__name__}")
