"""Random packed batches, and float64 references that loop over their sequences."""

import types

import jax
import numpy as np
import pytest

from jaxrl.batch import ModelOutputs, Trajectory, pack

ROWS, LENGTH, SEQUENCES = 8, 16, 8


def random_batch(seed, *, noise=0.3, lengths=None, scored=0.85, **packing):
  """A ragged batch of [8, 16] tokens and outputs of a model that has moved a little since.

  Off the loss mask log-probabilities are arbitrary, as a model's are on prompts.
  """
  rng = np.random.default_rng(seed)
  if lengths is None:
    lengths = rng.integers(0, 13, rng.integers(3, SEQUENCES + 1))
  trajectories = []
  for length in lengths:
    mask = np.arange(length) >= max(1, rng.integers(0, 4))
    mask &= rng.random(length) < 0.9
    behaviour = np.where(mask, -rng.exponential(1.0, length), 0)
    current = -rng.exponential(2.0, length)
    trajectories.append(Trajectory(
        tokens=rng.integers(0, 9, length), loss_mask=mask, behaviour_logprobs=behaviour,
        group=int(rng.integers(0, 3)), reward=rng.normal(), scored=bool(rng.random() < scored),
        weight=rng.uniform(0.5, 2.0), signals={
            "advantages": np.full(length, rng.normal()),
            "reference_logprobs": behaviour + noise * rng.normal(size=length),
            "logprobs": np.where(mask, behaviour + noise * rng.normal(size=length), current),
            "entropy": rng.exponential(1.0, length)}))
  batch = pack(trajectories, **(packing or dict(row_length=LENGTH, min_rows=ROWS,
                                                min_sequences=SEQUENCES)))
  signals = dict(batch.signals)
  outputs = ModelOutputs(logprobs=signals.pop("logprobs"), entropy=signals.pop("entropy"))
  return batch.replace(signals=signals), outputs


def sequences(batch):
  """(index, rows, columns) of the loss tokens of each scored sequence."""
  for i in np.nonzero(batch.sequence_mask)[0]:
    yield (i, *np.nonzero((batch.sequence_ids == i) & batch.loss_mask))


def aggregate(batch, losses, aggregation, constant=None):
  """The four aggregations as nested loops in float64; `losses[rows, length]`."""
  scored = list(sequences(batch))
  tokens = sum(len(rows) for _, rows, _ in scored)
  total = 0.0
  for i, rows, columns in scored:
    for r, c in zip(rows, columns):
      share = {"token_mean": 1 / max(tokens, 1), "sequence_mean": 1 / (len(rows) * len(scored)),
               "sequence_sum": 1 / len(scored), "constant": 1 / len(scored) / (constant or 1)}
      total += float(batch.weights[i]) * share[aggregation] * float(losses[r, c])
  return total


def finite_differences(function, point, mask, step=1e-5):
  """Gradient of a float64 function at the masked entries of `point`, 0 elsewhere."""
  gradient = np.zeros(point.shape)
  for index in zip(*np.nonzero(mask)):
    ends = []
    for sign in (1, -1):
      moved = np.array(point, np.float64)
      moved[index] += sign * step
      ends.append(function(moved))
    gradient[index] = (ends[0] - ends[1]) / (2 * step)
  return gradient


def close(result, expected, rtol=1e-5):
  """Equal relative to the largest entry, as float32 sums are."""
  assert np.all(np.isfinite(result))
  atol = rtol * np.max(np.abs(expected)) + 1e-9
  np.testing.assert_allclose(result, expected, rtol=rtol, atol=atol)


def rows_of(tree, batch, rows):
  """The same rows of every per-token array of a tree."""
  return jax.tree.map(lambda x: x[rows] if x.shape[:2] == batch.tokens.shape else x, tree)


@pytest.fixture(scope="session")
def packed():
  return types.SimpleNamespace(batch=random_batch, sequences=sequences, aggregate=aggregate,
                               finite_differences=finite_differences, close=close, rows_of=rows_of)
