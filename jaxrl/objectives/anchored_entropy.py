"""A penalty on entropy that has left its anchor, up or down."""

import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.compose import needs
from jaxrl.objectives.aggregate import TermOutput


@needs(lambda p: (f"nucleus_entropy@{p}", f"old_nucleus_entropy@{p}"),
       "entropy_peaks", "entropy_gap")
def anchored_entropy(outputs: ModelOutputs, batch: TokenBatch, *, coefficient: float = 0.005,
                     p: float = 0.8) -> TermOutput:
  """Squared distance of the entropy at peaks from its anchor (SIREN, arXiv:2509.25133).

  Of `coefficient * gap^2`, which is a square of a mean over the batch, this is the tangent at the
  policy that the batch began with. With s_t = `entropy_peaks`, H inside the nucleus:

    loss_t = coefficient * s_t * (gap^2 + 2 * gap * (H_t - H_old_t))

  At the first update on a batch its value and gradient are those of the square; later ones follow
  the same direction. Its aggregation has to be its own, "sequence_sum", whose sum over s_t is 1:
  `dict(name="anchored_entropy", aggregation="sequence_sum")`.

  Args:
    outputs: supplies `nucleus_entropy@P`.
    batch: supplies `signals["entropy_peaks"]` and `["entropy_gap"]`, of
      `advantages.anchor_entropy`, and `["old_nucleus_entropy@P"]`.
    coefficient: of the square.
    p: mass of the nucleus, as in `anchor_entropy`.

  Returns:
    Loss per token; metric `nucleus_entropy`.
  """
  mask = batch.loss_mask
  now = jnp.where(mask, outputs.get(f"nucleus_entropy@{p}"), 0)
  old = jnp.where(mask, batch.signals[f"old_nucleus_entropy@{p}"], 0)
  shares = jnp.where(mask, batch.signals["entropy_peaks"], 0)
  gap = jnp.where(mask, batch.signals["entropy_gap"], 0)
  return coefficient * shares * (gap ** 2 + 2 * gap * (now - old)), {"nucleus_entropy": now}
