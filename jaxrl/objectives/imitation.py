"""Imitation inside reinforcement: some sequences of a batch are examples."""

import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch, to_tokens
from jaxrl.objectives.aggregate import TermOutput


def imitate_marked(outputs: ModelOutputs, batch: TokenBatch, *, coefficient: float = 1.0
                   ) -> TermOutput:
  """Negative log-likelihood of the sequences that are marked: `loss_t = -coefficient * log pi(t)`.

  A marked sequence has no advantage of its own where it is alone in its group, so a policy term
  beside this one leaves it alone.

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `columns["imitate"]`, 1 for examples and 0 for samples, as
      `rollouts.annealing.heat_once` does.
    coefficient: of the loss.

  Returns:
    Loss per token; metric `imitation`, the loss before its coefficient.

  Raises:
    ValueError: no such column.
  """
  if "imitate" not in batch.columns:
    raise ValueError("imitate_marked needs the column 'imitate' of an edit, such as dict(name="
                     "'jaxrl.rollouts.annealing:heat_once') in config.rollout.edits")
  marked = batch.loss_mask & (to_tokens(batch, batch.columns["imitate"]) > 0)
  loss = jnp.where(marked, -jnp.where(marked, outputs.logprobs, 0), 0)
  return coefficient * loss, {"imitation": loss}
