"""Constraints that keep a reward model fair to groups: a term to be added to any loss of scores.

Pairs are those of `jaxrl.objectives.preference`. A column says which answer of a pair is y1, and another
to which sensitive group the pair belongs; s = s(r(y1) - r(y2)) is the predicted preference.
"""

import jax
import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.batch import column_of, sum_by_group, to_tokens
from jaxrl.compose import carries, nearest, needs, of_pairs, prepares, ranges
from jaxrl.objectives.aggregate import TermOutput
from jaxrl.objectives.pairs import check_numbers, constant_of, in_pairs, loss_of_pairs, of_other
from jaxrl.objectives.pairs import preferences
from jaxrl.objectives.reward_model import sequence_scores

NOTIONS = ("parity", "odds", "counterfactual")
MOST_GROUPS, MOST_CELLS = 16, 16  # sizes of what is remembered


def _start():
  cells = (MOST_GROUPS, MOST_CELLS)
  return {"multipliers": jnp.zeros(cells), "pairs": jnp.zeros(cells), "soft": jnp.zeros(cells),
          "hard": jnp.zeros(cells)}


def _prepare(batch, memory, *, head, notion, group, first, given, levels, tolerance, rate, most, decay,
             dual):
  """Moves the multipliers, and says how hard each pair is pulled and by how much rates differ."""
  _check(notion, dual, tolerance, rate, most, decay)
  score = sequence_scores(ModelOutputs(scores=batch.signals["old_scores"]), batch, head)
  is_first = _first(batch, first)
  difference = score - of_other(batch, score)  # at y1: r(y1) - r(y2)
  soft, hard = jax.nn.sigmoid(difference), (difference > 0) + 0.5 * (difference == 0)
  if notion == "counterfactual":
    return _pull_together(batch, memory, soft, hard, group, is_first, tolerance, rate, most, decay, dual)
  cell = jnp.zeros_like(score, jnp.int32)
  if notion == "odds":
    cell = (preferences(batch) > 0.5).astype(jnp.int32)
  if given is not None:
    cell = cell * levels + column_of(batch, given, "fairness").astype(jnp.int32)
  members = (jax.nn.one_hot(column_of(batch, group, "fairness").astype(jnp.int32), MOST_GROUPS)[:, :, None]
             * jax.nn.one_hot(cell, MOST_CELLS)[:, None] * is_first[:, None, None])  # [seq, K, C]

  def per_cell(values):
    return jnp.einsum("skc,s->kc", members, values)
  count = per_cell(jnp.ones_like(score))
  sums = {"pairs": count, "soft": per_cell(soft), "hard": per_cell(hard)}
  memory = memory | {name: decay * memory[name] + x for name, x in sums.items()}
  gaps = {name: _gaps(memory[name], memory["pairs"]) for name in ("soft", "hard")}
  violation = jnp.abs(gaps["soft" if dual == "proxy" else "hard"])
  known = memory["pairs"] > 0
  push = jnp.where(known, memory["multipliers"] * jnp.sign(gaps["soft"]), 0)  # [K, C]
  # d/ds of sum over k, c of push (mean(s | k, c) - mean(s | c)), times the pairs.
  slope = _over(push, count) - _over(push.sum(0), count.sum(0))
  pull = jnp.einsum("skc,kc->s", members, slope) * jnp.sum(is_first)
  memory["multipliers"] = jnp.where(
      known, jnp.clip(memory["multipliers"] + rate * (violation - tolerance), 0, most), 0)
  worst = {name: jnp.max(jnp.abs(gap)) for name, gap in gaps.items()}
  return _signals(batch, pull, worst, memory), memory


def _pull_together(batch, memory, soft, hard, group, is_first, tolerance, rate, most, decay, dual):
  """The same for pairs and their twins, which are those of equal number."""
  number = column_of(batch, group, "fairness")
  index = jnp.arange(len(number))
  twins = ((number[:, None] == number) & is_first[:, None] & is_first
           & (index[:, None] != index)).astype(soft.dtype)
  has = jnp.sum(twins, axis=1) > 0
  there = {name: jnp.where(has, x - (twins @ x) / jnp.maximum(jnp.sum(twins, 1), 1), 0)
           for name, x in (("soft", soft), ("hard", hard))}
  count = jnp.sum(has)
  for name, sum_ in (("pairs", count), *((n, jnp.sum(jnp.abs(x))) for n, x in there.items())):
    memory = memory | {name: memory[name].at[0, 0].set(decay * memory[name][0, 0] + sum_)}
  worst = {name: _over(memory[name][0, 0], memory["pairs"][0, 0]) for name in there}
  multiplier = memory["multipliers"][0, 0]
  # Each of two twins is compared with the other, so each passes half of the gradient twice.
  pull = multiplier * 2 * jnp.sign(there["soft"]) * _over(jnp.sum(is_first), count)
  violation = worst["soft" if dual == "proxy" else "hard"]
  memory["multipliers"] = memory["multipliers"].at[0, 0].set(
      jnp.clip(multiplier + rate * (violation - tolerance), 0, most))
  return _signals(batch, pull, worst, memory), memory


@carries(_start)
@prepares(_prepare)
@of_pairs
@ranges(lambda notion, group, first, given, levels: {
    first: (0, 1)} | ({} if notion == "counterfactual" else {group: (0, MOST_GROUPS - 1)})
        | ({given: (0, levels - 1)} if given else {}))
@needs("scores", "old_scores")
def fairness(outputs: ModelOutputs, batch: TokenBatch, *, head: int = 0, notion: str = "parity",
             group: str = "group", first: str = "first", given: str | None = None, levels: int = 1,
             tolerance: float = 0.02, rate: float = 0.05, most: float = 10.0, decay: float = 0.95,
             dual: str = "true") -> TermOutput:
  """What unequal treatment of groups costs a reward model (Faro, arXiv:2602.07799; proxy-Lagrangian).

    parity          v_k = |mean(s | g = k) - mean(s)|
    odds            v_kz = |mean(s | g = k, z) - mean(s | z)|,  z = [preference(y1) > 1/2]
    counterfactual  v = mean |s - s of the same pair with the attribute exchanged|
    loss = sum over k of L_k (v_k - tolerance)           of s, so that there is a gradient
    L_k <- clip(L_k + rate (v_k - tolerance), 0, most)   of [r(y1) > r(y2)], the rates that count

  Means are over all pairs so far, each batch counting `decay` times as much as the next, for a batch
  may lack a group; the gradient is that of the means of the batch, whatever its micro-batches.
  Multipliers and means are part of checkpoints. The loss leaves out the constant L_k tolerance.

  Args:
    outputs: supplies `scores`.
    batch: supplies `columns["preference"]` and the columns below.
    head: that scores.
    notion: one of `NOTIONS`.
    group: column with the group of a pair, 0 to 15, equal in both answers; for "counterfactual" one
      with a number that a pair and its twin share, which are compared if both are in the batch.
    first: column that is 1 at y1 and 0 at y2.
    given: column with the level, 0 to levels - 1, of a feature that may matter: means are compared
      at equal levels only. None for none.
    levels: of `given`; 16 cells at most, of levels and z.
    tolerance, rate, most: of the constraints and their multipliers.
    decay: of the running means, below 1.
    dual: "true", or "proxy" for the plain Lagrangian, in which multipliers see s as well.

  Returns:
    Loss per token; metrics by sequence `violation` (the largest, of [r(y1) > r(y2)]),
    `soft_violation` (of s) and `multiplier` (the largest).

  Raises:
    ValueError: no such head or column, or settings out of range.
  """
  if not 1 <= levels * (2 if notion == "odds" else 1) <= MOST_CELLS:
    raise ValueError(f"fairness: levels={levels} with notion={notion!r} must make 1 to {MOST_CELLS} cells")
  score = sequence_scores(outputs, batch, head)
  s = jax.nn.sigmoid(score - of_other(batch, score))
  is_first = _first(batch, first)
  values = sum_by_group(batch, jnp.where(is_first, constant_of(batch, "fairness_pull") * s, 0))
  return loss_of_pairs(batch, values), {
      name: batch.signals[f"fairness_{name}"] for name in ("violation", "soft_violation", "multiplier")}


def _first(batch, name):
  """Sequences that are the y1 of a pair."""
  return in_pairs(batch) & (column_of(batch, name, "fairness") > 0.5)


def _gaps(sums, counts):
  """Means of groups minus those of all groups, where there is something. [K, C]"""
  return jnp.where(counts > 0, _over(sums, counts) - _over(sums.sum(0), counts.sum(0)), 0)


def _over(total, count):
  return total / jnp.maximum(count, 1e-12) * (count > 0)


def _signals(batch, pull, worst, memory):
  everywhere = {"violation": worst["hard"], "soft_violation": worst["soft"],
                "multiplier": jnp.max(memory["multipliers"])}
  own = {f"fairness_{name}": jnp.where(batch.segment_ids != 0, x, 0) for name, x in everywhere.items()}
  return own | {"fairness_pull": to_tokens(batch, pull)}


def _check(notion, dual, tolerance, rate, most, decay):
  for name, value, valid in (("notion", notion, NOTIONS), ("dual", dual, ("true", "proxy"))):
    if value not in valid:
      raise ValueError(f"fairness: {name}={value!r}{nearest(value, valid)}")
  check_numbers("fairness", above_0=dict(most=most), at_least_0=dict(
      tolerance=tolerance, rate=rate, decay=decay))
  if isinstance(decay, int | float) and decay >= 1:
    raise ValueError(f"fairness: decay={decay} must be below 1")
