"""Valuation: the policy's own log-ratio is fitted, as an action value, to a target."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.compose import needs
from jaxrl.log_ratio import kl_estimate, log_ratio
from jaxrl.objectives.aggregate import TermOutput


@needs("mean_logprobs", "old_logprobs", "old_mean_logprobs")
def random_policy_valuation(outputs: ModelOutputs, batch: TokenBatch, *, rho: float = 1.0
                            ) -> TermOutput:
  """Values of the uniformly random policy, fitted by the log-ratio (ROVER, arXiv:2509.24981).

  With `old` the policy that the batch began with and |V| the size of the vocabulary:

    Q_t = rho * (log pi(a_t | s_t) - log old(a_t | s_t))
    V_t+1 = 1 / |V| * sum_a rho * (log pi(a | s_t+1) - log old(a | s_t+1)),   0 after the last token
    loss_t = (Q_t - stop_gradient(A_t + V_t+1))^2

  s_t+1 is the state before the next loss token of the sequence. The paper's A is the reward minus
  the mean of its group, without a scale (`center_by_group`), its average over tokens "token_mean".
  At the first update on a batch Q and V are 0, and the gradient is that of `reinforce` times 2 rho:
  only later updates on the same batch (`config.rollout.updates`) differ. Nothing is clipped.

  Args:
    outputs: supplies `logprobs` and `mean_logprobs`.
    batch: supplies `signals["advantages"]`, `["old_logprobs"]` and `["old_mean_logprobs"]`.
    rho: temperature of the values, above 0.

  Returns:
    Loss per token; metrics `action_value` (Q), `successor_value` (V) and `behaviour_kl`, an
    estimate of KL(old || policy).

  Raises:
    ValueError: `rho` is not above 0.
  """
  if isinstance(rho, int | float) and not rho > 0:
    raise ValueError(f"random_policy_valuation: rho={rho} has to be above 0; 1.0 is the paper's")
  drift = log_ratio(batch, outputs.logprobs, batch.signals["old_logprobs"])
  mean_drift = log_ratio(batch, outputs.get("mean_logprobs"), batch.signals["old_mean_logprobs"])
  action = rho * drift
  successor = _at_next_loss_token(batch, rho * mean_drift)
  advantages = jnp.where(batch.loss_mask, batch.signals["advantages"], 0)
  target = jax.lax.stop_gradient(advantages + successor)
  metrics = {"action_value": action, "successor_value": successor,
             "behaviour_kl": kl_estimate(-drift, "k3")}
  return jnp.where(batch.loss_mask, (action - target) ** 2, 0), metrics


def _at_next_loss_token(batch: TokenBatch, values: Float[Array, "rows length"]
                        ) -> Float[Array, "rows length"]:
  """At each loss token the value of the sequence's next one; 0 at its last, and elsewhere."""
  length = batch.tokens.shape[1]
  index = jnp.where(batch.loss_mask, jnp.arange(length), length)
  from_here = jax.lax.cummin(index, axis=1, reverse=True)
  after = jnp.concatenate([from_here[:, 1:], jnp.full_like(from_here[:, :1], length)], axis=1)
  at = jnp.minimum(after, length - 1)
  same = jnp.take_along_axis(batch.sequence_ids, at, axis=1) == batch.sequence_ids
  follows = batch.loss_mask & (after < length) & same
  return jnp.where(follows, jnp.take_along_axis(values, at, axis=1), 0)
