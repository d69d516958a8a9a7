"""Contrast: halves of a group, split by a metric, tell which direction of it pays."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl.advantages.chain import Credit, baseline
from jaxrl.batch import TokenBatch, count_by_group, mean_by_group, mean_by_sequence, sum_by_sequence
from jaxrl.compose import needs

METRICS, FOLLOWING = ("entropy", "length"), ("reward", "1 - reward")


@baseline
@needs(lambda metric: ("entropy",) if metric == "entropy" else ())
def contrast_halves(batch: TokenBatch, rewards: Float[Array, "sequences"], *,
                    metric: str = "entropy", mu: float | str = 1.0, alpha: float = 1.0,
                    disfavour: str = "upper") -> Credit:
  """Rewards against the mean of the other half of the group, or of the own (CANON,
  arXiv:2509.23962).

  A group is sorted by a metric; its lower half L has floor(n / 2) responses, the upper U the rest,
  with mean rewards m_L and m_U:

                    between halves       within a half
    i in U          r_i - m_L            r_i - m_U
    i in L          r_i - m_U            r_i - m_L
    advantage_i = mu * between_i + (1 - mu) * within_i

  With equal halves mu = 0.5 is Dr. GRPO's `r_i - mean(r)`. The mean advantages of the halves differ
  by 2 * mu * (m_U - m_L), so a larger mu moves the metric faster in the direction that pays; what
  differs within a half stays as it is. `alpha` below 1 makes it harder for one
  half to look better: with the upper half disfavoured, between_i is `alpha * r_i - m_L` there and
  `r_i - alpha * m_U` in the lower.

  Args:
    batch: supplies groups, and `signals["entropy"]` of the policy that the batch began with.
    rewards: one per sequence; masked sequences are ignored and get 0.
    metric: "entropy", the mean over a response's loss tokens, or "length", their number. Of equal
      ones the earlier response is the lower.
    mu: share of the comparison between halves; "reward" makes it the batch's mean reward, which has
      to lie in [0, 1] (first within, later between), "1 - reward" the reverse.
    alpha: factor of rewards in the half that is disfavoured.
    disfavour: "upper" or "lower".

  Returns:
    Credit with one advantage per sequence, 0 for a group of one; metrics `half_gap`, the mean over
    responses of m_U - m_L, and `contrast_mu`.

  Raises:
    ValueError: unknown `metric`, `mu` or `disfavour`.
  """
  _check(metric, mu, disfavour)
  measured = (mean_by_sequence(batch, batch.signals["entropy"]) if metric == "entropy"
              else sum_by_sequence(batch, batch.loss_mask.astype(rewards.dtype)))
  count = count_by_group(batch)
  upper = _rank_in_group(batch, measured) >= jnp.floor(count / 2)
  mean_upper, mean_lower = (_mean_of_half(batch, rewards, half) for half in (upper, ~upper))
  harder = upper if disfavour == "upper" else ~upper
  own = jnp.where(harder, alpha, 1.0) * rewards
  other = jnp.where(upper, mean_lower, mean_upper) * jnp.where(harder, 1.0, alpha)
  within = rewards - jnp.where(upper, mean_upper, mean_lower)
  if isinstance(mu, str):
    scored = jnp.maximum(jnp.sum(batch.sequence_mask), 1)
    mean = jnp.sum(jnp.where(batch.sequence_mask, rewards, 0)) / scored
    mu = mean if mu == "reward" else 1 - mean
  values = mu * (own - other) + (1 - mu) * within
  several = batch.sequence_mask & (count > 1)
  gap = jnp.sum(jnp.where(several, mean_upper - mean_lower, 0)) / jnp.maximum(jnp.sum(several), 1)
  return Credit(jnp.where(several, values, 0),
                metrics={"half_gap": gap, "contrast_mu": jnp.asarray(mu, jnp.float32)})


def _rank_in_group(batch: TokenBatch, measured: Float[Array, "sequences"]
                   ) -> Float[Array, "sequences"]:
  """How many scored responses of its group come before each."""
  index = jnp.arange(len(measured))
  same = (batch.group_ids[:, None] == batch.group_ids[None]) & batch.sequence_mask[None]
  before = (measured[None] < measured[:, None]) | (
      (measured[None] == measured[:, None]) & (index[None] < index[:, None]))
  return jnp.sum(same & before, axis=1).astype(jnp.float32)


def _mean_of_half(batch: TokenBatch, rewards, half: Bool[Array, "sequences"]):
  """Mean reward of that half of each one's group, at all responses of the group."""
  share = mean_by_group(batch, half.astype(rewards.dtype))
  total = mean_by_group(batch, jnp.where(half, rewards, 0))
  return total / jnp.where(share > 0, share, 1)


def _check(metric, mu, disfavour):
  if metric not in METRICS:
    raise ValueError(f"contrast_halves: metric={metric!r}; valid are 'entropy' and 'length'")
  if isinstance(mu, str) and mu not in FOLLOWING:
    raise ValueError(f"contrast_halves: mu={mu!r}; use a number, a schedule, 'reward' or "
                     "'1 - reward'")
  if disfavour not in ("upper", "lower"):
    raise ValueError(f"contrast_halves: disfavour={disfavour!r}; valid are 'upper' and 'lower'")
