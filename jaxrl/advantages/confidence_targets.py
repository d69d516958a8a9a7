"""What the confidence of an answer should have been."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.advantages.chain import Credit
from jaxrl.batch import TokenBatch, deviation_by_group, std_by_group, to_tokens


def target_confidence(batch: TokenBatch, rewards: Float[Array, "sequences"], *,
                      steepness: float | None = None) -> Credit:
  """Hands `objectives.confident_policy_gradient` its targets (C2GSPG, arXiv:2509.23129).

    steepness=None:  target_i = r_i, for rewards in {0, 1} or between
    otherwise:       target_i = sigmoid(steepness / std(r) * (r_i - mean(r))) over the group

  The second is for rewards without such bounds. There the direction of the target can contradict
  the advantage, and the term leaves it out where it does.

  Args:
    batch: supplies groups.
    rewards: one per sequence; they pass through unchanged.
    steepness: of the sigmoid, per standard deviation of the group.

  Returns:
    Credit with the rewards and the signal `confidence_target`; metric `confidence_target`, its mean,
    and `confidence_target_outside`, the share of targets outside of [0, 1], which has to be 0.
  """
  if steepness is None:
    target = rewards
  else:
    std = std_by_group(batch, rewards)
    target = jax.nn.sigmoid(steepness * deviation_by_group(batch, rewards) / jnp.where(
        std > 0, std, 1))
  count = jnp.maximum(jnp.sum(batch.sequence_mask), 1)
  outside = batch.sequence_mask & ((target < 0) | (target > 1))
  return Credit(rewards, signals={"confidence_target": to_tokens(batch, target)}, metrics={
      "confidence_target": jnp.sum(jnp.where(batch.sequence_mask, target, 0)) / count,
      "confidence_target_outside": jnp.sum(outside) / count})
