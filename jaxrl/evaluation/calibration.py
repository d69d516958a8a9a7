"""How well stated confidences fit what is right.

Everywhere `confidences` are numbers from 0 to 1 and `correct` is 0 or 1, one of each per answer.
"""

import numpy as np


def brier_score(confidences, correct) -> float:
  """Mean of `(q - c)^2` (Brier, 1950): 0 is perfect, 0.25 what q = 1/2 always gets."""
  q, c = _checked(confidences, correct)
  return float(np.mean((q - c) ** 2))


def expected_calibration_error(confidences, correct, *, bins: int = 10) -> float:
  """Distance of confidence and accuracy within bins (Naeini et al., 2015).

    sum_b n_b / n * |mean of q in b - mean of c in b|,     bins of equal width on [0, 1]

  The last bin holds 1 too.
  """
  q, c = _checked(confidences, correct)
  of = np.minimum((q * bins).astype(int), bins - 1)
  gaps = np.bincount(of, q - c, bins)
  return float(np.abs(gaps).sum() / len(q))


def reliability(confidences, correct, *, bins: int = 10
                ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """What a reliability diagram shows, for the bins of `expected_calibration_error`.

  Returns:
    By bin the number of answers, their mean confidence and the share of right ones, NaN for the last
    two where there are none. [bins] each
  """
  q, c = _checked(confidences, correct)
  of = np.minimum((q * bins).astype(int), bins - 1)
  counts = np.bincount(of, minlength=bins)
  with np.errstate(invalid="ignore"):
    return counts, np.bincount(of, q, bins) / counts, np.bincount(of, c, bins) / counts


def auroc(confidences, correct) -> float:
  """The chance that a right answer is stated with more confidence than a wrong one, ties as 1/2.

  NaN where all answers are right, or none is.
  """
  q, c = _checked(confidences, correct)
  right, wrong = q[c == 1], np.sort(q[c == 0])
  if not len(right) or not len(wrong):
    return float("nan")
  below, up_to = (np.searchsorted(wrong, right, side) for side in ("left", "right"))
  return float((below + up_to).mean() / (2 * len(wrong)))


def _checked(confidences, correct):
  q, c = np.asarray(confidences, np.float64), np.asarray(correct, np.float64)
  if q.shape != c.shape or q.ndim != 1 or not len(q):
    raise ValueError(f"calibration compares one confidence with one outcome each, at least one; "
                     f"got shapes {q.shape} and {c.shape}")
  if q.min() < 0 or q.max() > 1 or set(np.unique(c)) - {0.0, 1.0}:
    raise ValueError("confidences are from 0 to 1 and outcomes 0 or 1; rescale per cents by 100")
  return q, c
