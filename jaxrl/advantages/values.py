"""Credit with a critic: generalised advantage estimation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.advantages.chain import Credit, baseline
from jaxrl.batch import TokenBatch, at_last_tokens
from jaxrl.compose import needs


@baseline
@needs("values")
def gae(batch: TokenBatch, rewards: Float[Array, "..."], *, gamma: float = 1.0, lam: float = 0.95
        ) -> Credit:
  """Generalised advantage estimation (arXiv:1506.02438, eq. 16) over the loss tokens of a sequence.

    delta_t = r_t + gamma * V(s_{t+1}) - V(s_t),    V = 0 after the last loss token
    A_t = delta_t + gamma * lam * A_{t+1},          returns_t = A_t + V(s_t)

  t + 1 is the next loss token of the sequence: tokens between turns, which the policy did not choose,
  take no time. V(s_t) is the value of the state before token t.

  Args:
    batch: supplies `loss_mask`, `sequence_ids` and `signals["values"]` of the policy that sampled.
    rewards: one per sequence, earned at its last loss token, or one per token.
    gamma: discount per token.
    lam: 0 is one step of temporal difference, 1 the whole return minus the value.

  Returns:
    One advantage per token; the signal `returns`, which `objectives.value_loss` fits; metrics
    `explained_variance` (1 - Var(returns - V) / Var(returns), over loss tokens) and `value`.
  """
  for name, factor in (("gamma", gamma), ("lam", lam)):
    if isinstance(factor, int | float) and not 0 <= factor <= 1:
      raise ValueError(f"gae: {name}={factor} has to be between 0 and 1; 1.0 and 0.95 are usual")
  mask, ids = batch.loss_mask, batch.sequence_ids
  values = jnp.where(mask, batch.signals["values"], 0)
  per_token = rewards if rewards.ndim == 2 else at_last_tokens(batch, rewards)

  def back(later, now):
    later_advantage, later_value, later_id = later
    reward, value, trained, sequence = now
    same = later_id == sequence
    ahead, more = jnp.where(same, later_value, 0), jnp.where(same, later_advantage, 0)
    advantage = reward + gamma * ahead - value + gamma * lam * more
    kept = jax.tree.map(lambda new, old: jnp.where(trained, new, old),
                        (advantage, value, sequence), later)
    return kept, jnp.where(trained, advantage, 0)

  rows = mask.shape[0]
  nothing = (jnp.zeros(rows), jnp.zeros(rows), jnp.full(rows, -2, ids.dtype))
  by_column = [x.T for x in (per_token, values, mask, ids)]
  _, advantages = jax.lax.scan(back, nothing, tuple(by_column), reverse=True)
  advantages = advantages.T
  returns = jnp.where(mask, advantages + values, 0)
  metrics = {"value": _mean(mask, values),
             "explained_variance": 1 - _variance(mask, returns - values)
             / jnp.maximum(_variance(mask, returns), 1e-8)}
  return Credit(advantages, {"returns": returns}, metrics=metrics)


def _mean(mask, x):
  return jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(jnp.sum(mask), 1)


def _variance(mask, x):
  return _mean(mask, (x - _mean(mask, x)) ** 2)
