"""Steps of an episode: how sure the policy was of each decides what the outcome says about it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl.advantages.chain import Credit
from jaxrl.batch import TokenBatch, to_tokens
from jaxrl.compose import needs

LABELS = {"turn": ("sequence_ids", "turn_ids"), "tag": ("sequence_ids", "turn_ids", "tag_ids"),
          "token": ("sequence_ids", "positions")}  # a step begins where one of them changes
EQUAL = 1e-6  # nats: entropies of steps that are no further apart are the same


@needs("entropy")
def modulate_by_entropy(batch: TokenBatch, values: Float[Array, "sequences"], *, k: float = 1.0,
                        k_next: float = 1.0, bonus: float = 0.1, steps: str = "turn") -> Credit:
  """Entropy-modulated advantages of steps (EMPG, arXiv:2509.09265).

  With H_s the mean entropy of the tokens of step s, brought to [0, 1] over all N steps of the batch
  as h_s = (H_s - min H) / (max H - min H + 1e-8), and A the advantage of the step's sequence:

    g_s = exp(-k * h_s) / (sum_u exp(-k * h_u) / N),      f_s = exp(-k_next * h_s)
    advantage_s = A * g_s + bonus * f_s+1 - mean over all steps of the same

  So sure steps learn more from a success and from a failure, unsure ones less, and steps that lead
  to sure ones are favoured; after its last step a sequence has no f. Where all entropies are equal
  g is 1 and there is no bonus, which could tell last steps from others only.

  Args:
    batch: supplies `turn_ids`, `tag_ids` and `signals["entropy"]` of the policy that the batch
      began with.
    values: one per sequence.
    k: how much faster sure steps learn; 0 treats all alike.
    k_next: how much sooner the bonus falls with the next step's entropy.
    bonus: weight of the next step's clarity (the paper's zeta).
    steps: where a step begins: "turn", at a loss token of another turn than the loss token before
      it in its sequence; "tag", of another turn or tag; "token", at every loss token.

  Returns:
    One advantage per token, equal over the tokens of a step, of mean 0 over steps; metrics `steps`
    (N), `step_entropy` and `step_entropy_spread` (max - min).

  Raises:
    ValueError: unknown `steps`.
  """
  mask = batch.loss_mask & to_tokens(batch, batch.sequence_mask).astype(bool)
  index = _step_index(batch, mask, steps)
  flat, size = index.reshape(-1), index.size

  def total(per_token):
    return jax.ops.segment_sum(per_token.reshape(-1), flat, num_segments=size)

  tokens = total(mask.astype(jnp.float32))
  real = tokens > 0
  count = jnp.maximum(jnp.sum(real), 1)
  entropy = total(jnp.where(mask, batch.signals["entropy"], 0)) / jnp.maximum(tokens, 1)
  lowest, highest = (jnp.where(jnp.any(real), x, 0) for x in (
      jnp.min(jnp.where(real, entropy, jnp.inf)), jnp.max(jnp.where(real, entropy, -jnp.inf))))
  spread = highest - lowest
  h = (entropy - lowest) / (spread + 1e-8)
  h = jnp.where(spread > EQUAL, h, 0)
  scale = jnp.exp(-k * h)
  mean = jnp.sum(jnp.where(real, scale, 0)) / count
  scale /= jnp.where(mean > 0, mean, 1)
  sequence = jax.ops.segment_max(batch.sequence_ids.reshape(-1), flat, num_segments=size)
  following = jnp.roll(real, -1) & (jnp.roll(sequence, -1) == sequence)
  following = following.at[-1].set(False)
  clarity = jnp.where(following & (spread > EQUAL), jnp.exp(-k_next * jnp.roll(h, -1)), 0)
  advantages = jnp.where(real, values[jnp.maximum(sequence, 0)] * scale + bonus * clarity, 0)
  advantages -= jnp.sum(advantages) / count
  metrics = {"steps": jnp.sum(real).astype(jnp.float32), "step_entropy_spread": spread,
             "step_entropy": jnp.sum(jnp.where(real, entropy, 0)) / count}
  return Credit(jnp.where(mask, advantages[jnp.maximum(index, 0)], 0), metrics=metrics)


def _step_index(batch: TokenBatch, mask: Bool[Array, "rows length"], steps: str):
  """Step of each masked token, counted over the batch in order of its rows; -1 elsewhere."""
  if steps not in LABELS:
    raise ValueError(f"modulate_by_entropy: steps={steps!r}; valid are 'turn', 'tag' and 'token'")
  place = jax.lax.cummax(jnp.where(mask, jnp.arange(mask.shape[1]), -1), axis=1)
  before = jnp.concatenate([jnp.full_like(place[:, :1], -1), place[:, :-1]], axis=1)
  begins = before < 0
  for name in LABELS[steps]:
    label = getattr(batch, name)
    begins |= jnp.take_along_axis(label, jnp.maximum(before, 0), axis=1) != label
  index = jnp.cumsum((mask & begins).reshape(-1)).reshape(mask.shape) - 1
  return jnp.where(mask, index, -1)
