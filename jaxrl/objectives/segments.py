"""Segments: losses on a part of an answer."""

import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.compose import needs
from jaxrl.objectives.aggregate import TermOutput


@needs("entropy")
def execution_entropy(outputs: ModelOutputs, batch: TokenBatch, *, coefficient: float
                      ) -> TermOutput:
  """Makes executions certain: `loss_t = coefficient * H(t)` where `tag_ids` are 2, else 0.

  The other part, plans, keeps its entropy (E2C, arXiv:2509.23946). H is the entropy of the policy
  at the token, in nats. Metric: `execution_entropy`, summed over executions and divided by all loss
  tokens.
  """
  at = batch.loss_mask & (batch.tag_ids == 2)
  entropies = jnp.where(at, outputs.entropy, 0)
  return coefficient * entropies, {"execution_entropy": entropies}
