"""Corrections: penalties inside the reward, and weights for samples of another policy."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.advantages.chain import Credit
from jaxrl.batch import TokenBatch, at_last_tokens, sum_by_sequence, to_tokens
from jaxrl.compose import needs
from jaxrl.log_ratio import cap, kl_estimate, log_ratio


@needs("logprobs", "reference_logprobs")
def penalise_kl(batch: TokenBatch, rewards: Float[Array, "sequences"], *, beta: float,
                estimator: str = "k1", level: str = "sequence") -> Credit:
  """Takes `beta * KL(policy || reference)` off the reward (arXiv:1909.08593, eq. 2).

    level="sequence":  r - beta * sum_t KL_t           one reward, for group baselines
    level="token":     -beta * KL_t, plus r at the last loss token, for `gae`

  With the estimator k1, whose mean is the KL, the policy gradient of this reward is that of
  `E[r] - beta * KL`. As a term of the loss the KL has other gradients: see `objectives.kl`.

  Args:
    batch: supplies `signals["logprobs"]` of the policy that the batch began with, and
      `signals["reference_logprobs"]`.
    rewards: one per sequence.
    beta: coefficient, per token.
    estimator: "k1", "k2" or "k3".
    level: "sequence" or "token".

  Returns:
    Rewards of the level; metric `reward_kl`, the mean of the sums over sequences.
  """
  if level not in ("token", "sequence"):
    raise ValueError(f"penalise_kl: level={level!r}; valid are 'token' and 'sequence'")
  difference = log_ratio(batch, batch.signals["logprobs"], batch.signals["reference_logprobs"])
  kl = kl_estimate(difference, estimator)
  total = jnp.where(batch.sequence_mask, sum_by_sequence(batch, kl), 0)
  metrics = {"reward_kl": jnp.sum(total) / jnp.maximum(jnp.sum(batch.sequence_mask), 1)}
  if level == "token":
    return Credit(at_last_tokens(batch, rewards) - beta * kl, metrics=metrics)
  return Credit(rewards - beta * total, metrics=metrics)


@needs("logprobs", "reference_logprobs")
def penalise_centred_kl(batch: TokenBatch, values: Float[Array, "sequences"], *, beta: float
                        ) -> Credit:
  """Ranks answers by their distance from the reference, and shifts none on the whole (T1,
  arXiv:2501.11651).

    k_i = sum_t log(policy(t) / reference(t)),    value_i = v_i - beta * (k_i - mean over the batch of k)

  Args:
    batch: supplies `signals["logprobs"]` of the policy that the batch began with, and
      `signals["reference_logprobs"]`.
    values: one per sequence, rewards or advantages; masked sequences get 0.
    beta: coefficient.

  Returns:
    Credit of values whose sum is that of the values before; metric `centred_kl`, the mean of k.
  """
  scored = batch.sequence_mask
  difference = log_ratio(batch, batch.signals["logprobs"], batch.signals["reference_logprobs"])
  total = jnp.where(scored, sum_by_sequence(batch, difference), 0)
  mean = jnp.sum(total) / jnp.maximum(jnp.sum(scored), 1)
  return Credit(jnp.where(scored, values - beta * (total - mean), 0), metrics={"centred_kl": mean})


@needs("logprobs")
def truncate_importance(batch: TokenBatch, values: Float[Array, "..."], *, cap_at: float = 2.0,
                        level: str = "token") -> Credit:
  """Weighs advantages by how much likelier the trainer finds the samples than the sampler did.

    w_t = min(pi_trainer(t) / pi_sampler(t), cap_at),    level="sequence": of the whole sequence

  Both have the same parameters; they differ by precision (`config.rollout.weights_dtype`) or by
  staleness. Truncated importance sampling (Ionides, 2008; TIS in verl and TRL) leaves the ratio of
  the surrogate to speak of the trainer's policy alone: use `clipped_surrogate(anchor="old")`.

  Args:
    batch: supplies `signals["logprobs"]`, of the trainer at the start of the batch, and
      `behaviour_logprobs`.
    values: one per sequence or per token.
    cap_at: largest weight.
    level: "token" or "sequence".

  Returns:
    One value per token; metrics `importance_weight` and `importance_capped`, means over loss tokens.
  """
  if level not in ("token", "sequence"):
    raise ValueError(f"truncate_importance: level={level!r}; valid are 'token' and 'sequence'")
  if isinstance(cap_at, int | float) and not cap_at > 0:
    raise ValueError(f"truncate_importance: cap_at={cap_at} has to be above 0, or nothing would be "
                     "learned; 2.0 is usual")
  ratios = log_ratio(batch, batch.signals["logprobs"], batch.behaviour_logprobs)
  if level == "sequence":
    ratios = to_tokens(batch, sum_by_sequence(batch, ratios))
  ratio = jnp.exp(cap(ratios))
  weight = jnp.minimum(ratio, cap_at)
  per_token = values if values.ndim == 2 else to_tokens(batch, values)
  count = jnp.maximum(jnp.sum(batch.loss_mask), 1)

  def mean(x):
    return jnp.sum(jnp.where(batch.loss_mask, x, 0)) / count
  return Credit(jnp.where(batch.loss_mask, weight * per_token, 0),
                metrics={"importance_weight": mean(weight),
                         "importance_capped": mean(ratio > cap_at)})


@needs("logprobs")
def mask_disagreement(batch: TokenBatch, values: Float[Array, "..."], *, low: float = 0.5,
                      high: float = 5.0) -> Credit:
  """Takes credit from tokens on whose probability trainer and sampler disagree too much (as IcePop does).

    k_t = pi_trainer(t) / pi_sampler(t),    value_t = v_t if low <= k_t <= high else 0

  Both have the same parameters, as in `truncate_importance`. Such tokens still count in the denominators
  of means.

  Args:
    batch: supplies `signals["logprobs"]`, of the trainer at the start of the batch, and
      `behaviour_logprobs`.
    values: one per sequence or per token.
    low, high: of the ratios that are trusted, below and above 1.

  Returns:
    One value per token; metric `disagreement`, the share of loss tokens that lost their credit.
  """
  known = all(isinstance(bound, int | float) for bound in (low, high))  # and follow no schedule
  if known and not 0 <= low < 1 < high:
    raise ValueError(f"mask_disagreement: low={low}, high={high}; equal probabilities have a ratio of 1, "
                     "which has to lie between them: 0.5 and 5.0, say")
  ratios = jnp.exp(cap(log_ratio(batch, batch.signals["logprobs"], batch.behaviour_logprobs)))
  per_token = values if values.ndim == 2 else to_tokens(batch, values)
  trusted = (ratios >= low) & (ratios <= high)
  masked = jnp.sum(batch.loss_mask & ~trusted) / jnp.maximum(jnp.sum(batch.loss_mask), 1)
  return Credit(jnp.where(batch.loss_mask & trusted, per_token, 0), metrics={"disagreement": masked})
