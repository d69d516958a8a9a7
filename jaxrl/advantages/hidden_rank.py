"""Ranks: how many directions the hidden states of an answer take, and how that number grows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl.advantages.chain import Credit
from jaxrl.batch import TokenBatch, at_last_tokens, to_tokens
from jaxrl.compose import carries, needs

FLOOR = 4  # ulps of the largest singular value: what is below is rounding
LIMIT = 5.0  # of relative deviations
NAMES = ("rank_acceleration", "rank_velocity", "rank")


@needs(lambda layer: (_signal(layer),))
@carries(lambda: {"means": jnp.zeros(3), "batches": jnp.zeros((), jnp.int32)})
def favour_hidden_rank(batch: TokenBatch, values: Float[Array, "..."], carried: dict, *,
                       stride: int = 40, kappa: float = 2.0, gain: float = 2.0, update: float = 0.3,
                       scale: float = 1.0, max_tokens: int = 512, where: str = "all",
                       from_zero: bool = False, layer: int = -1) -> Credit:
  """A bounded bonus for answers of high or growing effective rank (VERL, arXiv:2509.23808).

  With x = (acceleration, velocity, rank) of an answer's hidden states, see `rank_growth`, and mu
  the moving averages of their means over earlier batches:

    d = clip((x - mu) / |mu|, -5, 5)
    rho = sigmoid(gain * d_acceleration)
    bonus = scale * (rho * tanh(d_rank) + (1 - rho) * tanh(d_velocity))
    advantage = A + min(max(bonus, 0), |A| / kappa)
    mu <- (1 - update) * mu + update * mean of x over the batch

  The first batch gets no bonus. No advantage changes its sign for kappa >= 1, and a batch without
  any advantages gets none.

  Args:
    batch: supplies `loss_mask` and the states of `layer` as a signal, of which loss tokens count.
    values: advantages, one per sequence or per token.
    carried: the moving averages, and the number of batches that they are of.
    stride: tokens between the prefixes that velocity and acceleration are measured at.
    kappa: an advantage changes by at most its own size divided by this; above 0.
    gain: how sharply acceleration decides between rank and velocity.
    update: share of a batch in the moving averages, in (0, 1].
    scale: of the bonus before its bound.
    max_tokens: loss tokens of a sequence that count, the last ones; sets the cost, max_tokens^3 for
      each of max_tokens / stride prefixes.
    where: "all" loss tokens get the bonus, or the "last" of a sequence alone, as in the released
      code.
    from_zero: the averages begin at 0, as in the released code, instead of at the first batch's
      means, so that early deviations are large.
    layer: whose states are meant: 0 is what enters the first, i what leaves the i-th; negative numbers
      count from the end, and -1 is the last one after its norm.

  Returns:
    Advantages, per sequence where values are and `where` is "all"; metrics `rank`, `rank_velocity`
    and `rank_acceleration`, means over sequences, and `rank_bonus`, the mean of max(bonus, 0).

  Raises:
    ValueError: an argument out of its range.
  """
  _check(stride, kappa, update, max_tokens, where)
  states = batch.signals[_signal(layer)]
  found = jax.lax.stop_gradient(_by_sequence(batch, states, stride, max_tokens))  # [sequences, 3]
  scored, count = batch.sequence_mask[:, None], jnp.sum(batch.sequence_mask)
  now = jnp.sum(jnp.where(scored, found, 0), axis=0) / jnp.maximum(count, 1)
  means, known = carried["means"], carried["batches"] > 0
  deviation = jnp.clip((found - means) / (jnp.abs(means) + 1e-8), -LIMIT, LIMIT)
  acceleration, velocity, rank = deviation.T
  rho = jax.nn.sigmoid(gain * acceleration)
  bonus = scale * (rho * jnp.tanh(rank) + (1 - rho) * jnp.tanh(velocity))
  bonus = jnp.where(batch.sequence_mask & known, jnp.maximum(bonus, 0), 0)
  moved = (1 - update) * means + update * now
  moved = moved if from_zero else jnp.where(known, moved, now)
  metrics = {**dict(zip(NAMES, now)), "rank_bonus": jnp.sum(bonus) / jnp.maximum(count, 1)}
  if where == "last":
    values = values if values.ndim == 2 else to_tokens(batch, values)
    bonus = at_last_tokens(batch, bonus)
  elif values.ndim == 2:
    bonus = to_tokens(batch, bonus)
  return Credit(values + jnp.minimum(bonus, jnp.abs(values) / kappa),
                carried={"means": jnp.where(count > 0, moved, means),
                         "batches": carried["batches"] + (count > 0)}, metrics=metrics)


def effective_rank(states: Float[Array, "tokens width"], mask: Bool[Array, "tokens"]
                   ) -> Float[Array, ""]:
  """Exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007).

    q = s / sum(s),   rank = exp(-sum(q * log(q))),   s of the masked rows minus their mean

  Singular values that rounding in float32 hides, below 5e-7 of the largest, count as 0. Fewer than two
  rows give 0.
  """
  count = jnp.sum(mask)
  states = states.astype(jnp.float32)
  mean = jnp.sum(jnp.where(mask[:, None], states, 0), axis=0) / jnp.maximum(count, 1)
  centred = jnp.where(mask[:, None], states - mean, 0)
  # Roots of the eigenvalues of a Gram matrix would be wrong below 1e-3 of the largest.
  singular = jnp.linalg.svd(centred, compute_uv=False)
  singular = jnp.where(singular > FLOOR * jnp.finfo(jnp.float32).eps * singular[0], singular, 0)
  q = singular / (jnp.sum(singular) + 1e-8)
  return jnp.where(count < 2, 0, jnp.exp(-jnp.sum(q * jnp.log(q + 1e-8))))


def rank_growth(states: Float[Array, "tokens width"], count: Int[Array, ""], stride: int
                ) -> Float[Array, "3"]:
  """Acceleration, velocity and effective rank of the first `count` rows.

    m_j = rank of the first j * stride + 1 rows, j = 1 .. J,   J * stride < count
    v_j = m_j - mean(m_1 .. m_j-1), j >= 2,     velocity = mean_j(v_j)
    a_j = v_j - v_j-1, j >= 3,                  acceleration = mean_j(a_j)

  A mean of nothing is 0.
  """
  size = states.shape[0]
  j = jnp.arange(1, (size - 1) // stride + 1)
  ends = jnp.append(j * stride + 1, count)
  masks = jnp.arange(size) < jnp.minimum(ends, count)[:, None]
  ranks = jax.vmap(effective_rank, (None, 0))(states, masks)
  m, exists = ranks[:-1], j * stride < count
  velocity = m - (jnp.cumsum(m) - m) / jnp.maximum(j - 1, 1)
  moving = exists & (j >= 2)
  acceleration = velocity - jnp.concatenate([jnp.zeros(min(1, len(j))), velocity[:-1]])
  turning = exists & (j >= 3)
  return jnp.stack([_mean(turning, acceleration), _mean(moving, velocity), ranks[-1]])


def _mean(mask, x):
  return jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(jnp.sum(mask), 1)


def _signal(layer):
  """The signal with the states of a layer."""
  return "hidden" if layer == -1 else f"hidden@{layer}"


def _by_sequence(batch, hidden, stride, max_tokens):
  """`rank_growth` of the last loss tokens of every sequence. [sequences, 3]"""
  hidden = hidden.reshape(-1, hidden.shape[-1])
  sequences, size = batch.num_sequences, min(max_tokens, batch.tokens.shape[1])
  mask = batch.loss_mask.reshape(-1)
  ids = jnp.where(mask, batch.sequence_ids.reshape(-1), sequences)
  counts = jax.ops.segment_sum(mask.astype(jnp.int32), ids, num_segments=sequences)
  place = jnp.cumsum(mask) - 1
  start = jax.ops.segment_min(place, ids, num_segments=sequences)
  of_mine = jnp.minimum(ids, sequences - 1)
  slot = place - start[of_mine] - jnp.maximum(counts - size, 0)[of_mine]
  owner = jnp.where(slot >= 0, ids, sequences)  # out of range is dropped
  index = jnp.zeros((sequences, size), jnp.int32).at[owner, jnp.maximum(slot, 0)].set(
      jnp.arange(mask.size), mode="drop")

  def one(sequence):
    index, count = sequence
    return rank_growth(hidden[index], count, stride)
  return jax.lax.map(one, (index, jnp.minimum(counts, size)))


def _check(stride, kappa, update, max_tokens, where):
  name = "favour_hidden_rank"
  if where not in ("all", "last"):
    raise ValueError(f"{name}: where={where!r}; valid are 'all' and 'last'")
  for argument, value, least in (("stride", stride, 1), ("max_tokens", max_tokens, 2)):
    if not isinstance(value, int) or value < least:
      raise ValueError(f"{name}: {argument}={value} has to be a whole number of tokens, at least "
                       f"{least}")
  if isinstance(kappa, int | float) and not kappa > 0:
    raise ValueError(f"{name}: kappa={kappa} has to be above 0; 2.0 is the paper's")
  if isinstance(update, int | float) and not 0 < update <= 1:
    raise ValueError(f"{name}: update={update} has to be above 0 and at most 1; 0.3 is the paper's")
