"""The critic's loss and the geometric mean of ratios, against float64 loops over sequences."""

import functools

import jax
import numpy as np
import pytest

from jaxrl.objectives import clipped_surrogate, geometric_mean, value_loss
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms


def run(term, batch, outputs, aggregation):
  def loss(outputs):
    return sum_of_terms([term])(outputs, batch, loss_weights(batch, aggregation),
                                mean_weights(batch))[0]
  return jax.value_and_grad(loss)(outputs)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_and_its_gradient(packed, clip):
  for seed in range(3):
    batch, outputs = packed.batch(seed)
    rng = np.random.default_rng(seed)
    old, returns, noise = rng.normal(size=(3, *batch.tokens.shape))
    values = old + 0.3 * noise
    batch = batch.with_signals(old_values=old.astype(np.float32), returns=returns.astype(np.float32))

    def reference(values):
      error = (values - returns) ** 2
      if clip is not None:
        error = np.maximum(error, (np.clip(values, old - clip, old + clip) - returns) ** 2)
      return packed.aggregate(batch, 0.7 / 2 * error, "token_mean")
    term = functools.partial(value_loss, coefficient=0.7, clip=clip)
    loss, gradient = run(term, batch, outputs.replace(values=values.astype(np.float32)), "token_mean")
    packed.close(loss, reference(values))
    expected = packed.finite_differences(reference, values, np.asarray(batch.loss_mask))
    packed.close(np.asarray(gradient.values), expected, rtol=1e-4)


def test_geometric_mean_and_its_gradient(packed):
  for seed in range(3):
    batch, outputs = packed.batch(seed, noise=0.5)

    def reference(logprobs):
      losses = np.zeros(batch.tokens.shape)
      for _, rows, columns in packed.sequences(batch):
        if len(rows):
          advantage = float(batch.signals["advantages"][rows[0], columns[0]])
          sign = np.sign(advantage)
          moved = logprobs[rows, columns] - np.float64(batch.behaviour_logprobs[rows, columns])
          losses[rows, columns] = -advantage * np.exp(np.mean(
              sign * np.minimum(sign * moved, 0.4)))
      return packed.aggregate(batch, losses, "sequence_mean")
    loss, gradient = run(functools.partial(geometric_mean, high=0.4), batch, outputs, "sequence_mean")
    point = np.asarray(outputs.logprobs, np.float64)
    packed.close(loss, reference(point))
    expected = packed.finite_differences(reference, point, np.asarray(batch.loss_mask))
    packed.close(np.asarray(gradient.logprobs), expected, rtol=1e-4)


@pytest.mark.parametrize("difference", [100.0, -1e30, np.inf, -np.inf])
def test_the_geometric_mean_of_hostile_ratios_is_finite(packed, difference):
  batch, outputs = packed.batch(10)
  sequences = np.maximum(batch.sequence_ids, 0)
  advantages = np.array([1.0, 0.0, -1.0])[sequences % 3]  # a group of equal rewards has none
  batch = batch.with_signals(advantages=advantages.astype(np.float32))
  hostile = np.where(batch.tokens % 2 == 0, batch.behaviour_logprobs + difference, outputs.logprobs)
  loss, gradient = run(geometric_mean, batch, outputs.replace(logprobs=hostile.astype(np.float32)),
                       "sequence_mean")
  assert np.isfinite(loss) and np.all(np.isfinite(gradient.logprobs))
  assert not np.any(np.asarray(gradient.logprobs)[advantages == 0])


@pytest.mark.parametrize("settings, message", [
    (dict(high=-0.1), "geometric_mean: high=-0.1 is the largest log-ratio"),
    (dict(anchor="now"), "geometric_mean: anchor='now'; valid are 'behaviour', 'old' and")])
def test_settings_of_the_geometric_mean_that_make_no_sense_are_refused(packed, settings, message):
  batch, outputs = packed.batch(0)
  with pytest.raises(ValueError, match=message):
    geometric_mean(outputs, batch, **settings)


@pytest.mark.parametrize("term", [clipped_surrogate, geometric_mean])
def test_the_old_anchor_replaces_what_the_sampler_said(packed, term):
  batch, outputs = packed.batch(4)
  moved = batch.replace(behaviour_logprobs=np.asarray(batch.behaviour_logprobs) - 1.0)
  moved = moved.with_signals(old_logprobs=np.asarray(batch.behaviour_logprobs))
  plain = run(term, batch, outputs, "sequence_mean")
  anchored = run(functools.partial(term, anchor="old"), moved, outputs, "sequence_mean")
  packed.close(anchored[0], float(plain[0]))
  packed.close(np.asarray(anchored[1].logprobs), np.asarray(plain[1].logprobs))


def test_terms_may_have_their_own_weights(packed):
  batch, outputs = packed.batch(5)
  batch = batch.with_signals(returns=np.ones(batch.tokens.shape, np.float32))
  outputs = outputs.replace(values=np.zeros(batch.tokens.shape, np.float32))
  terms = [clipped_surrogate, functools.partial(value_loss, coefficient=1.0, clip=None)]
  weights = [loss_weights(batch, kind) for kind in ("sequence_sum", "token_mean")]
  both = sum_of_terms(terms)(outputs, batch, weights, mean_weights(batch))[0]
  apart = sum(float(sum_of_terms([t])(outputs, batch, w, mean_weights(batch))[0])
              for t, w in zip(terms, weights))
  packed.close(both, apart)


def test_a_value_that_may_not_move_is_refused(packed):
  batch, outputs = packed.batch(0)
  with pytest.raises(ValueError, match="value_loss: clip=0 has to be above 0"):
    value_loss(outputs, batch, clip=0)
