"""What a constraint costs, as a loss."""

import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.compose import needs
from jaxrl.objectives.aggregate import TermOutput


@needs("reference_kl", "over_budget")
def divergence_cost(outputs: ModelOutputs, batch: TokenBatch, *, penalty: float = 1.0
                    ) -> TermOutput:
  """Divergence from the teacher where an answer is over its budget (arXiv:2509.22921).

    loss_t = penalty * over_t * KL(policy || reference) in the state before t, over the vocabulary

  A reward that holds a divergence depends on the policy itself: besides the policy gradient of
  `advantages.constrain_divergence` the gradient of its mean has this part, with the same `penalty`
  and the aggregation "sequence_mean", for the budget is per token:
  `dict(name="divergence_cost", penalty=1.0, aggregation="sequence_mean")`. A scale of the
  advantages by the deviation of the group does not reach it.

  Args:
    outputs: supplies `reference_kl`.
    batch: supplies `signals["over_budget"]`, of `constrain_divergence(cost="kl")`.
    penalty: as there.

  Returns:
    Loss per token; metric `reference_kl`.
  """
  kl = jnp.where(batch.loss_mask, outputs.get("reference_kl"), 0)
  over = jnp.where(batch.loss_mask, batch.signals["over_budget"], 0)
  return penalty * over * kl, {"reference_kl": kl}
