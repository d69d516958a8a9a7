"""Preference losses that doubt their labels: which of them are right is inferred beside the policy."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import logit

from jaxrl import compose
from jaxrl.batch import PREFERENCE, ModelOutputs, TokenBatch
from jaxrl.batch import column_of, mean_by_sequence, to_tokens
from jaxrl.objectives import preference
from jaxrl.objectives.aggregate import TermOutput
from jaxrl.objectives.pairs import in_pairs, preferences
from jaxrl.schedule import Schedule

LOGGED = 8  # annotators whose reliability is a metric of its own


def _build(loss):
  """The term that is made robust.

  Raises:
    ValueError: it is none that both labels of a pair can be asked of at any time.
  """
  term = compose.build(loss, preference, where="rpo: loss")
  name = compose.name_of(term)
  if not compose.is_of_pairs(term) or compose.initial_of(term) or compose.is_prepared(term):
    raise ValueError(f"rpo: loss={name!r} is no function of the log-probabilities of one pair; dpo, cpo, "
                     "simpo and orpo are")
  for key, value in term.keywords.items():
    if isinstance(value, Schedule):
      raise ValueError(f"rpo: {key} of loss={name!r} has a schedule, and has to be a number")
  return term


def _signals(loss):
  """What the term reads: log-probabilities of any models, as the E-step has no more of the policy."""
  term = _build(loss)
  names = compose.signals_of(term)
  if other := [signal for signal in names if not signal.endswith("_logprobs")]:
    raise ValueError(f"rpo: loss={compose.name_of(term)!r} reads {other[0]!r} of the policy, and the "
                     "probability that a label is right is a function of log-probabilities only")
  return names


def _both_ways(term, outputs, batch):
  """Loss at the tokens of a pair as it is labelled, and with its labels exchanged; metrics."""
  exchanged = batch.replace(columns={**batch.columns, PREFERENCE: 1 - preferences(batch)})
  (kept, metrics), (other, _) = term(outputs, batch), term(outputs, exchanged)
  return kept, other, metrics


def _annotators(batch, annotator, annotators):
  """Index of the annotator of every sequence."""
  if annotator is None:
    return jnp.zeros(batch.num_sequences, jnp.int32)
  ids = column_of(batch, annotator, "rpo").astype(jnp.int32)
  return jnp.where((ids < 0) | (ids >= annotators), annotators - 1, ids)


def _expect(batch, memory, *, loss, annotator, annotators, rate):
  """E-step: the probability that the label of a pair is right, and what it says of annotators."""
  old = ModelOutputs(logprobs=batch.signals["old_logprobs"])
  kept, other, _ = _both_ways(_build(loss), old, batch)
  reliability, who = memory["reliability"], _annotators(batch, annotator, annotators)
  margin = mean_by_sequence(batch, other - kept)  # the same at both answers
  weight = jax.nn.sigmoid(margin + logit(reliability[who]))

  def by_annotator(values):
    return jax.ops.segment_sum(jnp.where(in_pairs(batch), values, 0), who, num_segments=annotators)
  count = by_annotator(jnp.ones_like(weight))
  mean = by_annotator(weight) / jnp.maximum(count, 1)
  found = {"rpo_weight": to_tokens(batch, weight)}
  for k in range(min(annotators, LOGGED)):
    found[f"rpo_reliability_{k}"] = jnp.where(batch.segment_ids != 0, reliability[k], 0)
  moved = jnp.where(count > 0, (1 - rate) * reliability + rate * mean, reliability)
  return found, {"reliability": moved}


@compose.carries(lambda reliability, annotators: {"reliability": jnp.full((annotators,), reliability,
                                                                          jnp.float32)})
@compose.prepares(_expect)
@compose.of_pairs
@compose.needs("old_logprobs", _signals)
def rpo(outputs: ModelOutputs, batch: TokenBatch, *, loss: str | Mapping[str, Any],
        reliability: float = 0.9, rate: float = 0.1, annotator: str | None = None,
        annotators: int = 1) -> TermOutput:
  """Robust preference optimisation by EM (RPO, RE-PO, arXiv:2509.24159), around a loss of pairs.

  With L+ the loss of a pair as it is labelled, L- with its labels exchanged, and eta_k the reliability of
  the annotator k who labelled it:

    p = s(L- - L+)                                       probability of the label under the policy
    w = p eta_k / (p eta_k + (1 - p) (1 - eta_k))        E-step: that the label is right; no gradient
    loss = -w log p - (1 - w) log(1 - p)                 M-step of the policy, whose gradient is w - p
    eta_k <- (1 - rate) eta_k + rate * mean of w         M-step of those who labelled pairs of the batch

  For `dpo`, p = s(beta h), so w = 1 is `dpo` itself; for its loss "ipo", p = s(2 h / beta), with h the
  difference of ratios. Labels that the policy comes to contradict are reversed. With eta = 0.5, w = p and
  nothing is learnt.

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `columns["preference"]` and what the loss reads.
    loss: a term of `jaxrl.objectives.preference` as in a config, `dict(name="dpo", beta=0.1)`.
    reliability: eta of all at the start, above 0.5, at most 1.
    rate: of the moving average that eta is.
    annotator: column with the number of who labelled a pair, from 0; None is one annotator for all.
    annotators: how many there are; greater numbers and negative ones share the last.

  Returns:
    Loss per token; the metrics of the loss, `rpo_weight` (mean w), `rpo_reversed` (share of pairs with w
    below 0.5) and `rpo_reliability_k` of the first eight annotators.

  Raises:
    ValueError: numbers out of range; a loss that is no function of the log-probabilities of one pair.
  """
  if not 0.5 < reliability <= 1 or not 0 <= rate <= 1 or annotators < 1:
    raise ValueError(f"rpo: reliability={reliability} has to be above 0.5 and at most 1, rate={rate} from "
                     f"0 to 1, annotators={annotators} at least 1")
  kept, other, metrics = _both_ways(_build(loss), outputs, batch)
  here = batch.loss_mask & (to_tokens(batch, in_pairs(batch).astype(jnp.float32)) > 0)
  margin, weight = jnp.where(here, other - kept, 0), batch.signals["rpo_weight"]
  values = -weight * jax.nn.log_sigmoid(margin) - (1 - weight) * jax.nn.log_sigmoid(-margin)
  metrics = {**metrics, "rpo_weight": weight, "rpo_reversed": (weight < 0.5).astype(jnp.float32)}
  for k in range(min(annotators, LOGGED)):
    metrics[f"rpo_reliability_{k}"] = batch.signals[f"rpo_reliability_{k}"]
  return jnp.where(here, values, 0), metrics
