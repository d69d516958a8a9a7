"""The arithmetic behind scores of pairs: committees, IFD, divisions into parts, a linear model."""

from jaxtyping import Float, Int
import numpy as np

from jaxrl.compose import nearest

RULES = ("all", "majority")
SLOPE = 1e-8  # of the loss, where a fit ends


def agreement(gaps: Float[np.ndarray, "models rows"], rule: str) -> Float[np.ndarray, "rows"]:
  """Below 0 where all models, or most of them, prefer the rejected answer.

    all       (models that do not prefer it) / models - 1 / (2 models)
    majority  1/2 - (models that prefer it) / models

  Raises:
    ValueError: another rule.
  """
  if rule not in RULES:
    raise ValueError(f"rule={rule!r}{nearest(rule, RULES)}")
  against = np.mean(gaps < 0, axis=0)
  score = 1 - against - 0.5 / len(gaps) if rule == "all" else 0.5 - against
  return np.where(np.isnan(gaps).any(axis=0), np.nan, score)


def ifd(conditioned: np.ndarray, alone: np.ndarray) -> np.ndarray:
  """How little the prompt helps an answer: `ppl(y|x) / ppl(y)` (IFD, arXiv:2308.12032, eq. 4).

  Args:
    conditioned: mean log-probability of the answer's tokens behind its prompt.
    alone: the same without the prompt.
  """
  return np.exp(alone - conditioned)


def ifd_score(of_chosen: np.ndarray, of_rejected: np.ndarray) -> np.ndarray:
  """`-(IFD(chosen) + IFD(rejected)) / 2`: low where the prompt helps neither answer. It is the same
  for both labels, so it cannot tell wrong ones."""
  return -(of_chosen + of_rejected) / 2


def ifd_gap(of_chosen: np.ndarray, of_rejected: np.ndarray) -> np.ndarray:
  """`IFD(rejected) - IFD(chosen)`: above 0 where the prompt helps the chosen answer more."""
  return of_rejected - of_chosen


def parts(rows: int, of: int, seed: int) -> Int[np.ndarray, "rows"]:
  """A division of rows into parts of equal size, at random. 0 to `of` - 1 for each row

  Raises:
    ValueError: less than two parts, or more than rows.
  """
  if not 2 <= of <= rows:
    raise ValueError(f"{rows} rows in {of} parts: use 2 to {rows}")
  return np.random.default_rng([seed, of]).permutation(np.arange(rows) % of)


def fit_linear(x: Float[np.ndarray, "rows features"], ridge: float) -> Float[np.ndarray, "features"]:
  """The w that minimises `sum of -log s(x w) + ridge / 2 |w|^2`, by Newton's method.

  Raises:
    ValueError: ridge that is not above 0.
  """
  if not ridge > 0:
    raise ValueError(f"ridge={ridge} has to be above 0: pairs that can be told apart have no best w")
  w = np.zeros(x.shape[1])
  for _ in range(100):
    wrong = 1 / (1 + np.exp(np.clip(x @ w, -500, 500)))  # probability of the other label
    slope = ridge * w - x.T @ wrong
    if np.abs(slope).max(initial=0) < SLOPE * (1 + len(x)):
      break
    curve = x.T @ ((wrong * (1 - wrong))[:, None] * x) + ridge * np.eye(len(w))
    w = w - np.linalg.solve(curve, slope)
  return w
