"""What a next-token distribution is like, beyond the log-probability of one token and its entropy.

These signals need all logits of a token at once. They are computed for a block of tokens at a time,
and again in the backward pass, so that memory is bounded by [block, vocab].

A signal with a parameter is written `name@parameter`: `nucleus_entropy@0.8`.
"""

from collections.abc import Callable, Collection
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.models.logprobs import token_logits

BLOCK = 1 << 22  # logits of a block: 16 MiB


def mean_logprobs(logits: Float[Array, "vocab"]) -> Float[Array, ""]:
  """Mean over the vocabulary of the log-probabilities: `mean(z) - logsumexp(z)`."""
  return jnp.mean(logits) - jax.nn.logsumexp(logits)


def top2_gap(logits: Float[Array, "vocab"]) -> Float[Array, ""]:
  """Difference of the two largest probabilities."""
  top = jax.lax.top_k(jax.nn.softmax(logits), 2)[0]
  return top[0] - top[1]


def top_probability(logits: Float[Array, "vocab"]) -> Float[Array, ""]:
  """The largest probability."""
  return jnp.max(jax.nn.softmax(logits))


def collision(logits: Float[Array, "vocab"]) -> Float[Array, ""]:
  """Probability that two draws agree, `sum p^2`; its negative logarithm is the Renyi-2 entropy."""
  return jnp.sum(jax.nn.softmax(logits) ** 2)


def nucleus_entropy(logits: Float[Array, "vocab"], p: float) -> Float[Array, ""]:
  """Entropy inside the nucleus (SIREN, arXiv:2509.25133), in nats.

  The nucleus is the smallest set of most likely tokens with a mass of at least `p`, the token that
  crosses it included; probabilities are made to sum to 1 inside it. The set passes no gradient, so
  tokens outside of it get none.
  """
  probabilities = jax.nn.softmax(logits)
  order = jnp.argsort(-jax.lax.stop_gradient(probabilities))
  before = jnp.cumsum(probabilities[order]) - probabilities[order]
  inside = jnp.zeros(logits.shape, bool).at[order].set(before < p)
  log_q = jax.nn.log_softmax(jnp.where(inside, logits, -jnp.inf))
  return -jnp.sum(jnp.where(inside, jnp.exp(log_q) * jnp.where(inside, log_q, 0), 0))


SIGNALS = {"mean_logprobs": mean_logprobs, "top2_gap": top2_gap, "top_probability": top_probability,
           "collision": collision, "nucleus_entropy": nucleus_entropy}
WITH_PARAMETER = ("nucleus_entropy",)


def split(name: str) -> tuple[str, float | None]:
  """`nucleus_entropy@0.8` -> `("nucleus_entropy", 0.8)`; without a parameter None.

  Raises:
    ValueError: a parameter that is missing, not wanted, or no number above 0 and at most 1.
  """
  base, at, text = name.partition("@")
  if base in WITH_PARAMETER:
    try:
      parameter = float(text)
    except ValueError:
      parameter = 0.0
    if not 0 < parameter <= 1:
      raise ValueError(f"signal {name!r} is written {base}@P with 0 < P <= 1, as in {base}@0.8")
    return base, parameter
  if at:
    raise ValueError(f"signal {base!r} takes no parameter, so {name!r} is none")
  return base, None


def about_tokens(hidden: Float[Array, "rows length width"], vocabulary: Float[Array, "vocab width"],
                 names: Collection[str], *, temperature: float | Array, soft_cap: float
                 ) -> dict[str, Float[Array, "rows length"]]:
  """The named signals of the distributions that hidden states predict."""
  functions = {name: _function(name) for name in names}

  def of_one(state):
    logits = token_logits(state, vocabulary, temperature=temperature, soft_cap=soft_cap)
    return {name: function(logits) for name, function in functions.items()}

  return in_blocks(of_one, hidden, vocabulary.shape[0])


def divergence(hidden: Float[Array, "rows length width"], vocabulary: Float[Array, "vocab width"],
               other_hidden: Float[Array, "rows length width"],
               other_vocabulary: Float[Array, "vocab width"], *, temperature: float | Array,
               soft_cap: float, other_soft_cap: float | None = None) -> Float[Array, "rows length"]:
  """KL(policy || other) over the whole vocabulary, in nats, at every token.

  `other_soft_cap` is the soft cap of the other; None is the same.
  """
  other_soft_cap = soft_cap if other_soft_cap is None else other_soft_cap

  def of_one(states):
    state, other = states
    log_p, log_q = (jax.nn.log_softmax(token_logits(s, v, temperature=temperature, soft_cap=cap))
                    for s, v, cap in ((state, vocabulary, soft_cap),
                                      (other, other_vocabulary, other_soft_cap)))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

  return in_blocks(of_one, (hidden, other_hidden), vocabulary.shape[0])


def in_blocks(of_one: Callable, states, vocab: int):
  """Applies a function of the states of one token to all tokens, `BLOCK // vocab` at a time."""
  rows, length = jax.tree.leaves(states)[0].shape[:2]
  flat = jax.tree.map(lambda x: x.reshape(rows * length, *x.shape[2:]), states)
  found = jax.lax.map(jax.checkpoint(of_one), flat, batch_size=max(1, BLOCK // vocab))
  return jax.tree.map(lambda x: x.reshape(rows, length, *x.shape[1:]), found)


def _function(name):
  base, parameter = split(name)
  function = SIGNALS[base]
  return function if parameter is None else functools.partial(function, p=parameter)
