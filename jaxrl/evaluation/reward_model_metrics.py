"""What the scores of a reward model are worth: pure functions of scores, grades and lengths.

A question has answers, each with a score of the model and a grade, of people or of a verifier; more is
better in both. Two answers of different grade are a pair, whose margin is the score of the better one
minus that of the worse one. A margin above 0 is right, one of 0 half right.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from jaxtyping import Float, Int
import numpy as np

from jaxrl.evaluation import calibration

RESAMPLES, LEVEL = 1000, 0.95  # of bootstrap intervals
BINS = 10  # of calibration, from 1/2 to 1
STYLES = 3  # of RM-Bench: concise, detailed, detailed with Markdown


@dataclasses.dataclass(frozen=True)
class Scored:
  """A question whose answers the model has scored.

  Attributes:
    scores, grades, lengths: of its answers, lengths in tokens. [answers] each
    subset: that it is reported under.
    styles: of its answers, 0 to `STYLES` - 1 from plain to elaborate; None without. [answers]
  """

  scores: np.ndarray
  grades: np.ndarray
  lengths: np.ndarray
  subset: str = ""
  styles: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Pairs:
  """All pairs of some questions. [pairs] each

  Attributes:
    margins: score of the better answer minus score of the worse one.
    longer: tokens by which the better answer is longer.
    questions: index of the question.
    styles: of the better and of the worse answer, -1 without. [pairs, 2]
  """

  margins: np.ndarray
  longer: np.ndarray
  questions: np.ndarray
  styles: np.ndarray

  def where(self, mask: np.ndarray) -> "Pairs":
    """Some of the pairs."""
    return Pairs(self.margins[mask], self.longer[mask], self.questions[mask], self.styles[mask])


def pairs_of(questions: Sequence[Scored]) -> Pairs:
  """The pairs of every question, in order."""
  parts: list[tuple[np.ndarray, ...]] = []
  for index, q in enumerate(questions):
    better, worse = np.nonzero(np.asarray(q.grades)[:, None] > np.asarray(q.grades)[None])
    styles = np.full(len(q.grades), -1) if q.styles is None else np.asarray(q.styles)
    scores, lengths = (np.asarray(x, np.float64) for x in (q.scores, q.lengths))
    parts.append((scores[better] - scores[worse], lengths[better] - lengths[worse],
                  np.full(len(better), index), np.stack([styles[better], styles[worse]], -1)))
  if not parts:
    return Pairs(np.zeros(0), np.zeros(0), np.zeros(0, int), np.zeros((0, 2), int))
  return Pairs(*(np.concatenate(column) for column in zip(*parts)))


def right(margins: Float[np.ndarray, "pairs"]) -> Float[np.ndarray, "pairs"]:
  """1 for a margin above 0, 1/2 for one of 0, 0 below."""
  margins = np.asarray(margins)
  return (margins > 0) + 0.5 * (margins == 0)


def accuracy(margins: Float[np.ndarray, "pairs"]) -> float:
  """The share of pairs that are right; NaN without any."""
  return float(right(margins).mean()) if len(margins) else math.nan


def accuracy_interval(margins: Float[np.ndarray, "pairs"], questions: Int[np.ndarray, "pairs"], *,
                      resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
                      ) -> tuple[float, float]:
  """A bootstrap interval of `accuracy` (Efron, 1979) that draws whole questions with replacement, for
  the pairs of one question are not independent.

  Returns:
    The quantiles (1 - level) / 2 and (1 + level) / 2 over the resamples; NaN without pairs.
  """
  if not len(margins):
    return math.nan, math.nan
  _, index = np.unique(questions, return_inverse=True)
  counts, sums = np.bincount(index), np.bincount(index, right(margins))
  rng, found = np.random.default_rng(seed), []
  for _ in range(resamples):
    times = np.bincount(rng.integers(len(counts), size=len(counts)), minlength=len(counts))
    found.append((times @ sums) / (times @ counts))
  low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def style_matrix(margins: Float[np.ndarray, "pairs"], styles: Int[np.ndarray, "pairs 2"], *,
                 count: int = STYLES) -> Float[np.ndarray, "count count"]:
  """Accuracy by the style of the better answer (row) and of the worse one (column); NaN without pairs
  (RM-Bench, arXiv:2410.16184, which counts equal scores as wrong)."""
  cell = styles[:, 0] * count + styles[:, 1]
  with np.errstate(invalid="ignore"):
    return (np.bincount(cell, right(margins), count ** 2)
            / np.bincount(cell, minlength=count ** 2)).reshape(count, count)


def by_difficulty(matrix: Float[np.ndarray, "styles styles"]) -> dict[str, float]:
  """RM-Bench's three accuracies, means of the cells of `style_matrix` in which the better answer has
  the more elaborate style (`easy`), the same (`normal`) or the plainer one (`hard`)."""
  return {"easy": float(matrix[np.tril_indices_from(matrix, -1)].mean()),
          "normal": float(np.diag(matrix).mean()),
          "hard": float(matrix[np.triu_indices_from(matrix, 1)].mean())}


def length_bias(pairs: Pairs, questions: Sequence[Scored]) -> dict[str, float]:
  """How far the scores follow the length of answers.

  Returns:
    `accuracy_longer`, `accuracy_shorter`: of pairs whose better answer is longer, or shorter;
    `longer_is_better`: accuracy of preferring the longer answer, chance plus what length alone knows;
    `length_only`: accuracy of preferring the longer or the shorter one, whichever is right more often
    in these pairs;
    `score_correlation`, `grade_correlation`: of length with scores, and with grades, over answers
    after the mean of their question is taken away (Pearson).
  """
  follows = accuracy(pairs.longer)

  def centred(name):
    return np.concatenate([np.asarray(getattr(q, name), float) - np.mean(getattr(q, name))
                           for q in questions] or [np.zeros(0)])
  lengths = centred("lengths")
  return {"accuracy_longer": accuracy(pairs.margins[pairs.longer > 0]),
          "accuracy_shorter": accuracy(pairs.margins[pairs.longer < 0]),
          "longer_is_better": follows, "length_only": max(follows, 1 - follows),
          "score_correlation": correlation(centred("scores"), lengths),
          "grade_correlation": correlation(centred("grades"), lengths)}


def correlation(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
  """Pearson's; NaN where one of them does not vary."""
  x, y = (np.asarray(v, np.float64) - np.mean(v) if len(v) else np.zeros(0) for v in (x, y))
  scale = math.sqrt(x @ x) * math.sqrt(y @ y)
  return float(x @ y / scale) if scale else math.nan


def pair_calibration(margins: Float[np.ndarray, "pairs"], *, bins: int = BINS) -> dict[str, Any]:
  """How well `p = 1 / (1 + exp(-margin))`, the chance that a Bradley-Terry model (or the mean of a
  Beta one) gives the better answer, fits what is right.

  Every pair is seen from both sides, as (p, right) and (1 - p, wrong), so nothing depends on which
  answer is called the first; of the 2 * `bins` bins on [0, 1] those below 1/2 then mirror those above.

  Returns:
    `brier`, `ece` (see `evaluation.calibration`), `nll`, the mean of -log p, and `reliability`: rows
    `confidence`, `accuracy`, `pairs` of the bins from 1/2 up that hold pairs.
  """
  margins = np.asarray(margins, np.float64)
  if not len(margins):
    return {"brier": math.nan, "ece": math.nan, "nll": math.nan, "reliability": []}
  p = np.exp(-np.logaddexp(0, -margins))
  q, outcome = np.concatenate([p, 1 - p]), np.repeat([1.0, 0.0], len(p))
  counts, confidence, share = calibration.reliability(q, outcome, bins=2 * bins)
  rows = [dict(confidence=float(confidence[b]), accuracy=float(share[b]), pairs=int(counts[b]))
          for b in range(bins, 2 * bins) if counts[b]]
  return {"brier": calibration.brier_score(q, outcome),
          "ece": calibration.expected_calibration_error(q, outcome, bins=2 * bins),
          "nll": float(np.logaddexp(0, -margins).mean()), "reliability": rows}


def swap_consistency(margins: Float[np.ndarray, "pairs"], swapped: Float[np.ndarray, "pairs"]
                     ) -> dict[str, float]:
  """Whether it matters which answer is asked about first.

  Args:
    margins: when the better answer came first.
    swapped: margins (better minus worse) of the same pairs when it came second.

  Returns:
    `consistency`, the share of pairs with the same verdict in both orders; `first_preferred`, the
    share of verdicts, over both orders, for the answer that came first: 1/2 without a bias of
    position; and the `largest_difference` of two margins of one pair.
  """
  one, other = right(margins), right(swapped)
  if not len(one):
    return {"consistency": math.nan, "first_preferred": math.nan, "largest_difference": math.nan}
  return {"consistency": float((one == other).mean()),
          "first_preferred": float((one.mean() + 1 - other.mean()) / 2),
          "largest_difference": float(np.abs(np.subtract(margins, swapped)).max())}


def best_of_n(scores: Float[np.ndarray, "answers"], grades: Float[np.ndarray, "answers"], n: int
              ) -> float:
  """The expected grade of the highest score among n of m answers drawn without replacement.

  Ordered from the highest score, answer i = 0..m-1 is the best of a draw with probability
  `C(m - 1 - i, n - 1) / C(m, n)`; answers of equal score share their grades, as if one of those drawn
  were picked at random. n = 1 is the mean grade, and with `scores = grades` it is that of an oracle.

  Raises:
    ValueError: fewer than n answers.
  """
  scores, grades = np.asarray(scores, np.float64), np.asarray(grades, np.float64)
  m = len(scores)
  if not 0 < n <= m:
    raise ValueError(f"best of {n} needs at least {n} answers, but there are {m}")
  order = np.argsort(-scores, kind="stable")
  _, tied = np.unique(-scores[order], return_inverse=True)
  shared = (np.bincount(tied, grades[order]) / np.bincount(tied))[tied]
  chance = [math.comb(m - 1 - i, n - 1) / math.comb(m, n) for i in range(m)]
  return float(np.dot(chance, shared))


def best_of_n_table(questions: Sequence[Scored]) -> list[dict[str, float]]:
  """Mean grades by n, over the questions with at least n answers.

  Returns:
    For n = 1, 2, 4, ... and the largest number of answers: `n`, `questions`, and the mean grade of
    what the `model`, an `oracle`, and the `shortest` and the `longest` answer choose; `chance` is the
    mean grade of all answers.
  """
  most = max((len(q.grades) for q in questions), default=0)
  sizes = sorted({*(2 ** k for k in range(most.bit_length()) if 2 ** k <= most), most} - {0})
  rows = []
  for n in sizes:
    some = [q for q in questions if len(q.grades) >= n]
    by = {"model": lambda q: q.scores, "oracle": lambda q: q.grades,
          "shortest": lambda q: -np.asarray(q.lengths), "longest": lambda q: q.lengths}
    rows.append({"n": n, "questions": len(some),
                 "chance": float(np.mean([np.mean(q.grades) for q in some])),
                 **{name: float(np.mean([best_of_n(score(q), q.grades, n) for q in some]))
                    for name, score in by.items()}})
  return rows


def report(questions: Sequence[Scored]) -> dict[str, Any]:
  """All of the above for one model.

  Returns:
    `questions`, `answers`, `pairs`, `accuracy` with its `interval`, `subsets` (the same for each),
    `macro_accuracy` (mean over subsets), `calibration` and `length`; `styles` where answers have any:
    `matrix`, `easy`, `normal`, `hard` and their mean over `subsets`; `best_of_n` where a question has
    more than two answers without styles.
  """
  pairs = pairs_of(questions)
  names = np.array([q.subset for q in questions])[pairs.questions] if len(pairs.questions) else (
      np.zeros(0, str))
  parts = {str(name): pairs.where(names == name) for name in sorted(set(names))}
  found: dict[str, Any] = {
      "questions": len(questions), "answers": sum(len(q.grades) for q in questions), **_of(pairs),
      "subsets": {name: _of(part) for name, part in parts.items()},
      "macro_accuracy": _mean([accuracy(part.margins) for part in parts.values()]),
      "calibration": pair_calibration(pairs.margins), "length": length_bias(pairs, questions)}
  if any(q.styles is not None for q in questions):
    found["styles"] = _styles(parts, pairs)
  elif any(len(q.grades) > 2 for q in questions):
    found["best_of_n"] = best_of_n_table(questions)
  return found


def _of(pairs):
  return {"pairs": len(pairs.margins), "accuracy": accuracy(pairs.margins),
          "interval": accuracy_interval(pairs.margins, pairs.questions)}


def _styles(parts: Mapping[str, Pairs], pairs: Pairs) -> dict[str, Any]:
  def of(part):
    styled = part.where((part.styles >= 0).all(axis=1))
    matrix = style_matrix(styled.margins, styled.styles)
    return {"matrix": matrix.tolist(), **by_difficulty(matrix)}
  return {**of(pairs), "subsets": {name: of(part) for name, part in parts.items()}}


def _mean(values):
  return float(np.mean(values)) if values else math.nan
