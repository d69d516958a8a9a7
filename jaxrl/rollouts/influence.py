"""Rewards for answers that follow from their rationale, as the gradients of a model tell.

A completion is a rationale X and an answer Y behind a prompt Z. How much the embeddings of one part
move the log-probability of another says how strongly that part speaks to it.
"""

import asyncio
from collections.abc import Sequence
import math
import re

import numpy as np

from jaxrl import compose
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rewards import ok
from jaxrl.rollouts.context import EpisodeContext

CHANNELS = ("zx", "xy", "zy")
UNITS = ("word", "token")
TINY = 1e-30  # a squared norm below this is no direction


@compose.needs("reference")
async def influence_rewarded(ctx: EpisodeContext, task: Task, *, samples: int, answer: str,
                             draws: int = 4, power: float = 0.2,
                             weights: Sequence[float] = (0.7, 0.1, 0.1, 0.1), unit: str = "word",
                             separator: str = "", floor: float = 0.005, hardened: bool = True
                             ) -> list[Trajectory]:
  """A group whose rewards mix correctness with prompt -> rationale -> answer influence (CE-PO,
  arXiv:2509.23095).

  Over the text Z, X, Y with input embeddings E, and under the frozen reference:

    J_ZX = d log p(X) / d E[Z],    J_XY = d log p(Y) / d E[X],    J_ZY = `direct_effect`

  Each is hardened: what remains of it beside its mean over texts with a shuffled cause (Z for ZX and
  ZY, X for XY). Its `channel_score` is in [floor, 1], and with acc the reward of the sample

    R = power_mean((acc, s_ZX, s_XY, s_ZY), weights, power)

  A sample without an answer, a rationale or a prompt token has nothing that influences or is
  influenced: its channels are at the floor.

  Args:
    ctx: serves samples, scores, and gradients of the reference.
    task: the problem.
    samples: of the group.
    answer: regular expression with one group; its last match in a completion is Y, and all before
      it X.
    draws: K, shuffled texts of each kind.
    power: p of the mean; 0 is the geometric mean, below it weak channels count more.
    weights: of acc, ZX, XY and ZY.
    unit: what is shuffled: "word", with its whitespace normalised, or "token".
    separator: text between Z, X and Y, such as the tokenizer's EOS.
    floor: least channel score.
    hardened: False leaves the counterfactuals out, a control that is easy to game.

  Returns:
    The samples with rewards R, and `influence_zx`, `influence_xy`, `influence_zy` in their evidence.

  Raises:
    ValueError: settings that mean nothing, or a reward outside [0, 1].
  """
  _check(answer, draws, weights, unit, floor)
  group = await ctx.sample(task.prompt, n=samples, train=True)
  await ctx.score(task, group)
  measured = await asyncio.gather(*[
      _channels(ctx, task, t, number, answer, draws if hardened else 0, unit, separator, floor)
      for number, t in enumerate(group)])
  for t, found in zip(group, measured):
    t.evidence |= {f"influence_{name}": ok(s) for name, s in zip(CHANNELS, found)}
    if not t.scored:
      continue
    if not 0 <= t.reward <= 1:
      raise ValueError(f"influence_rewarded: a sample of task {task.id!r} has the reward {t.reward}; "
                       "the mean takes degrees of correctness from 0 to 1: change config.reward")
    t.reward = power_mean((t.reward, *found), weights, power)
  return group


async def _channels(ctx, task, t, number, answer, draws, unit, separator, floor):
  """Scores of the three channels of a sample. [3]"""
  parts = _parts(ctx, t, answer)
  if parts is None or not t.scored:
    return (floor,) * 3
  z, (x, y), gap = list(task.prompt), parts, ctx.encode(separator) if separator else []

  async def jacobian(z, x, of_y, to_z):
    """Gradient of log p(Y), else of log p(X), with respect to Z, else to X. [tokens, d_model]"""
    tokens = [*z, *gap, *x, *gap, *y]
    start = len(z) + len(gap)
    about = range(start + len(x) + len(gap), len(tokens)) if of_y else range(start, start + len(x))
    found = np.float64(await ctx.embedding_gradients(tokens, np.isin(np.arange(len(tokens)), about)))
    return found[:len(z)] if to_z else found[start:start + len(x)]

  rng = ctx.rng(number)
  other_z = [_shuffled(ctx, z, unit, rng) for _ in range(draws)]
  other_x = [_shuffled(ctx, x, unit, rng) for _ in range(draws)]
  asked = [jacobian(z, x, False, True), jacobian(z, x, True, False), jacobian(z, x, True, True),
           *[jacobian(z, s, True, False) for s in other_x]]
  for s in other_z:
    asked += [jacobian(s, x, False, True), jacobian(s, x, True, True), jacobian(s, x, True, False)]
  zx, xy, zy, *others = await asyncio.gather(*asked)
  causes = (zx, xy, direct_effect(zx, zy, xy))
  if not draws:
    return tuple(channel_score(j, j, floor) for j in causes)
  by_x, by_z = others[:draws], [others[i:i + 3] for i in range(draws, len(others), 3)]
  means = (_mean_like(zx, [a for a, _, _ in by_z]), _mean_like(xy, by_x),
           _mean_like(zy, [direct_effect(a, b, c) for a, b, c in by_z]))
  return tuple(channel_score(j, residual(j, mean), floor) for j, mean in zip(causes, means))


def direct_effect(zx: np.ndarray, zy: np.ndarray, xy: np.ndarray) -> np.ndarray:
  """What of the influence of Z on Y does not go through X. [prompt tokens, d_model]

    u = mean over rows of J_XY / |row|,    v = vec(J_ZX * u),    w - (w . v / v . v) v,   w = vec(J_ZY)

  Args:
    zx, zy: gradients of log p(X) and of log p(Y) with respect to Z. [prompt tokens, d_model]
    xy: gradient of log p(Y) with respect to X. [rationale tokens, d_model]
  """
  norms = np.linalg.norm(xy, axis=1, keepdims=True)
  u = np.mean(np.divide(xy, norms, out=np.zeros_like(xy), where=norms > 0), axis=0)
  return residual(zy, zx * u)


def residual(jacobian: np.ndarray, mean: np.ndarray) -> np.ndarray:
  """A Jacobian without its part along another: J - (<J, M> / <M, M>) M."""
  square = np.vdot(mean, mean)
  return jacobian - np.vdot(jacobian, mean) / square * mean if square > TINY else jacobian


def channel_score(jacobian: np.ndarray, left: np.ndarray, floor: float = 0.005) -> float:
  """floor + (1 - floor) * sqrt(shape * magnitude), in [floor, 1].

    shape = s_1^2 / sum_i s_i^2 of what is left,    magnitude = |left|^2 / |J|^2

  A Jacobian of nothing but zeros, or of which nothing is left, scores the floor.
  """
  whole, remaining = np.vdot(jacobian, jacobian), np.vdot(left, left)
  if whole <= TINY or remaining <= TINY:
    return floor
  shape = np.linalg.norm(left, ord=2) ** 2 / remaining
  return float(floor + (1 - floor) * math.sqrt(min(1.0, shape * remaining / whole)))


def power_mean(values: Sequence[float], weights: Sequence[float], power: float) -> float:
  """(sum_k w_k s_k^p)^(1/p), with weights that are scaled to sum to 1.

  p = 0 is the geometric mean, p = -inf the minimum and p = inf the maximum, of what has weight. A
  value of 0 makes the mean 0 for p <= 0.
  """
  pairs = [(float(s), w / sum(weights)) for s, w in zip(values, weights, strict=True) if w]
  if math.isinf(power):
    return (max if power > 0 else min)(s for s, _ in pairs)
  if power <= 0 and any(s == 0 for s, _ in pairs):
    return 0.0
  if power == 0:
    return math.exp(sum(w * math.log(s) for s, w in pairs))
  top = (max if power > 0 else min)(s for s, _ in pairs)  # which no power takes out of range
  return top and top * sum(w * (s / top) ** power for s, w in pairs) ** (1 / power)


def _parts(ctx, t, answer):
  """Tokens of rationale and answer, None if one of them is empty."""
  matches = list(re.finditer(answer, t.text))
  if not matches or matches[-1][1] is None:
    return None
  completion = t.tokens[t.prompt_length:].tolist()
  start, end = (_tokens_within(ctx, completion, place) for place in matches[-1].span(1))
  parts = completion[:start], completion[start:end]
  return parts if all(parts) else None


def _tokens_within(ctx, tokens, characters):
  """Number of first tokens whose text has at most so many characters."""
  low, high = 0, len(tokens)
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if len(ctx.decode(tokens[:middle])) <= characters else (
        low, middle - 1)
  return low


def _shuffled(ctx, tokens, unit, rng):
  """The tokens of a text in random order, or those of its words."""
  if unit == "token":
    return [tokens[i] for i in rng.permutation(len(tokens))]
  words = ctx.decode(tokens).split()
  return ctx.encode(" ".join(words[i] for i in rng.permutation(len(words)))) or tokens


def _mean_like(base, others):
  """Mean of Jacobians that are first cut, or filled up with zeros, to the rows of another."""
  fitted = [np.concatenate([j[:len(base)], np.zeros((max(0, len(base) - len(j)), base.shape[1]))])
            for j in others]
  return np.mean(fitted, axis=0)


def _check(answer, draws, weights, unit, floor):
  try:
    groups = re.compile(answer).groups
  except re.error as error:
    raise ValueError(f"influence_rewarded: answer={answer!r} is no regular expression: {error}"
                     ) from error
  if groups != 1:
    raise ValueError(f"influence_rewarded: answer={answer!r} has {groups} groups; it needs one, "
                     "around the final answer")
  if unit not in UNITS:
    raise ValueError(f"influence_rewarded: unit={unit!r}; valid are 'word' and 'token'")
  if draws < 1:
    raise ValueError(f"influence_rewarded: draws={draws}; use at least 1, or hardened=False")
  if len(weights) != 4 or min(weights) < 0 or not 0 < sum(weights) < math.inf:
    raise ValueError(f"influence_rewarded: weights={tuple(weights)}; they are four, of accuracy, ZX, "
                     "XY and ZY, none below 0 and not all 0")
  if not 0 <= floor < 1:
    raise ValueError(f"influence_rewarded: floor={floor} must be at least 0 and below 1")
