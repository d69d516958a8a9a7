"""Verdicts as credit: one constant for right answers, another for wrong ones, and no baseline."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.advantages.chain import baseline
from jaxrl.batch import TokenBatch


@baseline
def weigh_verdicts(batch: TokenBatch, rewards: Float[Array, "sequences"], *, right: float = 0.1,
                   wrong: float = -1.0, right_from: float = 0.5) -> Float[Array, "sequences"]:
  """The same advantage for every right answer, and another for every wrong one (arXiv:2506.01347).

    advantage_i = right if r_i >= right_from else wrong

  The expected return splits into what right answers add, PSR, and what wrong ones cost, NSR. Their
  policy gradients are weighed by the two constants: `right=1, wrong=-1` is REINFORCE with rewards of
  +1 and -1, `right=0.1, wrong=-1` W-REINFORCE, `right=0` leaves NSR and `wrong=0` PSR. To leave the
  other answers out of the mean over tokens too, as the paper does, take them out with the edit
  `keep` (`config.rollout.edits`).

  It counts as a baseline: rewards are compared with the threshold, and with nothing else.

  Args:
    batch: supplies `sequence_mask`.
    rewards: one per sequence; masked sequences get 0.
    right: advantage of right answers, lambda in the paper.
    wrong: advantage of wrong answers, negative to make them less likely.
    right_from: smallest reward of a right answer: 0.5 for verdicts in {0, 1}, 0 for {-1, 1}.
  """
  return jnp.where(batch.sequence_mask, jnp.where(rewards >= right_from, right, wrong), 0.0)
