"""Preference losses that compare a sequence with the whole batch, paired or not.

What they need of the batch is computed once, of the policy that the batch begins with
(`compose.prepares`). As every batch of examples gets one update, that is the policy which the loss is
about, so micro-batches add up to the very gradient of the equation. The notation is that of
`jaxrl.objectives.preference`; `preference` is the probability that a sequence is a good one.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.batch import sum_by_group, sum_by_sequence, to_tokens
from jaxrl.compose import by_sequence, carries, needs, prepares
from jaxrl.log_ratio import check_clamp, clamped, log_ratio
from jaxrl.objectives.aggregate import TermOutput
from jaxrl.objectives.pairs import check_numbers, constant_of, diagnostics, in_pairs, loss_of_pairs
from jaxrl.objectives.pairs import loss_of_sequences, of_other, preferences, reduce, token_weights
from jaxrl.objectives.preference import logistic


def _ratios(batch, logprobs):
  """rho of every sequence."""
  return reduce(batch, logprobs - batch.signals["reference_logprobs"], token_weights(batch))


# --------------------------------------------------------------------------------------------- KTO


def _divergence(batch, *, estimate_kl, clamp):
  """`max(0, mean over mismatched answers of rho)`, at every token."""
  if not estimate_kl:
    return {}
  off = batch.signals["mismatched"]
  ratio = batch.signals["old_logprobs"] - batch.signals["reference_logprobs"]
  total = jnp.sum(clamped(jnp.where(off > 0, ratio.astype(jnp.float32), 0), clamp)[0])
  answers = jnp.sum(sum_by_sequence(batch, off) > 0)
  kl = jnp.maximum(total / jnp.maximum(answers, 1), 0)
  return {"kto_kl": jnp.where(batch.segment_ids != 0, kl, 0)}


@prepares(_divergence)
@by_sequence
@needs("reference_logprobs",
       lambda estimate_kl: ("old_logprobs", "mismatched") if estimate_kl else ())
def kto(outputs: ModelOutputs, batch: TokenBatch, *, beta: float = 0.1, desirable: float = 1.0,
        undesirable: float = 1.0, estimate_kl: bool = True,
        clamp: Sequence[float] | None = None) -> TermOutput:
  """Kahneman-Tversky optimisation (arXiv:2402.01306, eq. 7 and 8); answers need no partner.

    loss = preference(y) d (1 - s(beta (rho(y) - z))) + (1 - preference(y)) u (1 - s(beta (z - rho(y))))

  z = max(0, mean of rho over the batch's prompts with the answer to the next prompt), which passes no
  gradient: the estimate of section 4.1, with the answers that the supply adds (`data.mismatched`).

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `reference_logprobs` and `columns["preference"]`.
    beta: strength of the pull to the reference, above 0.
    desirable, undesirable: d and u; the paper wants d n_good / (u n_bad) between 1 and 4/3.
    estimate_kl: False puts z at 0, which is APO-zero of unpaired answers (arXiv:2408.06266).
    clamp: as in `dpo`, in rho of z too.

  Returns:
    Loss of its sequence at each token; metrics `kto_kl` (z), `unclamped_fraction` with a clamp and, of
    pairs, those of `dpo`.

  Raises:
    ValueError: numbers out of range.
  """
  check_numbers("kto", above_0=dict(beta=beta),
                at_least_0=dict(desirable=desirable, undesirable=undesirable))
  check_clamp("kto", clamp)
  ratios, extra = clamped(
      log_ratio(batch, outputs.logprobs, batch.signals["reference_logprobs"]), clamp)
  ratio, good = reduce(batch, ratios, token_weights(batch)), preferences(batch)
  extra |= {"kto_kl": batch.signals["kto_kl"]} if estimate_kl else {}
  z = constant_of(batch, "kto_kl") if estimate_kl else 0.0
  value = (good * desirable * jax.nn.sigmoid(-beta * (ratio - z))
           + (1 - good) * undesirable * jax.nn.sigmoid(beta * (ratio - z)))
  h = beta * (ratio - of_other(batch, ratio))
  return loss_of_sequences(batch, value), diagnostics(batch, beta * ratio, h) | extra


# --------------------------------------------------------------------------------------------- BCO


def _shift(batch, memory, *, beta):
  """The mean reward of all good and bad answers so far, this batch included."""
  reward = beta * _ratios(batch, batch.signals["old_logprobs"])
  count = memory["count"] + jnp.sum(batch.sequence_mask)
  mean = memory["mean"] + jnp.sum(jnp.where(
      batch.sequence_mask, reward - memory["mean"], 0)) / jnp.maximum(count, 1)
  everywhere = jnp.where(batch.segment_ids != 0, mean, 0)
  return {"bco_shift": everywhere}, {"count": count, "mean": mean}


@carries(lambda: {"count": jnp.zeros(()), "mean": jnp.zeros(())})
@prepares(_shift)
@by_sequence
@needs("reference_logprobs", "old_logprobs")
def bco(outputs: ModelOutputs, batch: TokenBatch, *, beta: float = 0.1) -> TermOutput:
  """Binary classifier optimisation (arXiv:2404.04656, eq. 10 and 11); answers need no partner.

    loss = -preference(y) log s(beta rho(y) - delta) - (1 - preference(y)) log s(delta - beta rho(y))

  delta, the shift, is the mean of beta rho over all answers so far; it passes no gradient and is part
  of checkpoints. Over pairs, the sum of both losses is `dpo(loss="bco_pair")` where delta is 0.

  Args:
    outputs, batch: as in `kto`.
    beta: as in `kto`.

  Returns:
    Loss of its sequence at each token; metrics `bco_shift` and, of pairs, those of `dpo`.

  Raises:
    ValueError: numbers out of range.
  """
  check_numbers("bco", above_0=dict(beta=beta))
  reward, good = beta * _ratios(batch, outputs.logprobs), preferences(batch)
  above = reward - constant_of(batch, "bco_shift")
  value = -good * jax.nn.log_sigmoid(above) - (1 - good) * jax.nn.log_sigmoid(-above)
  return loss_of_sequences(batch, value), diagnostics(
      batch, reward, reward - of_other(batch, reward)) | {"bco_shift": batch.signals["bco_shift"]}


# --------------------------------------------------------------------------------------------- AOT


def _quantiles(batch, *, unpaired):
  """At every token, what its sequence is compared with."""
  old = batch.signals["old_logprobs"]
  if unpaired:
    ratio, good = _ratios(batch, old), preferences(batch)
    chosen = batch.sequence_mask & (good > 0.5)
    rejected = batch.sequence_mask & (good < 0.5)
    partner = jnp.where(chosen, _at_quantile(ratio, chosen, ratio, rejected),
                        _at_quantile(ratio, rejected, ratio, chosen))
    return {"aot_partner": to_tokens(batch, partner)}
  own, other = (_advantage(batch, x) for x in (old, batch.signals["reference_logprobs"]))
  paired = in_pairs(batch)
  return {"aot_partner": to_tokens(batch, _at_quantile(own, paired, other, paired))}


def _advantage(batch, logprobs):
  """Log-probability of the chosen answer over that of the rejected one, at both."""
  sign = 2 * preferences(batch) - 1
  return sum_by_group(batch, sign * reduce(batch, logprobs, token_weights(batch)))


def _at_quantile(values, mine, others, theirs):
  """For each of `values[mine]`, the one of `others[theirs]` at the same quantile. [sequences]"""
  rank = jnp.argsort(jnp.argsort(jnp.where(mine, values, jnp.inf)))
  ordered = jnp.sort(jnp.where(theirs, others, jnp.inf))
  place = (2 * rank + 1) * jnp.sum(theirs) // jnp.maximum(2 * jnp.sum(mine), 1)
  found = ordered[jnp.clip(place, 0, len(ordered) - 1)]
  return jnp.where(mine & jnp.isfinite(found), found, 0)


@prepares(_quantiles)
@by_sequence
@needs("reference_logprobs", "old_logprobs")
def aot(outputs: ModelOutputs, batch: TokenBatch, *, beta: float = 0.1,
        label_smoothing: float = 0.0, unpaired: bool = False) -> TermOutput:
  """Alignment by optimal transport (arXiv:2406.05882): chosen answers dominate stochastically.

    paired    d_i = i-th smallest of (pi(y) - pi(y')) minus i-th smallest of the same of the reference
    unpaired  d_i = i-th smallest rho of chosen answers minus i-th smallest rho of rejected ones
    loss = mean over i of -(1-e) log s(beta d_i) - e log s(-beta d_i)

  with y the chosen answer of a pair. Where chosen and rejected answers are not equally many, they are
  matched at the middle of their quantiles.

  Args:
    outputs, batch: as in `kto`. Answers with preference 0.5 are not compared; other labels than 0 and
      1 weigh the log-probabilities of a pair by 2 preference - 1.
    beta: as in `kto`.
    label_smoothing: e, in [0, 0.5).
    unpaired: which of the two.

  Returns:
    Loss at each token, whose mean over sequences is that over i; the metrics of `dpo`.

  Raises:
    ValueError: numbers out of range.
  """
  check_numbers("aot", label_smoothing=label_smoothing, above_0=dict(beta=beta))
  ratio = _ratios(batch, outputs.logprobs)
  partner = constant_of(batch, "aot_partner")
  if unpaired:
    good = preferences(batch)
    sign = jnp.sign(good - 0.5)
    loss = jnp.where(sign == 0, 0, logistic(sign * beta * (ratio - partner), label_smoothing))
    # Both of two matched sequences carry their loss, and each passes the gradient of its own part.
    values = loss_of_sequences(batch, 2 * loss - jax.lax.stop_gradient(loss))
  else:
    d = _advantage(batch, outputs.logprobs) - partner
    values = loss_of_pairs(batch, logistic(beta * d, label_smoothing))
  return values, diagnostics(batch, beta * ratio, beta * (ratio - of_other(batch, ratio)))
