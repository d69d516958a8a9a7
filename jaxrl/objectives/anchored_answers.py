"""First answers that stay what they are while second ones are learnt."""

import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.compose import needs
from jaxrl.log_ratio import kl_estimate, log_ratio
from jaxrl.objectives.aggregate import TermOutput

ANCHOR = 3  # `tag_ids` that `rollouts.recombined_corrections` gives such answers


@needs("reference_logprobs")
def anchor_first_answers(outputs: ModelOutputs, batch: TokenBatch, *, beta: float = 0.01,
                         estimator: str = "k3") -> TermOutput:
  """Holds first answers near the reference (Octopus, arXiv:2602.08503, stage 1).

    loss_t = beta * KL(policy || reference) at t where `tag_ids` are 3, else 0

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `tag_ids` and `signals["reference_logprobs"]`.
    beta: coefficient.
    estimator: as in `kl`.

  Returns:
    Loss per token; metric `anchor_kl`, summed over first answers and divided by all loss tokens.
  """
  difference = log_ratio(batch, outputs.logprobs, batch.signals["reference_logprobs"])
  anchored = batch.loss_mask & (batch.tag_ids == ANCHOR)
  estimate = kl_estimate(jnp.where(anchored, difference, 0), estimator)
  return beta * estimate, {"anchor_kl": estimate}
