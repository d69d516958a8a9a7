"""Anchors: how uncertain the policy was at first, and how far from that it is."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl.advantages.chain import Credit
from jaxrl.batch import TokenBatch, sum_by_sequence, to_tokens
from jaxrl.compose import carries, needs


def nucleus_entropy_of(p: float) -> tuple[str]:
  """The signal with the entropy inside the nucleus of mass `p`."""
  return (f"nucleus_entropy@{p}",)


@needs(nucleus_entropy_of)
@carries(lambda: {"anchor": jnp.zeros(()), "known": jnp.zeros((), bool)})
def anchor_entropy(batch: TokenBatch, values: Float[Array, "..."], carried: dict, *, p: float = 0.8,
                   quantile: float = 0.8) -> Credit:
  """Entropy at the peaks of each sequence, against that of the first batch (SIREN,
  arXiv:2509.25133).

  With H_t the entropy inside the nucleus of mass `p` and M the peaks of a sequence:

    M_t = 1 where H_t > quantile of H over the sequence's loss tokens
    H_mean = mean over sequences of (sum_t M_t * H_t / sum_t M_t)
    gap = H_mean - H_mean at the first batch

  Values pass through unchanged; `objectives.anchored_entropy`, which the gap and the peaks are for,
  needs the same `p`. Where no token is above the quantile (a sequence of one, or equal entropies)
  the largest ones are the peaks, so that a collapsed policy counts with its entropy of 0.

  Args:
    batch: supplies `signals["nucleus_entropy@P"]` of the policy that the batch began with.
    values: one per sequence or per token.
    carried: `anchor`, and whether a batch has set it yet.
    p: mass of the nucleus, above 0 and at most 1; a plain number, for it names the signal.
    quantile: in [0, 1], with linear interpolation; 0.8 leaves a fifth of the tokens.

  Returns:
    The values; signals `entropy_peaks`, M_t / sum_t M_t (scaled up where scored sequences have no
    loss token, so that its "sequence_sum" is the mean over those that have), and `entropy_gap`, the
    gap at every loss token; metrics `peak_entropy` and `entropy_gap`.

  Raises:
    ValueError: `quantile` is not in [0, 1].
  """
  if isinstance(quantile, int | float) and not 0 <= quantile <= 1:
    raise ValueError(f"anchor_entropy: quantile={quantile} has to be in [0, 1]; 0.8 is the paper's")
  mask = batch.loss_mask & to_tokens(batch, batch.sequence_mask).astype(bool)
  entropies = jnp.where(mask, batch.signals[nucleus_entropy_of(p)[0]], 0)
  threshold = _quantile_by_sequence(batch, mask, entropies, quantile)
  above = mask & (entropies > to_tokens(batch, threshold))
  any_above = to_tokens(batch, sum_by_sequence(batch, above.astype(jnp.float32))) > 0
  largest = _quantile_by_sequence(batch, mask, entropies, 1.0)
  peaks = jnp.where(any_above, above, mask & (entropies == to_tokens(batch, largest)))
  peaks = peaks.astype(entropies.dtype)
  shares = peaks / jnp.maximum(to_tokens(batch, sum_by_sequence(batch, peaks)), 1)
  filled = jnp.sum(sum_by_sequence(batch, mask.astype(jnp.float32)) > 0)
  now = jnp.sum(shares * entropies) / jnp.maximum(filled, 1)
  anchor = jnp.where(carried["known"], carried["anchor"], now)
  gap = jnp.where(filled > 0, now - anchor, 0)
  known = carried["known"] | (filled > 0)
  scale = jnp.sum(batch.sequence_mask) / jnp.maximum(filled, 1)
  return Credit(values, {"entropy_peaks": shares * scale, "entropy_gap": jnp.where(mask, gap, 0)},
                carried={"anchor": jnp.where(known, anchor, 0), "known": known},
                metrics={"peak_entropy": now, "entropy_gap": gap})


def _quantile_by_sequence(batch: TokenBatch, mask: Bool[Array, "rows length"],
                          values: Float[Array, "rows length"], quantile: float
                          ) -> Float[Array, "sequences"]:
  """Quantile of the masked values of each sequence; 0 for a sequence without any."""
  ids = jnp.where(mask, batch.sequence_ids, batch.num_sequences).reshape(-1)
  ordered = values.reshape(-1)[jnp.lexsort((values.reshape(-1), ids))]
  counts = jax.ops.segment_sum(jnp.ones_like(ids), ids, num_segments=batch.num_sequences)
  starts = jnp.cumsum(counts) - counts
  place = quantile * jnp.maximum(counts - 1, 0)
  low = jnp.floor(place).astype(ids.dtype)
  high = jnp.minimum(low + 1, jnp.maximum(counts - 1, 0))
  below, above = (ordered[jnp.minimum(starts + i, ids.size - 1)] for i in (low, high))
  return jnp.where(counts > 0, below + (place - low) * (above - below), 0)
