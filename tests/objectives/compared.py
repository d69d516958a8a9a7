"""Ragged pairs with what several models say of them, and terms against float64 equations on those."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import compose
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms


def pairs(seed, count=4, models=("reference",), low=-2.0, columns=None):
  """Pairs of 1 to 6 loss tokens behind prompts, in a shuffled order; the second answer is sometimes the
  chosen one. `columns` maps names to a list with a number for each pair."""
  rng = np.random.default_rng(seed)
  found = []
  for group in range(count):
    head, chosen = int(rng.integers(1, 5)), int(rng.integers(2))
    for side in range(2):
      n = int(rng.integers(1, 7))
      signals = {f"{m}_logprobs": rng.uniform(low, 0, head + n) for m in ("old", *models)}
      found.append(Trajectory(
          rng.integers(0, 9, head + n), np.arange(head + n) >= head, group=3 * group, signals=signals,
          columns={"preference": float(side == chosen),
                   **{name: float(values[group]) for name, values in (columns or {}).items()}}))
  return [found[i] for i in rng.permutation(len(found))]


def of(trajectory, model):
  """Log-probabilities at the loss tokens, in float64, as float32 has them."""
  return np.float64(trajectory.signals[f"{model}_logprobs"])[trajectory.loss_mask]


def policy(trajectories):
  return [of(t, "old") for t in trajectories]


def in_pairs(trajectories):
  """Indices of the chosen and the rejected answer of every pair, by group."""
  found = {}
  for i, t in enumerate(trajectories):
    found.setdefault(t.group, [None, None])[0 if t.columns["preference"] > 0.5 else 1] = i
  return {group: tuple(both) for group, both in sorted(found.items())}


def prepared(term, trajectories, memory=None, **packing):
  """The batch with what the term wants of all of it, and the term's memory afterwards."""
  batch = pack(trajectories, **{**dict(row_length=32, together=True), **packing})
  batch = jax.tree.map(jnp.asarray, batch)
  initial = compose.initial_of(term)
  memory = initial() if memory is None and initial else memory
  signals, memory = compose.prepared(term, batch, memory)
  return batch.with_signals(**signals), memory


def value_and_gradient(term, batch, logprobs=None):
  """Mean over pairs, metrics, and the gradient for every token. Off the loss mask all is NaN."""
  weights, means = loss_weights(batch, "sequence_mean"), mean_weights(batch, True)

  def loss(x):
    return sum_of_terms([term])(ModelOutputs(logprobs=x), batch, weights, means)
  x = batch.signals["old_logprobs"] if logprobs is None else logprobs
  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
      jnp.where(batch.loss_mask, x, jnp.nan))
  return float(value), {k: float(v) for k, v in metrics.items()}, np.asarray(gradient)


def equals(term, trajectories, equation, *, rtol=1e-5, step=1e-6, memory=None):
  """Value and gradient of a term are those of `equation(logprobs of each trajectory's loss tokens)`, the
  policy being the old one."""
  batch, _ = prepared(term, trajectories, memory)
  value, metrics, gradient = value_and_gradient(term, batch)
  own = policy(trajectories)
  np.testing.assert_allclose(value, equation(own), rtol=rtol)
  expected = np.zeros(batch.tokens.shape)
  for i, t in enumerate(trajectories):
    places = list(zip(*np.nonzero((np.asarray(batch.sequence_ids) == i) & np.asarray(batch.loss_mask))))
    for k, place in enumerate(places):
      ends = []
      for sign in (1, -1):
        moved = [x.copy() for x in own]
        moved[i][k] += sign * step
        ends.append(equation(moved))
      expected[place] = (ends[0] - ends[1]) / (2 * step)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(gradient, expected, rtol=20 * rtol, atol=2 * rtol * scale + 1e-9)
  return metrics
