"""Baselines: what a reward is compared with."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.advantages.chain import baseline
from jaxrl.batch import TokenBatch, as_one_group, column_of, count_by_group, deviation_by_group


@baseline
def center_by_group(batch: TokenBatch, rewards: Float[Array, "sequences"], *,
                    weight: str | None = None) -> Float[Array, "sequences"]:
  """Reward minus the mean of its group (GRPO without its scale, arXiv:2402.03300; Dr. GRPO).

    advantage_i = r_i - mean_j(r_j)

  Masked sequences are ignored and get 0; groups of one value, singletons included, give exactly 0.

  Args:
    batch: supplies `group_ids` and `sequence_mask`.
    rewards: one per sequence.
    weight: column of what each sequence counts in the mean, such as the `share` that a sequence has
      in an answer of several; None counts each as 1.
  """
  return deviation_by_group(batch, rewards, column_of(batch, weight, "center_by_group"))


@baseline
def leave_one_out(batch: TokenBatch, rewards: Float[Array, "sequences"]
                  ) -> Float[Array, "sequences"]:
  """Reward minus the mean of the others in its group (RLOO, arXiv:2402.14740).

    advantage_i = r_i - mean_{j != i}(r_j) = n / (n - 1) * (r_i - mean_j(r_j))

  The baseline does not depend on the sample that it is compared with, so the policy gradient stays
  unbiased. A singleton has no others, hence no baseline, and gets 0: it does not train. Masked
  sequences are ignored and get 0.
  """
  count = count_by_group(batch)
  return deviation_by_group(batch, rewards) * count / jnp.maximum(count - 1, 1)


def center_by_batch(batch: TokenBatch, rewards: Float[Array, "sequences"]
                    ) -> Float[Array, "sequences"]:
  """Value minus the mean over all scored sequences of the batch (REINFORCE++, arXiv:2501.03262).

  Not marked as a baseline, because whitening over the batch after a group baseline is a published
  step. Masked sequences are ignored and get 0.
  """
  return deviation_by_group(as_one_group(batch), rewards)
