"""Inverse reinforcement learning: a reward model that prefers the expert to the policy, token by token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.advantages.chain import Credit
from jaxrl.batch import TokenBatch, mean_by_sequence, sum_by_group, sum_by_sequence, to_tokens
from jaxrl.compose import needs

NEVER = -1e9


@needs("action_values", "logprobs")
def inverse_rewards(batch: TokenBatch, rewards: Float[Array, "sequences"], *,
                    entropy: float = 0.001, temperature: float = 1.0, max_weight: float = 0.2,
                    outcome: float = 0.0) -> Credit:
  """Returns under a learned reward, and how that is to change (rePIRL, arXiv:2602.07832).

  With r(t) the critic's value at token t, r0 its mean over the tokens of all answers of the policy, and
  for each answer j of the policy to a prompt

    R_j = sum_t (r(t) - r0 - entropy * log policy(t)) + outcome * (its given reward)
    w_j = softmax_j((mean_t r(t) - mean_t log policy(t)) / temperature), at most max_weight

  the log-likelihood of the expert under p(tau) ~ exp(R(tau)) has the gradient of r at the expert minus
  that at the policy's answers, weighed by w: importance weights of the policy as the proposal for
  the partition function. R is the return from the first token on, undiscounted, one for the whole
  answer: the card's A_j has no token index, and its discount is 1 by default. Means in place of sums keep w
  from preferring short answers, and r0 keeps R from preferring long ones; what a cap cuts off is lost.

  Args:
    batch: supplies groups, `columns["expert"]` of `rollouts.group_and_expert`,
      `signals["action_values"]` and `signals["logprobs"]`.
    rewards: of the outcome, one per sequence.
    entropy: weight of the policy's own log-probability (the paper's lambda).
    temperature: of the weights.
    max_weight: of one answer; at least 1 / samples.
    outcome: weight of the given rewards; 0 reads no label.

  Returns:
    Credit with R per sequence, centred over the answers of the policy, 0 at experts; the signal
    `expert_preference`: 1 at the expert's tokens, -w_j at those of answer j; metrics `expert_margin`
    (mean r of experts minus that of answers), `inverse_weight_max` and `outcome_correlation`, how R
    and the given rewards go together.

  Raises:
    ValueError: no column `expert`.
  """
  if "expert" not in batch.columns:
    raise ValueError("inverse_rewards needs the column 'expert' of an episode, such as dict(name="
                     "'group_and_expert') in config.rollout.episode")
  scored = batch.sequence_mask
  expert = scored & (batch.columns["expert"] > 0)
  own = scored & ~expert
  mask, values = batch.loss_mask, batch.signals["action_values"]
  mean_value = mean_by_sequence(batch, values)
  score = jnp.where(own, (mean_value - mean_by_sequence(batch, batch.signals["logprobs"])
                          ) / temperature, NEVER)
  highest = jax.ops.segment_max(score, jnp.maximum(batch.group_ids, 0),
                                num_segments=batch.num_sequences)[jnp.maximum(batch.group_ids, 0)]
  share = jnp.where(own, jnp.exp(score - highest), 0)
  total = sum_by_group(batch, share)
  weight = jnp.minimum(jnp.where(own, share / jnp.where(total > 0, total, 1), 0), max_weight)

  def mean_over(which, x):
    return jnp.sum(jnp.where(which, x, 0)) / jnp.maximum(jnp.sum(which), 1)
  level = mean_over(mask & to_tokens(batch, own), values)
  learned = sum_by_sequence(batch, jnp.where(
      mask, values - level - entropy * batch.signals["logprobs"], 0)) + outcome * rewards
  centred = jnp.where(own, learned - mean_over(own, learned), 0)
  given = jnp.where(own, rewards - mean_over(own, rewards), 0)
  scale = jnp.sqrt(jnp.sum(centred ** 2) * jnp.sum(given ** 2))
  preference = to_tokens(batch, jnp.where(expert, 1.0, -weight))
  return Credit(centred, signals={"expert_preference": jnp.where(mask, preference, 0)}, metrics={
      "expert_margin": mean_over(expert, mean_value) - mean_over(own, mean_value),
      "inverse_weight_max": jnp.max(weight),
      "outcome_correlation": jnp.sum(centred * given) / jnp.where(scale > 0, scale, 1)})
