"""Texts that are imitated beside rollouts, in the same update."""

import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.objectives.aggregate import TermOutput

TEXT = 4  # `tag_ids` of such texts, as `rollouts.predict_tokens` gives them


def next_tokens(outputs: ModelOutputs, batch: TokenBatch, *, coefficient: float = 0.1
                ) -> TermOutput:
  """Next-token prediction of texts in a batch of rollouts (RMT, arXiv:2509.24375).

    loss_t = -coefficient * log pi(t) at t where `tag_ids` are 4, else 0

  Tokens of a text that are learnt by reinforcement are off its loss mask. The paper adds up over
  tokens; here `config.aggregation` decides.

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `tag_ids`.
    coefficient: lambda.

  Returns:
    Loss per token; metric `text_nll`, summed over texts and divided by all loss tokens.
  """
  losses = -jnp.where(batch.loss_mask & (batch.tag_ids == TEXT), outputs.logprobs, 0)
  return coefficient * losses, {"text_nll": losses}
