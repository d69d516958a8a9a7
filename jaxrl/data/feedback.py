"""From what users said next to ratings of the answers before it (WildReward, arXiv:2602.08829).

A turn is a row with a question, an answer, the user's next message and a label of it:

  1 rejection    2 correction of an error    3 neutral or unclear    4 goes on gladly    5 satisfied

Turns of one `conversation` stand together, in their order. Each step is a function from rows to new rows,
and what it did to a row is written down in the row's `provenance`; `rated_turns` does all of them, as a
transform: `config.data.transforms = [dict(name="jaxrl.data.feedback:rated_turns", judge=...)]`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import math
import re
from typing import Any

from jaxrl import compose
from jaxrl import data
from jaxrl.data.sources import BadRow
from jaxrl.data.sources import Source

NEUTRAL, GLAD, SATISFIED, REJECTED = 3, 4, 5, 1
RATINGS = {1: 1, 2: 2, 4: 3, 5: 4}
REFUSALS = r"(?i)\b(i (can(no|')t|am unable|'m unable|won't|must decline)|i'm sorry,? but|as an ai)\b"
HARMFUL, HARMLESS, NO_REFUSAL = "harmful", "harmless", "no refusal"

Row = Mapping[str, Any]


def labelled(rows: Sequence[Row], judge: Callable[[Row], int | None]) -> list[dict[str, Any]]:
  """Rows with the label that a judge gives to the user's next message; 3 where it sees too little."""
  found = []
  for row in rows:
    label = judge(row)
    found.append(_changed(row, NEUTRAL if label is None else label,
                          "unclear" if label is None else "judged"))
  return found


def with_hindsight(rows: Sequence[Row], similar: Callable[[str, str], float], *, threshold: float = 0.5,
                   ahead: int = 2) -> tuple[list[dict[str, Any]], Counter]:
  """Neutral turns take the label of a glad turn soon after about the same thing.

  A question that is less similar than `threshold` changes the topic, and nothing behind it counts.
  Bad labels behind a neutral turn are counted and change nothing.

  Args:
    rows: labelled turns, those of a conversation together.
    similar: of two questions, such as the cosine of their embeddings.
    threshold: of that.
    ahead: turns that are looked at.

  Returns:
    The rows, and how many were `positive` and `negative` in hindsight.
  """
  found, counts = [], Counter()
  for _, turns in itertools.groupby(rows, key=lambda row: row["conversation"]):
    turns = list(turns)
    for i, row in enumerate(turns):
      new = dict(row)
      for later in turns[i + 1:i + 1 + ahead] if row["label"] == NEUTRAL else ():
        if similar(row["question"], later["question"]) < threshold:
          break
        if later["label"] >= GLAD:
          new = _changed(row, later["label"], "hindsight")
          counts["positive"] += 1
          break
        counts["negative"] += later["label"] < NEUTRAL
      found.append(new)
  return found, counts


def with_checked_refusals(rows: Sequence[Row], judge: Callable[[Row], str], *, phrases: str = REFUSALS,
                          shorter_than: int = 300) -> list[dict[str, Any]]:
  """Short answers with the words of a refusal are judged again: a harmful question is rightly refused, 5,
  a harmless one wrongly, 1, whatever the user said of it.

  Args:
    rows: labelled turns.
    judge: says "harmful" or "harmless" of a question that was refused, or "no refusal".
    phrases: regular expression of such words.
    shorter_than: characters.

  Raises:
    ValueError: the judge said something else.
  """
  labels, found = {HARMFUL: SATISFIED, HARMLESS: REJECTED}, []
  for row in rows:
    suspect = len(row["answer"]) < shorter_than and re.search(phrases, row["answer"])
    verdict = judge(row) if suspect else NO_REFUSAL
    if verdict not in (*labels, NO_REFUSAL):
      raise ValueError(f"the judge of refusals said {verdict!r}; it has to say {HARMFUL!r}, {HARMLESS!r} "
                       f"or {NO_REFUSAL!r}")
    found.append(_changed(row, labels[verdict], f"{verdict} refused") if verdict in labels else dict(row))
  return found


def ratings_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """Rows without neutral ones; of the others labels become ratings, 1, 2, 4, 5 -> 1, 2, 3, 4.

  Raises:
    ValueError: another label.
  """
  for row in rows:
    if row["label"] != NEUTRAL and row["label"] not in RATINGS:
      raise ValueError(f"label {row['label']!r} of a turn of conversation {row['conversation']!r}: labels "
                       "are 1 to 5")
  return [_changed(row, RATINGS[row["label"]], "rated") for row in rows if row["label"] != NEUTRAL]


def shared_words(one: str, other: str) -> float:
  """The cosine of two texts' counts of words, 0 to 1; 0 for a text without any."""
  a, b = (Counter(re.findall(r"\w+", text.lower())) for text in (one, other))
  norms = math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
  return sum(n * b[word] for word, n in a.items()) / norms if norms else 0.0


@dataclasses.dataclass(frozen=True)
class RatedTurns:
  """Rows that were all made at once, and where each comes from.

  Attributes:
    rows: with `label`, a rating from 1 to 4, and `provenance`.
    places: where each stood in its source.
    counts: what became of the turns.
  """

  rows: list[dict[str, Any]]
  places: list[str]
  counts: Counter

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.rows[index]

  def where(self, index: int) -> str:
    """Where the turn stands."""
    return self.places[index]


def rated_turns(source: Source, *, judge: str = "", refusals: str = "",
                similar: str = "jaxrl.data.feedback:shared_words", threshold: float = 0.5, ahead: int = 2,
                conversation: str = "conversation") -> RatedTurns:
  """All steps over the rows of a source: labels, hindsight, refusals, ratings.

  Args:
    source: rows with `question`, `answer`, the field that names their conversation, and either `label`
      or what the judge reads.
    judge: `module:function` of a row -> label or None; empty where rows have one.
    refusals: `module:function` of a row, as in `with_checked_refusals`; empty leaves them.
    similar: `module:function` of two texts.
    threshold, ahead: as in `with_hindsight`.
    conversation: that field.

  Raises:
    BadRow: a row lacks a field.
  """
  def piece(name, argument):
    return compose.build(name, data, where=f"rated_turns: {argument}")
  rows = []
  for index in range(len(source)):
    row = source[index]
    for field in ("question", "answer", conversation, *(() if judge else ("label",))):
      if row.get(field) is None:
        raise BadRow("missing_field", source.where(index), f"field {field!r} is missing or null")
    rows.append({**row, "conversation": row[conversation], "place": source.where(index)})
  if judge:
    rows = labelled(rows, piece(judge, "judge"))
  rows, counts = with_hindsight(rows, piece(similar, "similar"), threshold=threshold, ahead=ahead)
  if refusals:
    rows = with_checked_refusals(rows, piece(refusals, "refusals"))
  rated = ratings_of(rows)
  counts.update(turns=len(rows), neutral=len(rows) - len(rated))
  places = [row.pop("place") for row in rated]
  return RatedTurns(rated, places, counts)


def _changed(row, label, why):
  return {**row, "label": label, "provenance": [*row.get("provenance", ()), why]}
