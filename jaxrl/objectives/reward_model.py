"""Losses of reward models: scalar heads read where an answer ends.

The score r(y) of a sequence is what a head of `config.model.heads_on_top` says at its last loss token
(with supervised examples: at the EOS that ends the answer), in float32. `head` counts the numbers of
all heads but `value`, in the order of the config: (("score", 1), ("sure", 1)) are 0 and 1, and the
log-odds of `config.model.verdict` come after them. Tokens with the tag `batch.CRITIQUE` stand behind the
answer, and its score is read before them.

Sequences that are compared form a group, as in `jaxrl.objectives.preference`, and the column
`preference` is the probability that a sequence is the best of its group. Every token has the value
of its sequence or group, so that aggregation "sequence_mean" is the mean over those, whatever their
lengths.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.batch import at_last_tokens, column_of, sum_by_group, sum_by_sequence, to_tokens
from jaxrl.compose import by_sequence, needs, of_pairs, orders, ranges
from jaxrl.objectives import beta as betas
from jaxrl.objectives.aggregate import TermOutput
from jaxrl.objectives.pairs import answers_of, check_numbers, diagnostics, loss_of_pairs, loss_of_sequences
from jaxrl.objectives.pairs import mean_of_pairs, of_other

LEAST = 1e-3  # of the parameters of a Beta distribution


def scores_of_head(outputs: ModelOutputs, head: int) -> Float[Array, "rows length"]:
  """What a head says at every token, in float32.

  Raises:
    ValueError: the model has no such head.
  """
  heads = outputs.scores.shape[-1]
  if not 0 <= head < heads:
    raise ValueError(f"head={head}, but config.model.heads_on_top has {heads} numbers beside the "
                     f"value: use 0 to {heads - 1}, or add a head such as ('score', 1)")
  return outputs.scores[..., head].astype(jnp.float32)


def at_ends(batch: TokenBatch, per_token: Float[Array, "rows length"]) -> Float[Array, "sequences"]:
  """Values at the last loss token of every answer, a critique behind it aside; 0 without a token."""
  last = at_last_tokens(answers_of(batch), jnp.ones_like(batch.rewards)) > 0
  return sum_by_sequence(batch, jnp.where(last, per_token, 0))


def sequence_scores(outputs: ModelOutputs, batch: TokenBatch, head: int = 0
                    ) -> Float[Array, "sequences"]:
  """The score of every sequence, 0 for one without a loss token.

  Raises:
    ValueError: the model has no such head.
  """
  return at_ends(batch, scores_of_head(outputs, head))


@of_pairs
@needs("scores")
def bradley_terry(outputs: ModelOutputs, batch: TokenBatch, *, head: int = 0,
                  margin: str | None = None, centre: float = 0.0, label_smoothing: float = 0.0
                  ) -> TermOutput:
  """The logistic loss of pairs (Bradley and Terry, 1952; Ouyang et al., arXiv:2203.02155, eq. 1).

    h = r(y) - r(y') - margin
    loss = sum over both y of preference(y) (-(1-e) log s(h) - e log s(-h)) + centre (r(y) + r(y'))^2

  Args:
    outputs: supplies `scores`.
    batch: supplies `columns["preference"]`.
    head: that scores.
    margin: column with what the score of the better answer has to be higher by (Llama 2,
      arXiv:2307.09288, eq. 2), equal in both sequences of a pair.
    centre: pulls the sum of scores to 0 (arXiv:2312.09244, section 2); 0.01 is usual.
    label_smoothing: e, probability that a label is wrong, in [0, 0.5).

  Returns:
    Loss per token; metrics by sequence `preference_accuracy`, `preference_margin` (the difference
    of scores, without `margin`), `chosen_score` and `rejected_score`.

  Raises:
    ValueError: no such head or column, or numbers out of range.
  """
  check_numbers("bradley_terry", label_smoothing=label_smoothing, at_least_0=dict(centre=centre))
  score = sequence_scores(outputs, batch, head)
  other = of_other(batch, score)
  difference = score - other
  offset = column_of(batch, margin, "bradley_terry")
  h = difference if offset is None else difference - offset
  values = (-(1 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)
            + centre * (score + other) ** 2)
  return loss_of_pairs(batch, values), diagnostics(batch, score, difference, "score")


@of_pairs
@needs("scores")
def beta_preference(outputs: ModelOutputs, batch: TokenBatch, *, head: int = 0, confidence: int = 1,
                    prior: Sequence[float] = (1.0, 1.0), weight: float = 0.1,
                    least_confidence: float = 0.01, evidence: str | None = None) -> TermOutput:
  """A Beta belief about which answer is better (ICRM, arXiv:2602.08819): a negative ELBO.

    mu = s(r(y) - r(y')),   tau = least + softplus(c(y)) + softplus(c(y')),   a = mu tau,  b = tau - a
    loss = n (z D(a, b) + (1 - z) D(b, a)) + weight KL(Beta(a, b) || Beta(a0, b0))
    D(a, b) = psi(a + b) - psi(a),   z = preference(y),   n = the column `evidence`, or 1

  With P(z = 1) = p the only minimum is a = a0 + p / weight, b = b0 + (1 - p) / weight, so margins stay
  finite: at most log((a0 + 1 / weight) / b0). The belief about the swapped pair is the same with a
  and b swapped. a and b are at least 1e-3.

  Args:
    outputs, batch: as in `bradley_terry`.
    head: r, a score that can be used by itself.
    confidence: the head c.
    prior: a0 and b0, above 0, equal to each other.
    weight: of the KL, above 0.
    least_confidence: of tau, above 0.
    evidence: column with how many observations the label stands for.

  Returns:
    Loss per token; the metrics of `bradley_terry`, `confidence` (tau) and `prior_kl`.

  Raises:
    ValueError: no such head or column, or numbers out of range.
  """
  if len(prior) != 2 or prior[0] != prior[1] or not prior[0] > 0:
    raise ValueError(f"beta_preference: prior={tuple(prior)} must be two equal numbers above 0: "
                     "neither answer of a pair comes first")
  check_numbers("beta_preference", above_0=dict(weight=weight, least_confidence=least_confidence))
  score, sure = (sequence_scores(outputs, batch, h) for h in (head, confidence))
  difference = score - of_other(batch, score)
  sure = jax.nn.softplus(sure)
  tau = least_confidence + sure + of_other(batch, sure)
  a, b = (jnp.maximum(jax.nn.sigmoid(d) * tau, LEAST) for d in (difference, -difference))
  # The sum over both sequences of preference(y) * values(y) makes z D(a, b) + (1 - z) D(b, a), and
  # one KL, for it is the same from both sides.
  kl = betas.kl_to_beta(a, b, *prior)
  count = column_of(batch, evidence, "beta_preference")
  expected = betas.digamma_difference(a, b) * (1.0 if count is None else count)
  return loss_of_pairs(batch, expected + weight * kl), {
      **diagnostics(batch, score, difference, "score"), "confidence": mean_of_pairs(batch, tau),
      "prior_kl": mean_of_pairs(batch, kl)}


@orders(lambda rank: (rank, -1))
@by_sequence
@needs("scores")
def plackett_luce(outputs: ModelOutputs, batch: TokenBatch, *, head: int = 0, rank: str = "rank"
                  ) -> TermOutput:
  """The likelihood of a ranking of k answers (Plackett, 1975; arXiv:2305.18290, appendix A.3).

    loss = sum over answers y of log sum over {y': rank(y') >= rank(y)} of exp(r(y') - r(y))

  With two answers it is `bradley_terry`. Answers of equal rank are chosen one after the other from
  the same set (Breslow, 1974). Groups count in proportion to their sizes.

  Args:
    outputs: supplies `scores`.
    batch: supplies the column of ranks, of which lower ones are better.
    head: that scores.
    rank: name of that column.

  Returns:
    Loss of its group at each token; metric by sequence `ranking_accuracy`, the share of answers of
    other rank that the score puts on the right side, 1/2 for equal scores.

  Raises:
    ValueError: no such head or column.
  """
  score, ranks = sequence_scores(outputs, batch, head), column_of(batch, rank, "plackett_luce")
  group = batch.group_ids
  together = (group[:, None] == group) & batch.sequence_mask[:, None] & batch.sequence_mask
  left = together & (ranks >= ranks[:, None])
  # An empty set has no logarithm; sequences without a group are left alone with themselves.
  left |= jnp.eye(len(score), dtype=bool)
  log_sum = jax.nn.logsumexp(jnp.where(left, score[None], -jnp.inf), axis=1)
  loss = sum_by_group(batch, log_sum - score)
  other_rank = together & (ranks != ranks[:, None])
  ahead = jnp.where(ranks[:, None] < ranks, score[:, None] - score, score - score[:, None])
  right = jnp.sum(jnp.where(other_rank, (ahead > 0) + 0.5 * (ahead == 0), 0), axis=1)
  accuracy = right / jnp.maximum(jnp.sum(other_rank, axis=1), 1)
  return (loss_of_sequences(batch, loss),
          {"ranking_accuracy": to_tokens(batch, accuracy)})


@by_sequence
@needs("scores")
@ranges(lambda label, levels: {label: (1, levels)})
@orders(lambda label: (label, 1))
def ordinal(outputs: ModelOutputs, batch: TokenBatch, *, levels: int, label: str = "label",
            head: int = 0, ordered: bool = False) -> TermOutput:
  """Ordered ratings by one logit per threshold (CORAL-like, WildReward, steps 5 and 6).

    loss = mean over k = 1..K-1 of BCE(s(z_k), [label > k]),    score = 1 + sum over k of s(z_k)

  The score is the mean of the label where the chances s(z_k) fall with k, which nothing sees to unless
  `ordered`, CORAL's own form with one r for all thresholds:

    z_k = r(y) - c_k,    c_1 = b_1,    c_k = c_(k-1) + softplus(b_k)

  Args:
    outputs: supplies `scores`.
    batch: supplies the column with labels 1 to K.
    levels: K, at least 2.
    label: name of that column.
    head: of the first of the K - 1 logits z_k, or of r and the K - 1 numbers b_k behind it. These depend on
      no answer with heads (("score", 1), ("thresholds", K - 1)).
    ordered: which of the two.

  Returns:
    Loss of its sequence at each token; metrics by sequence `rating_error`, the distance of score and
    label, and `rating_accuracy`, the share of labels that the rounded score hits.

  Raises:
    ValueError: no such head or column, or levels below 2.
  """
  if levels < 2:
    raise ValueError(f"ordinal: levels={levels} must be at least 2")
  labels, loss, score = column_of(batch, label, "ordinal"), 0.0, 1.0
  numbers = [sequence_scores(outputs, batch, head + k) for k in range(levels - 1 + ordered)]
  for k, z in enumerate(ordered_logits(numbers) if ordered else numbers, 1):
    loss += jax.nn.softplus(jnp.where(labels > k, -z, z)) / (levels - 1)
    score += jax.nn.sigmoid(z)
  values = {"rating_error": jnp.abs(score - labels), "rating_accuracy": jnp.round(score) == labels}
  return (loss_of_sequences(batch, loss),
          {name: to_tokens(batch, x.astype(jnp.float32)) for name, x in values.items()})


def ordered_logits(numbers: Sequence[Array]) -> list[Array]:
  """z_1 to z_(K-1) of `ordinal` from r and b_1 to b_(K-1)."""
  score, first, *steps = numbers
  logits = [score - first]
  for step in steps:
    logits.append(logits[-1] - jax.nn.softplus(step))
  return logits


@by_sequence
@needs("scores")
def regress_attributes(outputs: ModelOutputs, batch: TokenBatch, *, labels: Sequence[str],
                       head: int = 0) -> TermOutput:
  """One head per attribute, each fitted to its label by squares (SteerLM's attribute model,
  arXiv:2310.05344).

    loss = mean over attributes i of (z_i - label_i)^2

  Args:
    outputs: supplies `scores`.
    batch: supplies the columns.
    labels: names of the columns, in the order of the heads.
    head: of the first attribute.

  Returns:
    Loss of its sequence at each token; metrics by sequence `error/LABEL`, the absolute error.

  Raises:
    ValueError: no such head or column, or no label.
  """
  if not labels or isinstance(labels, str):
    raise ValueError(f"regress_attributes: labels={labels!r} must list at least one column")
  loss, errors = 0.0, {}
  for i, name in enumerate(labels):
    error = sequence_scores(outputs, batch, head + i) - column_of(batch, name, "regress_attributes")
    loss += error ** 2 / len(labels)
    errors[f"error/{name}"] = to_tokens(batch, jnp.abs(error))
  return loss_of_sequences(batch, loss), errors
