"""Losses of pairs whose preferences are compared with one another: which of two is the stronger."""

import jax
import jax.numpy as jnp

from jaxrl.batch import PADDING, STRONGER, TUPLE, ModelOutputs, TokenBatch
from jaxrl.batch import column_of, sum_by_group, to_tokens
from jaxrl.compose import needs, of_pairs, prepares
from jaxrl.objectives.aggregate import TermOutput
from jaxrl.objectives.pairs import check_numbers, constant_of, diagnostics, in_pairs, loss_of_pairs
from jaxrl.objectives.pairs import of_other, preferences, reduce, token_weights
from jaxrl.objectives.preference import logistic


def _margins(batch, *, beta, most, model):
  """At the tokens of a tuple's stronger pair, the clipped margin of its weaker one; 0 elsewhere."""
  ratio = batch.signals[f"{model}_logprobs"] - batch.signals["reference_logprobs"]
  signed = (2 * preferences(batch) - 1) * reduce(batch, ratio, token_weights(batch))
  margin = jnp.clip(beta * sum_by_group(batch, signed), 0, most)
  stronger = column_of(batch, STRONGER, "dpo_pop") > 0.5
  tuples = jnp.where(batch.sequence_mask, column_of(batch, TUPLE, "dpo_pop"), PADDING).astype(jnp.int32)
  weaker = (in_pairs(batch) & ~stronger).astype(jnp.float32)

  def by_tuple(values):
    return jax.ops.segment_sum(values * weaker, tuples, num_segments=batch.num_sequences)
  of_tuple = by_tuple(margin) / jnp.maximum(by_tuple(jnp.ones_like(margin)), 1)
  return {"pop_margin": to_tokens(batch, jnp.where(stronger, of_tuple[jnp.maximum(tuples, 0)], 0))}


@prepares(_margins)
@of_pairs
@needs("reference_logprobs", lambda model: (f"{model}_logprobs",))
def dpo_pop(outputs: ModelOutputs, batch: TokenBatch, *, beta: float = 0.1, most: float = 5.0,
            model: str = "average") -> TermOutput:
  """DPO with margins from preferences over preferences (DPO-PoP, arXiv:2509.22851).

  A tuple is two pairs, i with a preference that is judged stronger than that of j. With D_m the margin
  beta h of a pair under a model m, and m an average of policies, which passes no gradient:

    loss_i = -log s(D_i - clip(D_j of m, 0, most)),    loss_j = -log s(D_j)

  Both are the mean over pairs, so half of the mean over tuples of their sum.

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `columns["preference"]`, 1 and 0; `columns["tuple"]`, the number of the tuple in the
      batch; `columns["stronger"]`, 1 for the answers of its stronger pair and 0 for those of the other
      (`data.pairs_of_pairs`); and `reference_logprobs` and those of the model.
    beta: as in `dpo`.
    most: largest margin, above 0.
    model: a model of `config.frozen`, such as a moving average; or "old", the policy itself.

  Returns:
    Loss per token; the metrics of `dpo`, and `pop_margin`, 0 for weaker pairs.

  Raises:
    ValueError: numbers out of range, or columns that the batch lacks.
  """
  check_numbers("dpo_pop", above_0=dict(beta=beta, most=most))
  ratio = outputs.logprobs - batch.signals["reference_logprobs"]
  reward = beta * reduce(batch, ratio, token_weights(batch))
  h, margin = reward - of_other(batch, reward), constant_of(batch, "pop_margin")
  return loss_of_pairs(batch, logistic(h - margin)), {
      **diagnostics(batch, reward, h), "pop_margin": batch.signals["pop_margin"]}
