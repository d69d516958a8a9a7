"""Constraints: rewards that hold only within a budget."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.advantages.chain import Credit
from jaxrl.batch import TokenBatch, mean_by_sequence, to_tokens
from jaxrl.compose import needs
from jaxrl.log_ratio import log_ratio

COSTS = {"kl": ("reference_kl",), "log_ratio": ("logprobs", "reference_logprobs")}


@needs(lambda cost: COSTS.get(cost, ()))
def constrain_divergence(batch: TokenBatch, rewards: Float[Array, "sequences"], *,
                         budget: float = 0.1, penalty: float = 1.0, mode: str = "replace",
                         cost: str = "kl") -> Credit:
  """Reward within a budget of divergence from a teacher, the reference (arXiv:2509.22921).

  With c_t the cost of loss token t and excess = max(0, mean_t(c_t) - budget):

    mode="replace":  r if excess = 0, else -penalty * (1 + excess)
    mode="keep":     r - penalty * excess

    cost="kl":         c_t = KL(policy || teacher) in the state before t, over the whole vocabulary
    cost="log_ratio":  c_t = log policy(t) - log teacher(t), of the sampled token

  A penalty that grows with the excess keeps answers of a group apart when all are over the budget.
  Of a sampled log-ratio an answer within the budget is at most exp(budget) times as likely as the
  teacher makes it, however rare that is: "kl" bounds the policy, not each answer.

  Args:
    batch: supplies `signals["reference_kl"]` of the policy that the batch began with, or
      `["logprobs"]` and `["reference_logprobs"]`.
    rewards: one per sequence.
    budget: nats per token.
    penalty: of what is over the budget, above 0, on the scale of rewards.
    mode: "replace" or "keep".
    cost: "kl" or "log_ratio".

  Returns:
    Rewards; the signal `over_budget`, 1 at the loss tokens of sequences that are, for
    `objectives.divergence_cost`; metrics `within_budget` (share of sequences), `divergence` (their
    mean cost) and `divergence_budget`.

  Raises:
    ValueError: unknown `mode` or `cost`, or `penalty` not above 0.
  """
  if mode not in ("replace", "keep"):
    raise ValueError(f"constrain_divergence: mode={mode!r}; valid are 'replace' and 'keep'")
  if cost not in COSTS:
    raise ValueError(f"constrain_divergence: cost={cost!r}; valid are 'kl' and 'log_ratio'")
  if isinstance(penalty, int | float) and not penalty > 0:
    raise ValueError(f"constrain_divergence: penalty={penalty} has to be above 0, on the scale of "
                     "rewards; 1.0 is usual")
  if cost == "kl":
    costs = batch.signals["reference_kl"]
  else:
    costs = log_ratio(batch, batch.signals["logprobs"], batch.signals["reference_logprobs"])
  scored = batch.sequence_mask
  divergence = jnp.where(scored, mean_by_sequence(batch, costs), 0)
  excess = jnp.where(scored, jnp.maximum(divergence - budget, 0), 0)
  over = excess > 0
  if mode == "keep":
    earned = rewards - penalty * excess
  else:
    earned = jnp.where(over, -penalty * (1 + excess), rewards)
  count = jnp.maximum(jnp.sum(scored), 1)
  metrics = {"within_budget": jnp.sum(scored & ~over) / count,
             "divergence": jnp.sum(divergence) / count,
             "divergence_budget": jnp.asarray(budget, jnp.float32)}
  signal = jnp.where(batch.loss_mask, to_tokens(batch, over.astype(jnp.float32)), 0)
  return Credit(jnp.where(scored, earned, 0), {"over_budget": signal}, metrics=metrics)
