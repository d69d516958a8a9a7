"""Log-probabilities of given tokens against the plain decoder, gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import sharding
from jaxrl.models import Decoder, DecoderConfig, init_parameters, unbox
from jaxrl.sampling import Likelihood

CONFIG = DecoderConfig(vocab_size=13, layers=2, d_model=16, heads=2, kv_heads=1, d_ff=32)


@pytest.fixture(scope="module")
def params():
  return unbox(init_parameters(CONFIG, jax.random.key(3)))


def random_sequences(seed, lengths):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, CONFIG.vocab_size, n) for n in lengths]


def plainly(params, tokens, temperature=1.0, table=None):
  """log p(token | before) of one sequence in float64, from the decoder's logits."""
  tokens = jnp.asarray(tokens)[None]
  positions = jnp.arange(tokens.shape[1])[None]
  hidden, _ = Decoder(CONFIG).apply(params, tokens, positions, jnp.ones_like(tokens), offset=table)
  logits = np.asarray(hidden[0], np.float64) @ np.asarray(params["params"]["embedding"]).T
  logits = logits.astype(np.float64) / temperature
  logits -= np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)
                   ) + logits.max(-1, keepdims=True)
  return np.array([0.0] + [logits[t - 1, tokens[0, t]] for t in range(1, tokens.shape[1])])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_ragged_sequences(params, temperature):
  sequences = random_sequences(0, [1, 2, 7, 16, 17, 40])
  found = Likelihood(CONFIG, temperature=temperature).logprobs(params["params"], sequences)
  for tokens, logprobs in zip(sequences, found):
    np.testing.assert_allclose(logprobs, plainly(params, tokens, temperature), atol=1e-5)


def test_more_sequences_than_a_call_takes_and_a_mesh(params):
  sequences = random_sequences(1, [5] * 70 + [20] * 3)
  one = Likelihood(CONFIG).logprobs(params["params"], sequences)
  mesh = sharding.make_mesh()
  eight = Likelihood(CONFIG, mesh=mesh).logprobs(params["params"], sequences)
  for tokens, a, b in zip(sequences, one, eight):
    np.testing.assert_allclose(a, b, atol=1e-5)
  np.testing.assert_allclose(one[69], plainly(params, sequences[69]), atol=1e-5)


def test_gradients_are_those_of_finite_differences(params):
  sequences = random_sequences(2, [6, 9])
  masks = [np.arange(6) >= 4, np.array([0, 0, 1, 0, 1, 1, 0, 0, 0], bool)]
  found = Likelihood(CONFIG).embedding_gradients(params["params"], sequences, masks)
  rng = np.random.default_rng(0)
  for tokens, mask, gradient in zip(sequences, masks, found):
    assert gradient.shape == (len(tokens), CONFIG.d_model)
    direction = rng.normal(size=gradient.shape).astype(np.float32)
    step = 1e-2

    def at(scale):
      return plainly(params, tokens, table=jnp.asarray(scale * direction)[None])[mask].sum()
    slope = (at(step) - at(-step)) / (2 * step)
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=2e-2, atol=2e-3)
    # Nothing behind the last token that is asked about can matter, nor that token itself.
    assert not gradient[np.flatnonzero(mask).max():].any()
    assert np.abs(gradient[:np.flatnonzero(mask).min()]).sum() > 0


def test_bad_sequences_are_named(params):
  asked = Likelihood(CONFIG)
  with pytest.raises(ValueError, match="sequence 1 .*token ids below 13"):
    asked.logprobs(params["params"], [[1], [13]])
  with pytest.raises(ValueError, match="sequence 0 .*at least one"):
    asked.logprobs(params["params"], [[]])
  with pytest.raises(ValueError, match="mask the shape"):
    asked.embedding_gradients(params["params"], [[1, 2]], [[True]])
