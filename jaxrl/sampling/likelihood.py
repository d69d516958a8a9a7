"""What a model says of given tokens: their log-probabilities, and how these depend on the input."""

from collections.abc import Sequence
import contextlib
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from jaxrl import sharding
from jaxrl.batch import bucket
from jaxrl.models.decoder import Decoder, DecoderConfig
from jaxrl.models.logprobs import token_logprobs
from jaxrl.models.outputs import scores_at

SHORTEST = 16  # sequences are padded to powers of two from here
ROWS = 64  # sequences computed together, at most
VOCABULARY_CHUNK = 4096


class Likelihood:
  """Reads sequences that somebody else wrote. Each is a row of its own; compiled once per bucket."""

  def __init__(self, config: DecoderConfig, *, mesh: Mesh | None = None, temperature: float = 1.0):
    """
    Args:
      config: of the model.
      mesh: None, or one of `sharding.make_mesh`; sequences are distributed over `data` and `fsdp`.
      temperature: of the distribution that is meant.
    """
    self._config, self._mesh, self._temperature = config, mesh, temperature

  def at(self, temperature: float) -> "Likelihood":
    """The same at another temperature, without another program."""
    return Likelihood(self._config, mesh=self._mesh, temperature=temperature)

  def logprobs(self, params, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Log-probability of every token given those before it, 0 for the first. [length] each, nats

    Args:
      params: of `Decoder(config)`.
      sequences: token ids.
    """
    return self._ask(_logprobs, params, sequences, [np.ones(len(s), bool) for s in sequences])

  def scores(self, params, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """What all heads but `value`, and the verdict, say at every token. [length, heads] each, float32

    Args:
      params: of `Decoder(config)`.
      sequences: token ids.
    """
    return self._ask(_scores, params, sequences, [np.ones(len(s), bool) for s in sequences])

  def embedding_gradients(self, params, sequences: Sequence[Sequence[int]],
                          masks: Sequence[Sequence[bool]]) -> list[np.ndarray]:
    """d (sum of the log-probabilities of masked tokens) / d (what enters the first layer).

    Args:
      params: of `Decoder(config)`.
      sequences: token ids.
      masks: tokens whose log-probabilities are summed. [length] each

    Returns:
      A row per token: how its embedding moves the sum, through attention; 0 behind the last masked
      token. [length, d_model] each
    """
    return self._ask(_embedding_gradients, params, sequences, masks)

  def _ask(self, function, params, sequences, masks):
    for i, (tokens, mask) in enumerate(zip(sequences, masks, strict=True)):
      self._check(i, np.asarray(tokens), np.asarray(mask))
    answers = [None] * len(sequences)
    parts = self._mesh.shape["data"] * self._mesh.shape["fsdp"] if self._mesh else 1
    by_length: dict[int, list[int]] = {}
    for i, tokens in enumerate(sequences):
      by_length.setdefault(bucket(len(tokens), SHORTEST), []).append(i)
    for length, members in sorted(by_length.items()):
      for first in range(0, len(members), ROWS):
        some = members[first:first + ROWS]
        rows = math.ceil(bucket(len(some)) / parts) * parts
        ids, wanted = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        segments = np.zeros((rows, length), np.int32)
        for row, i in enumerate(some):
          count = len(sequences[i])
          ids[row, :count], wanted[row, :count], segments[row, :count] = sequences[i], masks[i], 1
        with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
          found = sharding.to_host(function(
              {"params": params}, *map(self._put, (ids, segments, wanted)), config=self._config,
              temperature=np.float32(self._temperature)))
        for row, i in enumerate(some):
          answers[i] = np.asarray(found[row, :len(sequences[i])])
    return answers

  def _check(self, i, tokens, mask):
    vocab = self._config.vocab_size
    if tokens.ndim != 1 or not len(tokens) or tokens.min() < 0 or tokens.max() >= vocab:
      raise ValueError(f"sequence {i} must be a list of token ids below {vocab}, at least one; it is "
                       f"{tokens[:8]}")
    if mask.shape != tokens.shape:
      raise ValueError(f"sequence {i} has {len(tokens)} tokens, but its mask the shape {mask.shape}")

  def _put(self, x):
    if self._mesh is None:
      return x
    by_row = jax.NamedSharding(self._mesh, sharding.partition_spec(("rows",)))
    return jax.make_array_from_callback(x.shape, by_row, lambda index: x[index])


@functools.partial(jax.jit, static_argnames=("config",))
def _logprobs(params, tokens, segments, wanted, *, config, temperature):
  return _sums(params, None, tokens, segments, wanted, config, temperature)[1]


@functools.partial(jax.jit, static_argnames=("config",))
def _scores(params, tokens, segments, wanted, *, config, temperature):
  del wanted, temperature
  decoder = Decoder(config)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = decoder.apply(params, tokens, positions, segments)
  return scores_at(decoder, params, hidden)


@functools.partial(jax.jit, static_argnames=("config",))
def _embedding_gradients(params, tokens, segments, wanted, *, config, temperature):
  offset = jnp.zeros((*tokens.shape, config.d_model), jnp.float32)
  return jax.grad(_sums, argnums=1, has_aux=True)(params, offset, tokens, segments, wanted, config,
                                                  temperature)[0]


def _sums(params, offset, tokens, segments, wanted, config, temperature):
  """The sum of the wanted log-probabilities, and these. offset: added to embeddings, or None."""
  decoder = Decoder(config)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = decoder.apply(params, tokens, positions, segments, offset=offset)
  logprobs, _ = token_logprobs(
      hidden[:, :-1], decoder.apply(params, method="vocabulary"), tokens[:, 1:],
      chunk=VOCABULARY_CHUNK, temperature=temperature, soft_cap=config.logit_soft_cap)
  logprobs = jnp.where(wanted, jnp.pad(logprobs, ((0, 0), (1, 0))), 0)
  return jnp.sum(logprobs), logprobs
