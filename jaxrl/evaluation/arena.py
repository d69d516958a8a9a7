"""Rankings of models from votes between their answers (compar:IA, arXiv:2602.06669; Bradley and Terry,
1952; Elo, 1978).

A match is (A, B, points of A): 2 where A won, 1 for a draw, 0 where B won. Strengths theta are on the
scale of chess, `P(A > B) = 1 / (1 + 10^-(theta_A - theta_B))`, with mean 0 over models, and displayed as
`1000 + 400 theta`.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph
from scipy.special import expit, log_expit

START, SCALE = 1000.0, 400.0
LN10 = float(np.log(10.0))
LEAST_RIDGE = 1e-3  # of resamples in which a model won or lost everything
MOST_STEPS, TOLERANCE = 100, 1e-10
FURTHEST = 60.0  # logits; e^-60 is no probability that votes could tell from 0


@dataclasses.dataclass(frozen=True)
class Matches:
  """Who met whom, and what came out.

  Attributes:
    models: names.
    first, second: indices of A and B. [matches]
    points: of A, from 0 to 2. [matches]
    covariates: what else may have moved the vote, A's minus B's. [matches, covariates]
    names: of the covariates.
  """

  models: tuple[str, ...]
  first: np.ndarray
  second: np.ndarray
  points: np.ndarray
  covariates: np.ndarray
  names: tuple[str, ...] = ()

  @classmethod
  def of(cls, results: Sequence[tuple[str, str, float]],
         covariates: Mapping[str, Sequence[float]] | None = None) -> "Matches":
    """From (name of A, name of B, points of A), and numbers of each match by name.

    Raises:
      ValueError: no match, a model against itself, points beyond 0 to 2, or covariates that are not
        one finite number per match.
    """
    if not results:
      raise ValueError("there is no match to rank models by")
    for a, b, points in results:
      if a == b or not 0 <= points <= 2:
        raise ValueError(f"a match of {a!r} against {b!r} with {points} points: two models share 2 points")
    models = tuple(sorted({name for a, b, _ in results for name in (a, b)}))
    index, covariates = {name: i for i, name in enumerate(models)}, covariates or {}
    columns = (np.array([covariates[name] for name in covariates], np.float64).T if covariates else
               np.zeros((len(results), 0)))
    if len(columns) != len(results) or not np.all(np.isfinite(columns)):
      raise ValueError(f"covariates {', '.join(covariates)} must be one finite number for each of "
                       f"{len(results)} matches")
    return cls(models, np.array([index[a] for a, _, _ in results]),
               np.array([index[b] for _, b, _ in results]),
               np.array([points for _, _, points in results], np.float64),
               columns, tuple(covariates))

  def __len__(self) -> int:
    return len(self.points)

  def take(self, indices: np.ndarray) -> "Matches":
    """Some of the matches, in that order, of the same models."""
    return dataclasses.replace(self, first=self.first[indices], second=self.second[indices],
                               points=self.points[indices], covariates=self.covariates[indices])


@dataclasses.dataclass(frozen=True)
class Fit:
  """Maximum-likelihood estimates.

  Attributes:
    strengths: theta. [models]
    coefficients: of the covariates, in logits per unit. [covariates]
  """

  strengths: np.ndarray
  coefficients: np.ndarray

  @property
  def scores(self) -> np.ndarray:
    """`1000 + 400 theta`. [models]"""
    return START + SCALE * self.strengths


def bradley_terry(matches: Matches, *, ridge: float = 0.0, covariate_ridge: float = 0.0) -> Fit:
  """Strengths of largest likelihood, by Newton's method in float64.

    d = ln(10) (theta_A - theta_B) + gamma . x
    maximise  sum over matches of  points log s(d) + (2 - points) log s(-d)
              - ridge / 2 |ln(10) theta|^2 - covariate_ridge / 2 sum over j of gamma_j^2 mean(x_j^2)

  A win counts twice, a draw once for each outcome. There is no constant, so it does not matter which
  model is called A.

  Args:
    matches: at least one.
    ridge: pull to equal strengths; above 0 they are always finite.
    covariate_ridge: the same of the coefficients, whatever the units of covariates.

  Raises:
    ValueError: ridge below 0, or, with ridge=0, votes that no finite strengths fit best: somebody won
      or lost all there is between two sets of models (Ford, 1957), or a covariate decides all votes.
  """
  if ridge < 0:
    raise ValueError(f"ridge={ridge} has to be at least 0")
  if not ridge and (alone := separated(matches)):
    raise ValueError(f"no finite strengths fit these votes: against the others, {_some(alone)} won, or "
                     "lost, every single one; use ridge=0.01, or leave such models out")
  count, extra = len(matches.models), len(matches.names)
  theta = np.zeros(count + extra)
  pull = np.concatenate([np.full(count, ridge), covariate_ridge * np.mean(matches.covariates ** 2, axis=0)])
  value = _loss(matches, theta, pull)
  for _ in range(MOST_STEPS):
    gradient, hessian = _derivatives(matches, theta, pull)
    hessian[:count, :count] += hessian.max() / count  # along (1, ..., 1) nothing changes: stay there
    try:
      step = np.linalg.solve(hessian, gradient)
    except np.linalg.LinAlgError:
      step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
    size = 1.0
    while (moved := _loss(matches, theta - size * step, pull)) > value + 1e-12 * abs(value) and size > 1e-6:
      size /= 2
    theta, value = theta - size * step, moved
    if np.abs(size * step).max() < TOLERANCE * (1 + np.abs(theta).max()):
      break
    if np.abs(_logits(matches, theta)).max() > FURTHEST and not ridge:
      raise ValueError(f"no finite strengths fit these votes: together with the covariates "
                       f"{', '.join(matches.names)} they can be told apart completely; use ridge=0.01")
  strengths = theta[:count] / LN10
  return Fit(strengths - strengths.mean(), theta[count:])


def _logits(matches, theta):
  count = len(matches.models)
  return theta[matches.first] - theta[matches.second] + matches.covariates @ theta[count:]


def _loss(matches, theta, pull):
  d = _logits(matches, theta)
  fit = matches.points @ log_expit(d) + (2 - matches.points) @ log_expit(-d)
  return np.sum(pull * theta ** 2) / 2 - fit


def _derivatives(matches, theta, pull):
  """Gradient and Hessian of the loss, strengths first."""
  count, x = len(matches.models), matches.covariates
  a, b = matches.first, matches.second
  p = expit(_logits(matches, theta))
  error, curve = 2 * p - matches.points, 2 * p * (1 - p)

  def by_model(values):  # sum of +values at A and -values at B
    return np.bincount(a, values, count) - np.bincount(b, values, count)
  gradient = np.concatenate([by_model(error), x.T @ error]) + pull * theta
  between = np.bincount(a * count + b, curve, count * count).reshape(count, count)
  between = between + between.T
  hessian = np.zeros((len(theta), len(theta)))
  hessian[:count, :count] = np.diag(between.sum(axis=1)) - between
  for j in range(x.shape[1]):
    hessian[:count, count + j] = hessian[count + j, :count] = by_model(curve * x[:, j])
  hessian[count:, count:] = x.T @ (curve[:, None] * x)
  hessian += np.diag(pull)
  return gradient, hessian


def separated(matches: Matches) -> tuple[str, ...]:
  """The models of a set that took all points against all others, or none; empty if there is none.

  There is none just if every model can be reached from every other by steps to somebody who took a
  point from it (Ford, 1957).
  """
  count = len(matches.models)
  a, b, points = matches.first, matches.second, matches.points
  losers = np.concatenate([b[points > 0], a[points < 2]])
  takers = np.concatenate([a[points > 0], b[points < 2]])
  graph = sparse.coo_matrix((np.ones(len(losers)), (losers, takers)), (count, count))
  parts, label = csgraph.connected_components(graph, connection="strong")
  if parts == 1:
    return ()
  smallest = np.bincount(label).argmin()
  return tuple(name for name, part in zip(matches.models, label) if part == smallest)


def elo(matches: Matches, *, k: float = 40.0, clip: float = 400.0, reduce: bool = False) -> np.ndarray:
  """Elo's ratings after all matches, in their order. [models]

    E = 1 / (1 + 10^(-d / 400)),   d = rating_A - rating_B in [-clip, clip]
    rating_A += k (points / 2 - E),   rating_B -= the same

  Unlike the maximum of a likelihood, they depend on the order of the matches.

  Args:
    matches: in order of time; their covariates are not used.
    k: largest change of a rating.
    clip: of differences.
    reduce: k / 2 for a model that has had 30 matches, k / 4 for one above 2400.
  """
  ratings = [START] * len(matches.models)
  played = [0] * len(matches.models)

  def step(i):
    if not reduce:
      return k
    return k / 4 if ratings[i] > 2400 else k / 2 if played[i] >= 30 else k
  for a, b, points in zip(matches.first.tolist(), matches.second.tolist(), matches.points.tolist()):
    difference = max(-clip, min(clip, ratings[a] - ratings[b]))
    surprise = points / 2 - 1 / (1 + 10 ** (-difference / SCALE))
    changes = step(a) * surprise, step(b) * surprise
    ratings[a], ratings[b] = ratings[a] + changes[0], ratings[b] - changes[1]
    played[a], played[b] = played[a] + 1, played[b] + 1
  return np.array(ratings)


def ranks(scores: np.ndarray) -> np.ndarray:
  """1 for the best; equal scores share the better rank. [..., models]"""
  return 1 + np.sum(scores[..., None, :] > scores[..., :, None], axis=-1)


def bootstrap(matches: Matches, estimate: Callable[[Matches], Any], *, resamples: int = 100,
              seed: int = 0) -> list[Any]:
  """What an estimate gives on matches drawn with replacement, as many as there are."""
  rng = np.random.default_rng(seed)
  return [estimate(matches.take(rng.integers(0, len(matches), len(matches)))) for _ in range(resamples)]


def ranking(matches: Matches, *, ridge: float = 0.0, resamples: int = 100, seed: int = 0
            ) -> dict[str, Any]:
  """Everything about a set of votes: scores with 95% intervals of score and rank, ratings, counts.

  Args:
    matches: with covariates, if the ranking shall be at equal ones.
    ridge: of strengths and coefficients. Resamples without a finite answer are fitted with 0.001.
    resamples: of the bootstrap.
    seed: of the bootstrap.

  Raises:
    ValueError: as `bradley_terry`.
  """
  fit = bradley_terry(matches, ridge=ridge, covariate_ridge=ridge)
  alone = 0

  def again(drawn):
    nonlocal alone
    try:
      return bradley_terry(drawn, ridge=ridge, covariate_ridge=ridge)
    except ValueError:  # no finite strengths fit these votes
      alone += 1
      return bradley_terry(drawn, ridge=LEAST_RIDGE, covariate_ridge=LEAST_RIDGE)
  fits = bootstrap(matches, again, resamples=resamples, seed=seed)
  scores = np.array([one.scores for one in fits])
  low, median, high = np.percentile(scores, (2.5, 50, 97.5), axis=0)
  best, worst = np.percentile(ranks(scores), (2.5, 97.5), axis=0)
  ratings, place = elo(matches), ranks(fit.scores)
  models = []
  for i in np.lexsort((matches.models, -fit.scores)):
    at_a, at_b = matches.first == i, matches.second == i
    points = np.concatenate([matches.points[at_a], 2 - matches.points[at_b]])
    models.append(dict(
        model=matches.models[i], rank=int(place[i]), rank_interval=[float(best[i]), float(worst[i])],
        score=float(fit.scores[i]), median=float(median[i]), interval=[float(low[i]), float(high[i])],
        elo=float(ratings[i]), matches=len(points), wins=int(np.sum(points > 1)),
        draws=int(np.sum(points == 1)), losses=int(np.sum(points < 1))))
  coefficients = np.array([one.coefficients for one in fits]).reshape(resamples, -1)
  return dict(
      method="Bradley-Terry, maximum likelihood", matches=len(matches),
      draws=int(np.sum(matches.points == 1)), ridge=ridge, resamples=resamples, seed=seed,
      separated_resamples=alone, models=models,
      covariates={name: dict(coefficient=float(fit.coefficients[j]), interval=np.percentile(
          coefficients[:, j], (2.5, 97.5)).tolist()) for j, name in enumerate(matches.names)})


def frugality(models: Sequence[str], kwh: Sequence[float], units: Sequence[float] | None = None
              ) -> dict[str, float]:
  """How much energy models use, in powers of ten around the median of all models.

    log10(sum of kWh / sum of units) - median over models of the same

  Args:
    models: name, for each answer.
    kwh: energy of each answer, above 0 in sum.
    units: of each answer, such as its tokens; None counts each as 1.

  Raises:
    ValueError: a model that used no energy, or made nothing.
  """
  used: dict[str, np.ndarray] = {}
  for name, energy, size in zip(models, kwh, [1.0] * len(models) if units is None else units, strict=True):
    used[name] = used.get(name, np.zeros(2)) + (energy, size)
  for name, (energy, size) in used.items():
    if not (energy > 0 and size > 0):
      raise ValueError(f"frugality: model {name!r} used {energy} kWh for {size} units; both have to be "
                       "above 0")
  logs = {name: float(np.log10(energy / size)) for name, (energy, size) in used.items()}
  middle = float(np.median(list(logs.values())))
  return {name: value - middle for name, value in logs.items()}


def _some(names):
  return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
