"""Supervised tuning: imitate the tokens of the batch."""

import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.objectives.aggregate import TermOutput


def cross_entropy(outputs: ModelOutputs, batch: TokenBatch) -> TermOutput:
  """Negative log-likelihood of each loss token, in nats: `loss_t = -log pi(t)`.

  Metrics: `nll`, the same before sequence weights and aggregation; exp of it is the perplexity.
  """
  losses = -jnp.where(batch.loss_mask, outputs.logprobs, 0)
  return losses, {"nll": losses}
