"""Preferences of the same kind, shown before the question: k-shot contexts for reward models."""

from collections.abc import Sequence

import numpy as np

from jaxrl.data import templates
from jaxrl.data.sources import Source
from jaxrl.data.transforms import rows

OWN = ("first", "second", "sign", "other", "better", "worse")  # placeholders of demonstrations


def demonstrations(source: Source, *, seed: int, k: int, by: str = "criterion", fewest: int = 0,
                   template: str = "{question}{first}{sign}{second}\n",
                   fields: Sequence[str] = ("question",), signs: Sequence[str] = (">", "<"),
                   start: str = "Preferences:\n", chosen: str = "chosen", rejected: str = "rejected"
                   ) -> Source:
  """Gives every row of pairs a text with preferences of its own kind (ICRM, arXiv:2602.08819).

  A row gets the fields `demonstrations`, for `data.more` and a prompt template such as
  "{demonstrations}{question}", and `evidence`, 1 + the number of them, which `data.columns` may list.
  Their number is uniform from `fewest` to k. They are other rows with the same value of `by`, without
  repetition, in random order, and which answer of each is shown first is random too. The loss of a
  reward model is on the answers of the row alone, so it stays one on the target.

  All rows are read once at the start, to know which go together; those that lack what a demonstration
  shows are none.

  Args:
    source: of rows with two answers.
    seed: of all draws.
    k: largest number of demonstrations.
    by: field whose values say which rows follow the same preference.
    fewest: smallest number of demonstrations; rows with fewer others of their kind have those.
    template: of one demonstration; beside `fields` it has {first} and {second}, the answers, {sign}, which
      tells the better one, and {other}, the other sign: "{sign}{first}{other}{second}" marks both. {better}
      and {worse} are the answers in their order, for those who want to show one of them only.
    fields: of the demonstrating row that the template uses.
    signs: what stands for "the first is preferred" and "the second is preferred".
    start: what the text begins with, also where no demonstration follows; not blank.
    chosen, rejected: fields with the better and the other answer.

  Raises:
    ValueError: impossible settings, or no row that could demonstrate anything.
  """
  if not 0 <= fewest <= k:
    raise ValueError(f"demonstrations: k={k}, fewest={fewest}: use 0 <= fewest <= k")
  if not start.strip():
    raise ValueError(f"demonstrations: start={start!r} is blank, but a context without demonstrations "
                     "needs some text too")
  if len(signs) != 2 or signs[0] == signs[1]:
    raise ValueError(f"demonstrations: signs={signs!r} must be two different texts")
  pieces = templates.parse("template", template, (*OWN, *fields))
  members = _members(source, by, (chosen, rejected, *fields))
  if not members:
    raise ValueError(f"demonstrations: no row has text in {by!r}, {chosen!r}, {rejected!r} and "
                     f"{', '.join(map(repr, fields)) or 'nothing else'}")

  def one(row, swapped):
    answers = [str(row[name]) for name in (chosen, rejected)]
    values = {name: str(row[name]) for name in fields}
    first, second = reversed(answers) if swapped else answers
    return templates.fill(pieces, {**values, "first": first, "second": second, "sign": signs[swapped],
                                   "other": signs[1 - swapped], "better": answers[0],
                                   "worse": answers[1]})

  def change(index, row):
    rng = np.random.default_rng([seed, index])
    count = int(rng.integers(fewest, k + 1))
    alike = members.get(row.get(by), np.array([], int))
    alike = alike[alike != index]
    shown = rng.permutation(alike)[:count]
    flips = rng.integers(2, size=len(shown))
    text = start + "".join(one(source[int(i)], int(flip)) for i, flip in zip(shown, flips))
    return {**row, "demonstrations": text, "evidence": 1 + len(shown)}

  return rows.Mapped(source, change)


def _members(source, by, needed):
  """Indices of the rows that can demonstrate something, by the value that they share."""
  found: dict = {}
  for index in range(len(source)):
    row = rows.readable(source, index)
    if row is not None and all(rows.is_text(row.get(name)) for name in (by, *needed)):
      found.setdefault(row[by], []).append(index)
  return {value: np.array(indices) for value, indices in found.items()}
