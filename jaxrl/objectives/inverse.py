"""The reward model's loss in inverse reinforcement learning."""

import jax
import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.compose import needs
from jaxrl.objectives.aggregate import TermOutput


@needs("action_values", "expert_preference")
def fit_inverse_reward(outputs: ModelOutputs, batch: TokenBatch, *, coefficient: float = 1.0,
                       decay: float = 0.01) -> TermOutput:
  """Raises the learned reward of the expert and lowers that of the policy (rePIRL, arXiv:2602.07832).

    loss_t = coefficient * (-c_t * r(t) + decay / 2 * r(t)^2)

  with c_t the signal `expert_preference` of `advantages.inverse_rewards`. Without the second part
  nothing would bound a reward that both sides agree on. Give it the aggregation "sequence_mean".

  Args:
    outputs: supplies `action_values`.
    batch: supplies `signals["expert_preference"]`.
    coefficient: of the loss.
    decay: of rewards towards 0.

  Returns:
    Loss per token; metric `learned_reward`.
  """
  values = jnp.where(batch.loss_mask, outputs.action_values, 0)
  preference = jax.lax.stop_gradient(jnp.where(batch.loss_mask, batch.signals["expert_preference"], 0))
  return coefficient * (decay / 2 * values ** 2 - preference * values), {"learned_reward": values}
