"""Modes: the decision to think is compared across modes, an answer with its like.

Both pieces read `columns["mode"]` as `rollouts.answer_in_mode` writes it: 1 with thought, 2
without, 0 undecided.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.advantages.chain import Credit, baseline
from jaxrl.batch import (TokenBatch, deviation_by_group, max_by_group, mean_by_group, std_by_group,
                         sum_by_sequence, to_tokens)

UNDECIDED, ON, OFF = 0, 1, 2


def favour_direct_mode(batch: TokenBatch, rewards: Float[Array, "sequences"], *, omega: float = 0.01
                       ) -> Credit:
  """Raises the rewards of direct answers where thinking gains next to nothing (HiPO,
  arXiv:2509.23967).

    b = omega * mean_on(r),    r_i <- r_i + b  for i in mode off,  if 0 <= mean_on - mean_off <= b

  with means over a group's answers in that mode. Where on gains at most a share of omega, off is
  then the better mode, at the bound as good; elsewhere nothing changes.

  Args:
    batch: supplies `columns["mode"]`.
    rewards: one per sequence, not negative.
    omega: share of the reward with thought that a gain has to exceed; 0 changes no reward.

  Returns:
    Rewards; metrics `thinking_rate` (answers in mode on), `direct_favoured` (answers in groups
    where the rule applied), and `thinking_tokens` and `direct_tokens`, mean lengths by mode.
  """
  mode, present = _mode(batch, "favour_direct_mode"), {}
  means = {}
  for m in (ON, OFF):
    inside = jnp.where(mode == m, _mean_of_own_mode(batch, rewards, mode), -jnp.inf)
    highest = max_by_group(batch, inside)  # all of them are the mean, exactly
    present[m] = jnp.isfinite(highest) & batch.sequence_mask
    means[m] = jnp.where(present[m], highest, 0)
  gain, bonus = means[ON] - means[OFF], omega * means[ON]
  applies = present[ON] & present[OFF] & (0 <= gain) & (gain <= bonus)
  lengths = sum_by_sequence(batch, batch.loss_mask.astype(rewards.dtype))
  scored = batch.sequence_mask
  return Credit(rewards + jnp.where(applies & (mode == OFF), bonus, 0), metrics={
      "thinking_rate": _mean(scored, mode == ON), "direct_favoured": _mean(scored, applies),
      "thinking_tokens": _mean(scored & (mode == ON), lengths),
      "direct_tokens": _mean(scored & (mode == OFF), lengths)})


@baseline
def compare_modes(batch: TokenBatch, rewards: Float[Array, "sequences"], *, gamma: float = 0.3,
                  epsilon: float = 1e-4) -> Float[Array, "rows length"]:
  """An advantage for the decision, and one for what follows it (HiPO, arXiv:2509.23967).

  With M_i the mode of an answer, `mean_M` and `std_M` over its group's answers in that mode:

    decision:  ((mean_M_i - mean) + gamma * (r_i - mean)) / (std + epsilon)
    the rest:  (r_i - mean_M_i) / (std_M_i + epsilon)

  so a direct answer is not blamed for what only a thought would have found, but the decision for it
  is. Standard deviations divide by n - 1, as in `scale_by_group_std`. In a group of one mode and
  with gamma = 1 both are GRPO's.

  Args:
    batch: supplies `columns["mode"]`, and `tag_ids`: 1 is the decision.
    rewards: one per sequence; masked sequences are ignored and get 0.
    gamma: weight of the answer's own reward in the advantage of its decision.
    epsilon: keeps small deviations bounded.

  Returns:
    One value per token; exactly 0 for the rest where a mode has one value only, for the decision
    where the group has.
  """
  mode = _mode(batch, "compare_modes")
  own_mean = _mean_of_own_mode(batch, rewards, mode)
  of_mode = deviation_by_group(batch, own_mean)  # its mean over the group is the group's mean
  decision = _over(of_mode + gamma * deviation_by_group(batch, rewards),
                   std_by_group(batch, rewards, ddof=1), epsilon)
  rest = jnp.zeros_like(rewards)
  for m in (UNDECIDED, ON, OFF):
    part = batch.replace(sequence_mask=batch.sequence_mask & (mode == m))
    rest += _over(deviation_by_group(part, rewards), std_by_group(part, rewards, ddof=1), epsilon)
  values = jnp.where(batch.tag_ids == 1, to_tokens(batch, decision), to_tokens(batch, rest))
  return jnp.where(batch.loss_mask, values, 0)


def _mode(batch, piece):
  if "mode" not in batch.columns:
    raise ValueError(f"{piece} needs batch.columns['mode'], which the episode 'answer_in_mode' "
                     "writes: set config.rollout.episode to it, or write the column in your own")
  return jnp.asarray(batch.columns["mode"])


def _mean_of_own_mode(batch, rewards, mode):
  """At each scored sequence, the mean over those of its group in the same mode; 0 elsewhere."""
  return sum(mean_by_group(batch.replace(sequence_mask=batch.sequence_mask & (mode == m)), rewards)
             for m in (UNDECIDED, ON, OFF))


def _over(values, std, epsilon):
  return jnp.where(std > 0, values / jnp.where(std > 0, std + epsilon, 1), 0)


def _mean(mask, values):
  return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)
