"""Critiques that shape a reward model: language modelling beside preference, in one forward pass."""

import jax.numpy as jnp

from jaxrl.batch import CRITIQUE, ModelOutputs, TokenBatch, sum_by_sequence, to_tokens
from jaxrl.compose import by_sequence, needs
from jaxrl.objectives.aggregate import TermOutput


@by_sequence
@needs("logprobs")
def critique_likelihood(outputs: ModelOutputs, batch: TokenBatch, *, coefficient: float = 0.1
                        ) -> TermOutput:
  """Cross-entropy of the critique behind every answer (JRM, arXiv:2602.07533).

    loss = coefficient * mean over answers of -(1 / |c|) sum over t of log p(c_t | x, y, c_<t)

  Beside `bradley_terry` in `config.objective` it makes JRM's joint loss: the score is read where the
  answer ends, before the critique, so it cannot see it and judging costs no more; the critique reaches
  the hidden states that it is read from. With aggregation "sequence_mean", as above; an answer without
  a critique counts as 0.

  Args:
    outputs: supplies `logprobs`.
    batch: supplies critiques as loss tokens with the tag `batch.CRITIQUE`, see `data.critique`.
    coefficient: lambda.

  Returns:
    Loss per token; metric by sequence `critique_nll`, the mean above without its coefficient.
  """
  about = batch.loss_mask & (batch.tag_ids == CRITIQUE)
  length, own = (sum_by_sequence(batch, mask.astype(jnp.float32)) for mask in (batch.loss_mask, about))
  # All loss tokens of a sequence share its weight, whose part the critique alone is to have.
  share = to_tokens(batch, length / jnp.maximum(own, 1))
  values = jnp.where(about, -share * jnp.where(about, outputs.logprobs, 0), 0)
  return coefficient * values, {"critique_nll": values}
