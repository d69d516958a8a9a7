"""The critic's loss."""

import jax
import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.compose import needs
from jaxrl.objectives.aggregate import TermOutput


@needs("values", "returns",
       lambda clip: () if clip is None else ("old_values",))
def value_loss(outputs: ModelOutputs, batch: TokenBatch, *, coefficient: float = 0.5,
               clip: float | None = 0.2) -> TermOutput:
  """Squared error of the values, clipped around those before the update (PPO, arXiv:1707.06347).

    loss_t = coefficient / 2 * max((V_t - R_t)^2, (clip(V_t, V_old - clip, V_old + clip) - R_t)^2)

  The factor 1/2 is TRL's and verl's too; OpenAI's baselines have it as well.

  Args:
    outputs: supplies `values`.
    batch: supplies `signals["returns"]`, of `advantages.gae`, and with a clip
      `signals["old_values"]`.
    coefficient: of the loss.
    clip: how far a value may move from its old one before it has no gradient; None is no clip.

  Returns:
    Loss per token; metrics `value_error`, the squared error, and with a clip
    `value_clip_fraction`.
  """
  if isinstance(clip, int | float) and not clip > 0:
    raise ValueError(f"value_loss: clip={clip} has to be above 0; 0.2 is usual, None is no clip")
  mask, returns = batch.loss_mask, jax.lax.stop_gradient(batch.signals["returns"])
  values = jnp.where(mask, outputs.values, 0)
  error = jnp.where(mask, values - returns, 0) ** 2
  metrics = {"value_error": error}
  if clip is None:
    return coefficient / 2 * error, metrics
  old = jnp.where(mask, batch.signals["old_values"], 0)
  clipped = jnp.where(mask, jnp.clip(values, old - clip, old + clip) - returns, 0) ** 2
  metrics["value_clip_fraction"] = (clipped > error).astype(error.dtype)
  return coefficient / 2 * jnp.maximum(error, clipped), metrics
