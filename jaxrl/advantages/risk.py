"""Risk: baselines that lie between the mean of a group and its best or worst reward."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.advantages.chain import baseline
from jaxrl.batch import (TokenBatch, deviation_by_group, max_by_group, mean_by_group,
                         min_by_group)


@baseline
def risk_seeking(batch: TokenBatch, rewards: Float[Array, "sequences"], *, beta: float = 2.0
                 ) -> Float[Array, "sequences"]:
  """Advantage of exponential utility (RS-GRPO, arXiv:2509.24261).

    soft = log(mean_j(exp(beta * r_j))) / beta
    advantage_i = (exp(beta * (r_i - soft)) - 1) / beta

  the group's estimate of the policy gradient of `log(E[exp(beta * r)]) / beta`, which is the mean
  reward for beta -> 0, where this is `center_by_group`, and the best (worst) reward for beta -> inf
  (-inf). Every group has mean 0. Of rewards in {0, 1} with a share p of right answers, the sum over
  right ones is largest at p = 1 / (1 + exp(beta / 2)): a larger beta looks at harder prompts.

  Args:
    batch: supplies `group_ids` and `sequence_mask`.
    rewards: one per sequence; masked sequences are ignored and get 0.
    beta: above 0 seeks risk, 0 is neutral, below 0 avoids it.

  Returns:
    Exactly 0 in groups of one value, singletons included (the released code gives a singleton the
    advantage that it has over a reward of 0).
  """
  # With g_i = (exp(beta * (r_i - origin)) - 1) / beta the advantage is (g_i - mean g) / (1 + beta *
  # mean g), whatever the origin. At the extreme that beta favours no exponential is above 1, and
  # nothing is divided that cancels for small beta.
  origin = jnp.where(beta < 0, min_by_group(batch, rewards), max_by_group(batch, rewards))
  distance = jnp.where(batch.sequence_mask, rewards - origin, 0)
  utility = jnp.where(beta == 0, distance,
                      jnp.expm1(beta * distance) / jnp.where(beta == 0, 1, beta))
  return deviation_by_group(batch, utility) / (1 + beta * mean_by_group(batch, utility))
