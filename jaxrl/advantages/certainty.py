"""Certainty: how sure the policy was of a whole answer weighs what the verdict says about it."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.advantages.chain import Credit, baseline
from jaxrl.batch import (TokenBatch, count_by_group, deviation_by_group, mean_by_group,
                         mean_by_sequence, std_by_group, sum_by_group)


@baseline
def weigh_by_certainty(batch: TokenBatch, rewards: Float[Array, "sequences"], *, low: float = 0.8,
                       high: float = 2.0, all_wrong: float = -1.0, right_from: float = 0.5,
                       renormalise: bool = False, epsilon: float = 1e-6) -> Credit:
  """Confident right answers learn more, uncertain wrong ones less (EGPO, arXiv:2602.22751).

  With H_i the mean over loss tokens of -log behaviour(t), an entropy that the sampler gives for free,
  and v_i = 1 for a right answer and -1 for a wrong one:

    ratio_i = mean_j(H_j) / (H_i + epsilon)
    w_i = max(1, clip(ratio_i, low, high)) if right else min(1, clip(ratio_i, low, high))
    base_i = (v_i - mean(v)) / std(v)  in a group with both,  all_wrong  if none is right,  else 0
    advantage_i = w_i * base_i

  So w is in [1, high] for right answers and in [low, 1] for wrong ones: a confident failure keeps
  weight 1. Weights break the zero sum of a group, whose net push is upwards.

  Args:
    batch: supplies groups and `behaviour_logprobs`.
    rewards: one per sequence; masked sequences are ignored and get 0.
    low, high: bounds of the weight, around 1.
    all_wrong: advantage, before its weight, in groups without a right answer; 0 leaves them out.
    right_from: smallest reward of a right answer: 0.5 for {0, 1}, 0 for {-1, 1}.
    renormalise: divide the weights of a group by their mean, after the clamp.
    epsilon: keeps the ratio of an answer without any entropy finite.

  Returns:
    Credit with one advantage per sequence; metrics `certainty_weight`, its mean, and
    `entropy_gap_of_wrong`, the mean H of wrong answers minus that of right ones (0 without either).

  Raises:
    ValueError: bounds that do not lie around 1.
  """
  if isinstance(low, int | float) and isinstance(high, int | float) and not 0 <= low <= 1 <= high:
    raise ValueError(f"weigh_by_certainty: low={low}, high={high} have to lie around 1, as 0.8 and 2")
  scored = batch.sequence_mask
  surprise = jnp.where(scored, -mean_by_sequence(batch, batch.behaviour_logprobs), 0)
  right = scored & (rewards >= right_from)
  ratio = jnp.clip(mean_by_group(batch, surprise) / (surprise + epsilon), low, high)
  weight = jnp.where(right, jnp.maximum(1, ratio), jnp.minimum(1, ratio))
  if renormalise:
    weight = weight / jnp.maximum(mean_by_group(batch, weight), epsilon)
  verdict = jnp.where(right, 1.0, -1.0)
  std = std_by_group(batch, verdict, ddof=0)
  rights = sum_by_group(batch, right.astype(rewards.dtype))
  base = jnp.where(std > 0, deviation_by_group(batch, verdict) / jnp.where(std > 0, std, 1),
                   jnp.where(rights == 0, all_wrong, 0.0))

  def mean_over(mask, values):
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)
  wrong = scored & ~right
  both = jnp.any(right) & jnp.any(wrong)
  gap = jnp.where(both, mean_over(wrong, surprise) - mean_over(right, surprise), 0)
  return Credit(jnp.where(scored & (count_by_group(batch) > 0), weight * base, 0), metrics={
      "certainty_weight": mean_over(scored, weight), "entropy_gap_of_wrong": gap})
