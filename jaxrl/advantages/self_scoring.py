"""Rewards without labels, from how decided the policy was."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.advantages.chain import Credit
from jaxrl.batch import TokenBatch, max_by_group, mean_by_sequence, sum_by_sequence, to_tokens
from jaxrl.compose import needs


@needs("top2_gap", "entropy")
def score_by_confidence(batch: TokenBatch, rewards: Float[Array, "sequences"], *,
                        kappa: float = 1.0, answer_weight: float = 1.0, path_weight: float = 1.0
                        ) -> Credit:
  """A weighted vote says which answer counts as right, decisiveness how good its path was
  (COMPASS, arXiv:2510.17923).

  With d_t the gap between the two likeliest tokens and H_t the entropy, both of the policy that the
  batch began with, over the loss tokens of answer i:

    C_i = exp(kappa * std_t(d_t)),    winner = argmax_a sum_{i: a_i = a} C_i
    answer_i = [a_i = winner] * max_{j: a_j = winner} C_j / max_j C_j
    path_i = sum_t H_t d_t / sum_t H_t
    r_i = answer_weight * answer_i + path_weight * path_i

  The rewards that are given are those of labels and are read for a metric only. The factor in
  `answer_i` is one for all of a group: with `path_weight=0` a scale by the group's deviation cancels
  it.

  Args:
    batch: supplies groups, `signals["top2_gap"]`, `signals["entropy"]` and `columns["answer_id"]` of
      the edit `rollouts.semantic.number_answers`.
    rewards: of labels, one per sequence.
    kappa: 1 makes those votes heavier whose decisiveness varies, -1 those of even ones, 0 is a plain
      majority (TTRL). The paper's sign is not certain.
    answer_weight, path_weight: of the two parts.

  Returns:
    Credit with these rewards, 0 for sequences that are not scored; metrics `answer_credibility` (mean
    of answer_i over winners), `path_score`, and `pseudo_label_right`, the share of winners that the
    labels call right.

  Raises:
    ValueError: no column `answer_id`.
  """
  if "answer_id" not in batch.columns:
    raise ValueError("score_by_confidence needs the column 'answer_id': add dict(name="
                     "'jaxrl.rollouts.semantic:number_answers') to config.rollout.edits")
  scored, ids = batch.sequence_mask, batch.columns["answer_id"]
  gap, entropy = batch.signals["top2_gap"], batch.signals["entropy"]
  # From deviations: a difference of squares would leave even gaps a deviation of 3e-4 in float32.
  deviation = gap - to_tokens(batch, mean_by_sequence(batch, gap))
  confidence = jnp.where(scored, jnp.exp(
      kappa * jnp.sqrt(mean_by_sequence(batch, deviation ** 2))), 0)
  votes_count = scored & (ids >= 0)
  together = ((batch.group_ids[:, None] == batch.group_ids[None]) & (ids[:, None] == ids[None])
              & votes_count[:, None] & votes_count[None])
  votes = jnp.sum(jnp.where(together, confidence[None], 0), axis=1)
  # Of equal sums the answer that came first; 1e-5 is what float32 sums of few votes may differ by.
  leads = votes_count & (votes >= max_by_group(batch, votes) * (1 - 1e-5))
  first = -max_by_group(batch, jnp.where(leads, -ids, -jnp.inf))
  wins = leads & (ids == first)
  best = jnp.where(wins, max_by_group(batch, jnp.where(wins, confidence, 0)), 0)
  highest = max_by_group(batch, confidence)
  answer = jnp.where(wins, best / jnp.where(highest > 0, highest, 1), 0)
  weight = sum_by_sequence(batch, jnp.where(batch.loss_mask, entropy, 0))
  path = sum_by_sequence(batch, jnp.where(batch.loss_mask, entropy * gap, 0))
  path = jnp.where(scored & (weight > 0), path / jnp.where(weight > 0, weight, 1), 0)

  def share(mask, values):
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)
  return Credit(jnp.where(scored, answer_weight * answer + path_weight * path, 0), metrics={
      "answer_credibility": share(wins, answer), "path_score": share(scored, path),
      "pseudo_label_right": share(wins, (rewards >= 1).astype(jnp.float32))})
