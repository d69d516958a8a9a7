"""What losses of compared sequences share: labels, the other one of a pair, values of pairs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl.batch import CRITIQUE, PREFERENCE, TokenBatch
from jaxrl.batch import count_by_group, mean_by_sequence, sum_by_group, sum_by_sequence
from jaxrl.batch import to_tokens

Sequences = Float[Array, "sequences"]
Tokens = Float[Array, "rows length"]


def preferences(batch: TokenBatch) -> Sequences:
  """The column `preference`: probability that a sequence is the better, or a desirable, one.

  Raises:
    ValueError: the batch has none.
  """
  if PREFERENCE not in batch.columns:
    raise ValueError("a term that compares answers reads the column 'preference', which this batch lacks: "
                     "let rollouts be compared by dict(name='best_and_worst') in config.rollout.edits, or "
                     "by an episode or edit of your own that supplies it")
  return batch.columns[PREFERENCE]


def in_pairs(batch: TokenBatch) -> Bool[Array, "sequences"]:
  """Sequences in a group of two."""
  return count_by_group(batch) == 2


def of_other(batch: TokenBatch, values: Sequences) -> Sequences:
  """The value of the other sequence of the pair."""
  return sum_by_group(batch, values) - jnp.where(batch.sequence_mask, values, 0)


def answers_of(batch: TokenBatch) -> TokenBatch:
  """The batch with answers alone in its loss mask, without the critiques behind them."""
  return batch.replace(loss_mask=batch.loss_mask & (batch.tag_ids != CRITIQUE))


def mean_of_pairs(batch: TokenBatch, values: Sequences) -> Tokens:
  """At every token of a pair, the mean of its two values under `preference`; 0 elsewhere."""
  pair = sum_by_group(batch, preferences(batch) * values)
  return to_tokens(batch, jnp.where(in_pairs(batch), pair, 0))


def loss_of_pairs(batch: TokenBatch, values: Sequences) -> Tokens:
  """`mean_of_pairs` on the loss mask."""
  return jnp.where(batch.loss_mask, mean_of_pairs(batch, values), 0)


def loss_of_sequences(batch: TokenBatch, values: Sequences) -> Tokens:
  """The value of its sequence at every token of the loss mask."""
  return jnp.where(batch.loss_mask, to_tokens(batch, values), 0)


def diagnostics(batch: TokenBatch, rewards: Sequences, h: Sequences, what: str = "reward"
                ) -> dict[str, Tokens]:
  """Whether the sign of `h` is that of the label, `h`, and the rewards of both sequences of pairs."""
  preference = preferences(batch)
  right = (h > 0) + 0.5 * (h == 0)
  rejected = sum_by_group(batch, (1 - preference) * rewards)
  return {"preference_accuracy": mean_of_pairs(batch, right),
          "preference_margin": mean_of_pairs(batch, h),
          f"chosen_{what}": mean_of_pairs(batch, rewards),
          f"rejected_{what}": to_tokens(batch, jnp.where(in_pairs(batch), rejected, 0))}


def reduce(batch: TokenBatch, per_token: Tokens, weights: Tokens | float = 1.0,
           normalise: bool = False) -> Sequences:
  """Weighted sum, or mean, over the loss tokens of every answer, in float32."""
  answers = answers_of(batch)
  per_token = jnp.where(answers.loss_mask, per_token.astype(jnp.float32) * weights, 0)
  return (mean_by_sequence if normalise else sum_by_sequence)(answers, per_token)


def constant_of(batch: TokenBatch, name: str) -> Sequences:
  """A number of every sequence that a signal holds at all of its tokens."""
  tokens = sum_by_sequence(batch, jnp.ones(batch.tokens.shape, jnp.float32))
  return sum_by_sequence(batch, batch.signals[name]) / jnp.maximum(tokens, 1)


def token_weights(batch: TokenBatch, tail_weight: float = 1.0) -> Tokens:
  """The signal `token_weights`, if there is one; tokens beyond the length of the shorter sequence
  of the pair count `tail_weight`."""
  weights = batch.signals.get("token_weights", jnp.ones(batch.tokens.shape, jnp.float32))
  if isinstance(tail_weight, int | float) and tail_weight == 1:
    return weights
  mask = answers_of(batch).loss_mask
  lengths = sum_by_sequence(batch, mask.astype(jnp.float32))
  shared = to_tokens(batch, jnp.minimum(lengths, of_other(batch, lengths)))
  before = jnp.cumsum(mask, axis=1) - mask  # loss tokens of the row before this one
  first = -jax.ops.segment_max(jnp.where(mask, -before, -mask.size).reshape(-1),
                               batch.sequence_ids.reshape(-1), num_segments=batch.num_sequences)
  return jnp.where(before - to_tokens(batch, first) < shared, weights, tail_weight * weights)


def check_numbers(term: str, *, label_smoothing: float = 0.0, above_0: dict | None = None,
                  at_least_0: dict | None = None) -> None:
  """Refuses numbers out of range; numbers with a schedule are not looked at.

  Raises:
    ValueError: naming the term, the argument and its range.
  """
  for name, value in (above_0 or {}).items():
    if isinstance(value, int | float) and not value > 0:
      raise ValueError(f"{term}: {name}={value} has to be above 0")
  for name, value in (at_least_0 or {}).items():
    if isinstance(value, int | float) and not value >= 0:
      raise ValueError(f"{term}: {name}={value} has to be at least 0")
  if isinstance(label_smoothing, int | float) and not 0 <= label_smoothing < 0.5:
    raise ValueError(f"{term}: label_smoothing={label_smoothing} has to be at least 0 and below 0.5")
