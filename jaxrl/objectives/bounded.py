"""Losses of pairs that want a score gap in proportion to how different the answers are (PCRM,
arXiv:2404.00978).

With s in [0, 1] the similarity of the two answers of a pair and D = r(y) - r(y') the gap,

  cap = b1 / (s + b2) + b3,      loss = -log s(D) - log s(cap - D)

has the gradient -s(-D) + s(D - cap): its only minimum is at D = cap / 2, so the second term pulls to half
the cap, and is no wall. Pairs and labels are those of `jaxrl.objectives.preference`.
"""

import jax
import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.batch import column_of, sum_by_group
from jaxrl.compose import needs, of_pairs
from jaxrl.objectives.aggregate import TermOutput
from jaxrl.objectives.pairs import Sequences, answers_of, check_numbers, diagnostics, loss_of_pairs, mean_of_pairs
from jaxrl.objectives.pairs import in_pairs, of_other, reduce, token_weights
from jaxrl.objectives.reward_model import sequence_scores

PLACES = ("last", "every")


@of_pairs
@needs("scores")
def bounded_bradley_terry(outputs: ModelOutputs, batch: TokenBatch, *, head: int = 0, b1: float = 20.0,
                          b2: float = 1e-3, b3: float = -15.0, similarity: str | None = None,
                          cap: float | None = None, where: str = "last") -> TermOutput:
  """The logistic loss of pairs whose gap a cap pulls back (PCRM, arXiv:2404.00978).

  Args:
    outputs: supplies `scores`.
    batch: supplies `columns["preference"]`.
    head: that scores.
    b1, b2, b3: of the cap.
    similarity: column with s, equal in both sequences of a pair, such as the cosine of embeddings;
      None is the ratio of the answers' lengths, counted from the first token in which they differ.
    cap: one for all pairs instead (the paper's ablation); None is that of the similarity.
    where: "last" compares scores of last tokens; "every" takes the mean of the loss over all places
      from the first that differs to the end of the longer answer, after the end of the shorter one
      with its last score.

  Returns:
    Loss per token; the metrics of `bradley_terry`, and `cap`.

  Raises:
    ValueError: no such head, column or place, or numbers out of range.
  """
  check_numbers("bounded_bradley_terry", above_0=dict(b2=b2))
  if where not in PLACES:
    raise ValueError(f"bounded_bradley_terry: where={where!r} is neither of {', '.join(PLACES)}")
  score = sequence_scores(outputs, batch, head)
  bound = caps(batch, b1, b2, b3, similarity, cap)
  difference = score - of_other(batch, score)
  if where == "last":
    values = pulled(difference, bound)
  else:
    values = _over_places(batch, outputs.scores[..., head].astype(jnp.float32), bound)
  return loss_of_pairs(batch, values), {**diagnostics(batch, score, difference, "score"),
                                        "cap": mean_of_pairs(batch, bound)}


@of_pairs
@needs("reference_logprobs")
def bounded_dpo(outputs: ModelOutputs, batch: TokenBatch, *, beta: float = 0.1, b1: float = 20.0,
                b2: float = 1e-3, b3: float = -15.0, similarity: str | None = None,
                cap: float | None = None) -> TermOutput:
  """DPO whose implicit rewards a cap pulls back: the gap is D = beta (rho(y) - rho(y')).

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `reference_logprobs`, `columns["preference"]`, and `token_weights` if there are any.
    beta: strength of the pull to the reference, above 0.
    b1, b2, b3, similarity, cap: as in `bounded_bradley_terry`.

  Returns:
    Loss per token; the metrics of `dpo`, and `cap`.

  Raises:
    ValueError: no such column, or numbers out of range.
  """
  check_numbers("bounded_dpo", above_0=dict(beta=beta, b2=b2))
  reward = beta * reduce(batch, outputs.logprobs - batch.signals["reference_logprobs"],
                         token_weights(batch))
  h = reward - of_other(batch, reward)
  bound = caps(batch, b1, b2, b3, similarity, cap)
  return loss_of_pairs(batch, pulled(h, bound)), {**diagnostics(batch, reward, h),
                                                  "cap": mean_of_pairs(batch, bound)}


def pulled(gap: jax.Array, cap: jax.Array) -> jax.Array:
  """`-log s(gap) - log s(cap - gap)`"""
  return -jax.nn.log_sigmoid(gap) - jax.nn.log_sigmoid(cap - gap)


def caps(batch: TokenBatch, b1: float, b2: float, b3: float, similarity: str | None,
         cap: float | None) -> Sequences:
  """The cap of every sequence's pair."""
  if cap is not None:
    return jnp.full(batch.rewards.shape, cap, jnp.float32)
  alike = length_ratios(batch) if similarity is None else column_of(batch, similarity, "a bounded loss")
  return b1 / (alike + b2) + b3


def length_ratios(batch: TokenBatch) -> Sequences:
  """Of a pair, the shorter length over the longer one, both from the first token in which the
  answers differ; 1 where they do not. 1 for sequences without a partner."""
  lengths = jnp.sum(_places(batch)[2], axis=1).astype(jnp.float32)
  other = of_other(batch, lengths)
  ratio = jnp.minimum(lengths, other) / jnp.maximum(jnp.maximum(lengths, other), 1)
  return jnp.where(in_pairs(batch) & (jnp.maximum(lengths, other) > 0), ratio, 1.0)


def _over_places(batch, scores, cap):
  """Mean of the loss over the places from the first difference to the end of the longer answer."""
  partner, answer, tail = _places(batch)
  by_place = _scattered(batch, scores, 0.0)
  place = jnp.arange(tail.shape[1])
  last = jnp.max(jnp.where(answer, place, -1), axis=1, keepdims=True)
  held = jnp.where(place > last, jnp.take_along_axis(by_place, jnp.maximum(last, 0), axis=1), by_place)
  either = tail | tail[partner]
  values = pulled(held - held[partner], cap[:, None])
  return jnp.sum(jnp.where(either, values, 0), axis=1) / jnp.maximum(jnp.sum(either, axis=1), 1)


def _places(batch):
  """The other sequence of each one's pair [sequences]; places of its answer, all of them and those from
  the first token in which the two differ [sequences, positions]."""
  index = jnp.arange(batch.num_sequences)
  partner = jnp.where(in_pairs(batch), sum_by_group(batch, index) - index, index)
  answer = _scattered(batch, answers_of(batch).loss_mask, False)
  tokens = jnp.where(answer, _scattered(batch, batch.tokens, 0), -1)
  differs = tokens != tokens[partner]
  return partner, answer, answer & (jnp.cumsum(differs, axis=1) > 0)


def _scattered(batch, values, empty):
  """Values per token by position in their sequence. [sequences, positions]"""
  # Positions of a row's tokens stay below its length, except behind a trunk.
  length = batch.tokens.shape[1] + batch.trunk_tokens.shape[1]
  rows = jnp.where(batch.sequence_ids >= 0, batch.sequence_ids, batch.num_sequences)
  whole = jnp.full((batch.num_sequences, length), empty, values.dtype)
  return whole.at[rows, batch.positions].set(values, mode="drop")
