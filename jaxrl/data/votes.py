"""Votes between two answers, and reactions to single ones, as arenas collect them (compar:IA,
arXiv:2602.06669).

A vote has two models' answers to one prompt and says which is better, or that both are equal:

  {"question": "...", "model_a": "x", "model_b": "y", "answer_a": "...", "answer_b": "...",
   "winner": "a", "flags_a": ["useful"], "flags_b": ["incorrect"]}

`winner` is a, b or tie (also model_a, model_b, both_equal, or the name of the model); texts and flags
may be missing where only the ranking is wanted. A reaction is about one answer of such a conversation:

  {"question": "...", "answer": "...", "conversation": "17", "side": "a", "model_a": "x", "model_b": "y",
   "liked": true, "flags": ["creative"]}
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
from typing import Any

from jaxrl.compose import nearest
from jaxrl.data.examples import present
from jaxrl.data.sources import BadRow
from jaxrl.data.sources import Source

GOOD = ("useful", "complete", "creative", "clear_formatting")
BAD = ("incorrect", "superficial", "instructions_not_followed")
FLAGS = GOOD + BAD
COUNTED = ("useful", "creative", "clear_formatting")  # of the good ones, in matches of reactions
TIES = ("tie", "both_equal", "tie (bothbad)")
SIDES = ("a", "b")


@dataclasses.dataclass(frozen=True)
class Vote:
  """One vote.

  Attributes:
    models: of sides a and b.
    points: of side a: 2 if it won, 1 for a tie, 0 if it lost.
    question: the prompt, "" if unknown.
    answers: of both sides, "" if unknown.
    flags: what was said of each side, among `FLAGS`.
  """

  models: tuple[str, str]
  points: float
  question: str = ""
  answers: tuple[str, str] = ("", "")
  flags: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())


@dataclasses.dataclass(frozen=True)
class Reaction:
  """What somebody thought of one answer.

  Attributes:
    conversation: that it was given in.
    models: of sides a and b of that conversation.
    side: 0 or 1, which gave the answer.
    liked: True, False, or None where only flags were given.
    question, answer: texts, "" if unknown.
    flags: among `FLAGS`.
  """

  conversation: str
  models: tuple[str, str]
  side: int
  liked: bool | None
  question: str = ""
  answer: str = ""
  flags: frozenset[str] = frozenset()


def to_vote(row: Mapping[str, Any], where: str) -> Vote:
  """The vote of a row that stands at `where`.

  Raises:
    BadRow: a field is missing, or holds what is no vote.
  """
  models = _models(row, where)
  winner = str(present(row, "winner", "votes", where))
  names = {"a": 2.0, "model_a": 2.0, "b": 0.0, "model_b": 0.0, **dict.fromkeys(TIES, 1.0)}
  names = {models[0]: 2.0, models[1]: 0.0, **names}
  if winner not in names:
    raise BadRow("wrong_type", where, f"field 'winner' holds {winner!r}{nearest(winner, names)}")
  return Vote(models, names[winner], _text(row, "question", where),
              tuple(_text(row, f"answer_{side}", where) for side in SIDES),
              tuple(_flags(row, f"flags_{side}", where) for side in SIDES))


def to_reaction(row: Mapping[str, Any], where: str) -> Reaction:
  """The reaction of a row that stands at `where`; raises as `to_vote`."""
  side, liked = str(present(row, "side", "reactions", where)), row.get("liked")
  if side not in SIDES:
    raise BadRow("wrong_type", where, f"field 'side' holds {side!r}, but sides are a and b")
  if liked not in (True, False, None):
    raise BadRow("wrong_type", where, f"field 'liked' holds {liked!r}: true, false or null")
  flags = _flags(row, "flags", where)
  if liked is None and not flags:
    raise BadRow("empty", where, "a reaction is liked, disliked or has flags")
  return Reaction(str(present(row, "conversation", "reactions", where)), _models(row, where),
                  SIDES.index(side), liked, _text(row, "question", where), _text(row, "answer", where),
                  flags)


def read(source: Source, to_record: Callable[[Mapping[str, Any], str], Any] = to_vote) -> Iterator[Any]:
  """The votes, or with `to_reaction` the reactions, of all rows."""
  for index in range(len(source)):
    yield to_record(source[index], source.where(index))


# ------------------------------------------------------------------------------------- to other shapes


def pair_of(vote: Vote) -> dict[str, Any]:
  """A row for Bradley-Terry or DPO: `question, chosen, rejected, preference`; 0.5 for a tie.

  Set `data.preference="preference"`.
  """
  chosen, rejected = vote.answers if vote.points >= 1 else vote.answers[::-1]
  return dict(question=vote.question, chosen=chosen, rejected=rejected,
              preference=max(vote.points, 2 - vote.points) / 2)


def unpaired_of(reaction: Reaction) -> dict[str, Any] | None:
  """A row for KTO: `question, answer, preference`, 1 for a good answer and 0 for a bad one.

  A reaction without a like is good or bad as most of its flags are; None where they are as many.
  """
  good = reaction.liked
  if good is None:
    balance = len(reaction.flags & set(GOOD)) - len(reaction.flags & set(BAD))
    if not balance:
      return None
    good = balance > 0
  return dict(question=reaction.question, answer=reaction.answer, preference=float(good))


def attributes_of(vote: Vote) -> list[dict[str, Any]]:
  """Two rows `question, answer` with 1 or 0 for every flag, for heads that predict attributes."""
  return [dict(question=vote.question, answer=answer, **{flag: float(flag in flags) for flag in FLAGS})
          for answer, flags in zip(vote.answers, vote.flags)]


def matches_of(reactions: Iterable[Reaction]) -> list[tuple[str, str, float]]:
  """One match (A, B, points of A) for every conversation, by what was said of each side's answers.

    score = number of (liked, useful, creative, clear_formatting)
            - number of (disliked, incorrect, superficial, instructions_not_followed)

  Conversations with equal scores are left out.
  """
  scores: dict[tuple, list[int]] = {}
  for r in reactions:
    both = scores.setdefault((r.conversation, r.models), [0, 0])
    both[r.side] += (len(r.flags & set(COUNTED)) - len(r.flags & set(BAD))
                     + (0 if r.liked is None else 1 if r.liked else -1))
  return [(*models, 2.0 if a > b else 0.0) for (_, models), (a, b) in scores.items() if a != b]


def length_difference(vote: Vote) -> float:
  """`(length of a - length of b) / (sum of both)` in characters, a cue that votes may follow."""
  a, b = map(len, vote.answers)
  return (a - b) / (a + b) if a + b else 0.0


def _models(row, where):
  models = tuple(str(present(row, f"model_{side}", "votes", where)) for side in SIDES)
  if models[0] == models[1]:
    raise BadRow("wrong_type", where, f"fields 'model_a' and 'model_b' both hold {models[0]!r}")
  return models


def _text(row, field, where):
  value = row.get(field, "")
  if not isinstance(value, str):
    raise BadRow("wrong_type", where, f"field {field!r} has to hold text, not a {type(value).__name__}")
  return value


def _flags(row, field, where):
  value = row.get(field) or ()
  unknown = [flag for flag in value if flag not in FLAGS]
  if isinstance(value, str) or unknown:
    raise BadRow("wrong_type", where, f"field {field!r} holds {value!r}, but flags are a list of "
                 f"{', '.join(FLAGS)}")
  return frozenset(value)
