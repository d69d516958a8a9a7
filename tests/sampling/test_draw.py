"""Drawing a token from logits."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
import torch
import transformers

from jaxrl.sampling import draw

draw_tokens = jax.jit(draw.draw_tokens)
JUST_BELOW_ONE = np.float32(1 - 2 ** -24)


def distribution(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
  def full(value, dtype):
    return jnp.full(rows, value, dtype)
  return draw.Distribution(full(temperature, jnp.float32), full(top_k, jnp.int32),
                           full(top_p, jnp.float32), full(min_p, jnp.float32))


def kept_by_transformers(logits, temperature, top_k, top_p, min_p):
  """Which tokens survive the processors of `transformers`, in the order of `generate`."""
  scores = transformers.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
  if top_k:
    scores = transformers.TopKLogitsWarper(top_k)(None, scores)
  if top_p < 1:
    scores = transformers.TopPLogitsWarper(top_p)(None, scores)
  if min_p:
    scores = transformers.MinPLogitsWarper(min_p)(None, scores)
  return torch.isfinite(scores).numpy()


@jax.jit
def kept_by_us(logits, how):
  scaled = logits / how.temperature[:, None]
  return scaled >= draw.truncation(scaled, jnp.max(scaled, axis=-1), how)[:, None]


@settings(max_examples=25, deadline=None)
@given(logits=hnp.arrays(np.float32, (3, 11), elements=st.floats(-8, 8, width=16), unique=True),
       temperature=st.sampled_from([0.5, 1.0, 1.7]), top_k=st.integers(0, 14),
       top_p=st.floats(0.05, 1.0), min_p=st.floats(0.0, 0.9))
def test_truncation_keeps_the_tokens_that_transformers_keeps(logits, temperature, top_k, top_p,
                                                             min_p):
  theirs = kept_by_transformers(logits, temperature, top_k, top_p, min_p)
  ours = np.asarray(kept_by_us(logits, distribution(3, temperature, top_k, top_p, min_p)))
  # A token whose neighbours' mass equals the limit may fall on either side of it by rounding.
  near = [kept_by_transformers(logits, temperature, top_k, min(top_p + e, 1.0), max(min_p + e, 0))
          for e in (-1e-5, 1e-5)]
  np.testing.assert_array_equal(ours[near[0] == near[1]], theirs[near[0] == near[1]])
  assert ours.any(axis=-1).all()


def test_truncation_orders_negative_zero_and_positive_logits():
  logits = np.array([[-3.0, 2.0, -1.0, 0.0, -2.0, 1.0]], np.float32)
  for k in range(1, 7):
    kept = np.asarray(kept_by_us(logits, distribution(1, top_k=k)))[0]
    assert set(np.flatnonzero(kept)) == set(np.argsort(-logits[0])[:k])


@pytest.mark.parametrize("how", [dict(), dict(temperature=0.6), dict(top_k=3), dict(top_p=0.7),
                                 dict(min_p=0.3), dict(top_k=5, top_p=0.8, min_p=0.1)])
def test_frequencies_match_the_truncated_softmax(how):
  logits = np.array([1.3, -0.5, 0.2, 2.0, -3.0, 1.1, 0.0], np.float32)
  rows = 20_000
  uniform = np.random.default_rng(3).random(rows, np.float32)
  tokens, _ = draw_tokens(np.tile(logits, (rows, 1)), uniform, distribution(rows, **how))
  scaled = logits.astype(np.float64) / how.get("temperature", 1.0)
  kept = kept_by_transformers(logits[None], **(dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
                                               | how))[0]
  probabilities = special.softmax(np.where(kept, scaled, -np.inf))
  counts = np.bincount(tokens, minlength=len(logits))
  assert counts[~kept].sum() == 0
  if kept.sum() > 1:
    assert stats.chisquare(counts[kept], rows * probabilities[kept]).pvalue > 1e-3


def test_large_vocabulary_is_looked_up_in_the_cumulative_distribution():
  rng = np.random.default_rng(0)
  rows, vocab = 64, 50_257  # not a multiple of the block
  logits = (3 * rng.normal(size=(rows, vocab))).astype(np.float32)
  uniform = rng.random(rows, np.float32)
  tokens, logprobs = map(np.asarray, draw_tokens(logits, uniform, distribution(rows)))
  reference = special.log_softmax(logits.astype(np.float64), axis=-1)
  upper = np.cumsum(np.exp(reference), axis=-1)[np.arange(rows), tokens]
  lower = upper - np.exp(reference[np.arange(rows), tokens])
  assert (lower - 1e-5 <= uniform).all() and (uniform <= upper + 1e-5).all()
  np.testing.assert_allclose(logprobs, reference[np.arange(rows), tokens], atol=2e-5)


@pytest.mark.parametrize("vocab", [2, 5, 64, 3001])
def test_impossible_tokens_are_never_drawn_even_at_the_ends(vocab):
  rng = np.random.default_rng(vocab)
  logits = np.where(rng.random((40, vocab)) < 0.8, -200.0, rng.normal(size=(40, vocab)))
  logits[np.arange(40), rng.integers(0, vocab, 40)] = 1.0
  uniform = np.tile(np.array([0.0, JUST_BELOW_ONE], np.float32), 20)
  tokens, logprobs = draw_tokens(logits.astype(np.float32), uniform, distribution(40))
  assert (logits[np.arange(40), tokens] > -100).all() and np.isfinite(logprobs).all()


def test_temperature_zero_takes_the_lowest_of_the_best_whatever_the_truncation():
  logits = np.array([[0.5, 2.0, -1.0, 2.0], [3.0, 0.0, 3.0, 3.0]], np.float32)
  tokens, logprobs = draw_tokens(logits, np.full(2, JUST_BELOW_ONE),
                                 distribution(2, temperature=0.0, top_k=3, top_p=0.9, min_p=0.1))
  np.testing.assert_array_equal(tokens, [1, 0])
  np.testing.assert_allclose(logprobs, special.log_softmax(logits, axis=-1)[[0, 1], [1, 0]],
                             rtol=1e-6)


def test_logprobs_ignore_truncation_but_not_temperature():
  logits = np.array([[1.0, 0.0, -1.0, 0.3]], np.float32).repeat(50, axis=0)
  uniform = np.random.default_rng(1).random(50, np.float32)
  how = distribution(50, temperature=0.5, top_k=2, top_p=0.95, min_p=0.01)
  tokens, logprobs = map(np.asarray, draw_tokens(logits, uniform, how))
  assert set(tokens) == {0, 3}
  expected = special.log_softmax(logits[0].astype(np.float64) / 0.5)[tokens]
  np.testing.assert_allclose(logprobs, expected, atol=1e-6)


def test_each_row_has_its_own_settings():
  logits = np.array([[0.0, 1.0, 0.9]], np.float32).repeat(3, axis=0)
  how = draw.Distribution(jnp.array([0.0, 1.0, 1.0]), jnp.array([0, 2, 0]),
                          jnp.array([1.0, 1.0, 1.0]), jnp.array([0.0, 0.0, 0.0]))
  tokens, _ = draw_tokens(logits, np.zeros(3, np.float32), how)
  np.testing.assert_array_equal(tokens, [1, 1, 0])
