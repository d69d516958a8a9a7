"""How far the label of a pair is to be believed: `(source, *, seed, ...) -> [rows]`, low where it is not.

Scores of PrefCleanBench (arXiv:2509.23564), with what its 13 cleaners make of them:

  judge             a named function                                              judge-R, judge-F
  reward_gap        a small reward model on counts, trained here                  rwgap-R, rwgap-F
  committee         several of those                                              all-R/-F, maj-R/-F
  stored            what any model has said, from a file                          all that need a model
  tag_complexity    number of tags of the prompt                                  cmp
  tag_diversity     tags that no richer prompt has                                div

Files come from `scripts/preference_scores.py`. NaN means that nothing can be said of a row.
"""

from collections.abc import Callable, Sequence
import json
import zlib

from jaxtyping import Float
import numpy as np

from jaxrl import compose
from jaxrl.data.sources import BadRow
from jaxrl.data.sources import Source
from jaxrl.data.transforms import score_arithmetic
from jaxrl.data.transforms import text_features
from jaxrl.data.transforms.rows import readable


def reward_gap(source: Source, *, seed: int, ridge: float = 10.0, folds: int = 2,
               features: str = "character_pairs", question: str = "question", chosen: str = "chosen",
               rejected: str = "rejected") -> Float[np.ndarray, "rows"]:
  """`r(chosen) - r(rejected)` of a linear Bradley-Terry model that was not trained on the row.

    r(x, y) = w . f(x, y),   w minimises sum of -log s(r(chosen) - r(rejected)) + ridge / 2 |w|^2

  Rows are divided into parts; the rows of each are scored by a model of all others (cross-scoring).

  Args:
    source: of pairs of texts.
    seed: of the division.
    ridge: above 0.
    folds: parts, at least 2.
    features: of `transforms.text_features`, or `module:function` of (question, answer): as many
      numbers for each.
    question, chosen, rejected: fields.
  """
  x = _differences(source, features, question, chosen, rejected)
  return _cross_scored(x, score_arithmetic.parts(len(source), folds, seed), ridge)


def committee(source: Source, *, seed: int, rule: str = "majority", members: int = 5, ridge: float = 10.0,
              folds: int = 2, features: str = "character_pairs", question: str = "question",
              chosen: str = "chosen", rejected: str = "rejected") -> Float[np.ndarray, "rows"]:
  """`agreement` of several models as in `reward_gap`, each of rows drawn with replacement."""
  x = _differences(source, features, question, chosen, rejected)
  part = score_arithmetic.parts(len(source), folds, seed)
  rng = np.random.default_rng([seed, folds, members])
  gaps = [_cross_scored(x, part, ridge, rng) for _ in range(members)]
  return score_arithmetic.agreement(np.array(gaps), rule)


def judge(source: Source, *, seed: int, function: str) -> Float[np.ndarray, "rows"]:
  """`p - 1/2` for p, the probability that the chosen answer is better, by `module:function` of a row.

  A language model's verdicts are better asked for once and read with `stored`.
  """
  del seed
  ask = compose.build(function, text_features, where="judge: function")
  return _of_rows(source, lambda row: ask(row) - 0.5)


def stored(source: Source, *, seed: int, paths: str | Sequence[str], rule: str = ""
           ) -> Float[np.ndarray, "rows"]:
  """Scores from JSONL files that have a line `{"where": ..., "score": ...}` for every row, in order, and
  a `digest` of the row, if they want to be sure.

  Args:
    source: whose rows stand where the lines say.
    seed: not used.
    paths: of one file, or of several with the gaps of one model each.
    rule: of `score_arithmetic.agreement`, for several.

  Raises:
    ValueError: a file that cannot be read or is about other rows.
  """
  del seed
  paths = [paths] if isinstance(paths, str) else list(paths)
  if not paths or (len(paths) > 1) != bool(rule):
    raise ValueError(f"stored: {len(paths)} files and rule={rule!r}: several files need a rule, "
                     f"{' or '.join(score_arithmetic.RULES)}, and one file none")
  gaps = np.array([_read(path, source) for path in paths])
  return score_arithmetic.agreement(gaps, rule) if rule else gaps[0]


def tag_complexity(source: Source, *, seed: int, tags: str = "words", question: str = "question"
                  ) -> Float[np.ndarray, "rows"]:
  """How many different tags the prompt has (InsTag, arXiv:2308.07074, "complexity").

  The answers do not matter, so it flags right and wrong labels alike.

  Args:
    source: of pairs.
    seed: not used.
    tags: of `transforms.text_features`, or `module:function` of the question.
    question: field.
  """
  del seed
  return np.array([np.nan if t is None else float(len(t)) for t in _tags(source, tags, question)])


def tag_diversity(source: Source, *, seed: int, tags: str = "words", question: str = "question"
                  ) -> Float[np.ndarray, "rows"]:
  """How many of the prompt's tags were new when it was looked at (InsTag, "diversity").

  Prompts are looked at from the most complex to the least, equal ones in their order. Arguments as in
  `tag_complexity`.
  """
  del seed
  found, seen = _tags(source, tags, question), set()
  score = np.array([np.nan if t is None else 0.0 for t in found])
  for i in sorted((i for i, t in enumerate(found) if t is not None), key=lambda i: -len(found[i])):
    score[i] = len(found[i] - seen)
    seen |= found[i]
  return score


# --------------------------------------------------------------------------------------- reading


def _of_rows(source, function: Callable[[dict], float]) -> np.ndarray:
  """A number of every row; NaN of those that cannot be read."""
  found = np.full(len(source), np.nan)
  for i in range(len(source)):
    try:
      found[i] = function(source[i])
    except BadRow:
      continue
  return found


def _tags(source, name, question):
  tags = compose.build(name, text_features, where="tags")
  found: list[set | None] = []
  for i in range(len(source)):
    try:
      found.append(set(tags(_text(source[i], question, source.where(i)))))
    except BadRow:
      found.append(None)
  return found


def _differences(source, features, question, chosen, rejected):
  """Features of the chosen minus those of the rejected answer; NaN of rows that cannot be read."""
  function = compose.build(features, text_features, where="features")
  found: list[np.ndarray | None] = []
  for i in range(len(source)):
    try:
      row, where = source[i], source.where(i)
      asked, *answers = (_text(row, name, where) for name in (question, chosen, rejected))
      good, bad = (np.asarray(function(asked, answer), np.float64) for answer in answers)
      found.append(good - bad)
    except BadRow:
      found.append(None)
  sizes = {x.shape for x in found if x is not None}
  if len(sizes) != 1 or len(*sizes) != 1:
    raise ValueError(f"features={features!r} gives arrays of shapes {sorted(sizes)}: use the same number of "
                     "numbers for every answer")
  blank = np.full(*sizes, np.nan)
  return np.array([blank if x is None else x for x in found])


def _cross_scored(x, part, ridge, rng=None):
  """Gaps of rows by models of the rows of other parts; with `rng` drawn with replacement."""
  gap, whole = np.full(len(x), np.nan), ~np.isnan(x).any(axis=1)
  x = x[:, np.abs(x[whole]).any(axis=0)]  # what never differs has no weight
  for own in np.unique(part):
    rows = np.flatnonzero(whole & (part != own))
    rows = rows if rng is None else rng.choice(rows, len(rows))
    gap[part == own] = x[part == own] @ score_arithmetic.fit_linear(x[rows], ridge)
  return gap


def _read(path, source):
  try:
    with open(path, encoding="utf-8") as file:
      rows = [json.loads(line) for line in file if line.strip()]
    found = np.array([np.nan if row["score"] is None else row["score"] for row in rows], np.float64)
    places = [row["where"] for row in rows]
    digests = [row.get("digest") for row in rows]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f"cannot read scores from {path}: {error!r}; lines are "
                     '{"where": ..., "score": ...}') from error
  if len(rows) != len(source):
    raise ValueError(f"{path} has {len(rows)} scores, but there are {len(source)} rows")
  for i, (place, digest) in enumerate(zip(places, digests)):
    if place != source.where(i):
      raise ValueError(f"line {i + 1} of {path} is about {place}, but row {i} stands at {source.where(i)}")
    if digest is not None and digest != digest_of(source, i):
      raise ValueError(f"line {i + 1} of {path} was written for another row than the one at {place}")
  return found


def digest_of(source: Source, index: int) -> str:
  """A short name of what a row holds."""
  return f"{zlib.crc32(json.dumps(readable(source, index), sort_keys=True, default=str).encode()):08x}"


def _text(row, field, where):
  """Text, or that of the last message of a conversation."""
  value = row.get(field)
  if isinstance(value, list) and value and isinstance(value[-1], dict):
    value = value[-1].get("content")
  if not isinstance(value, str):
    raise BadRow("wrong_type", where, f"field {field!r} has to hold text or a conversation")
  return value
