"""A policy gradient of whole answers that keeps their probability honest."""

import jax
import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch, mean_by_sequence, to_tokens
from jaxrl.compose import needs, takes_whole
from jaxrl.log_ratio import cap, log_ratio
from jaxrl.objectives.aggregate import TermOutput


@takes_whole()
@needs("confidence_target")
def confident_policy_gradient(outputs: ModelOutputs, batch: TokenBatch, *, beta: float = 0.1,
                              floor: float = 0.05) -> TermOutput:
  """Sequence policy gradient with calibrated confidence (C2GSPG, arXiv:2509.23129).

  With c = exp(mean over the loss tokens of log pi), the confidence of an answer, c_old that of the
  sampler, A its advantage and r its target:

    loss = -A / (1 - c_old) * log c - beta * (r * log c + (1 - r) * log(1 - c))

  On policy the gradient in log c is -(A + beta * (r - c)) / (1 - c); of rewards in {0, 1} both parts
  have one sign wherever a group has both. Where they contradict, which other rewards can do, the
  second is left out. There is no ratio: make one update on each batch. All tokens of an answer have
  this loss, so the aggregation is "sequence_mean".

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `behaviour_logprobs`, `signals["advantages"]`, one value for each answer, and
      `signals["confidence_target"]` of `advantages.target_confidence`.
    beta: weight of the calibration; 0 is the policy gradient alone.
    floor: 1 - c_old is at least this, and below it log(1 - c) goes on as its tangent.

  Returns:
    Loss per token; metrics `confidence` (c), `calibration_error` ((c - r)^2, the Brier score where
    targets are verdicts) and `behaviour_kl`.

  Raises:
    ValueError: a floor outside of (0, 1).
  """
  if isinstance(floor, int | float) and not 0 < floor < 1:
    raise ValueError(f"confident_policy_gradient: floor={floor} has to be between 0 and 1")
  mask = batch.loss_mask

  def of_answer(per_token):
    return jnp.where(mask, to_tokens(batch, mean_by_sequence(batch, per_token)), 0)
  advantages = jax.lax.stop_gradient(of_answer(batch.signals["advantages"]))
  target = jnp.where(mask, batch.signals["confidence_target"], 0)
  log_c = of_answer(jnp.where(mask, outputs.logprobs, 0))
  old = jnp.exp(of_answer(batch.behaviour_logprobs))
  c = jnp.exp(log_c)
  doubt = 1 - c
  log_doubt = jnp.where(doubt > floor, jnp.log(jnp.maximum(doubt, floor)),
                        jnp.log(floor) + (doubt - floor) / floor)
  agrees = advantages * (target - jax.lax.stop_gradient(c)) >= 0
  calibration = jnp.where(agrees, target * log_c + (1 - target) * log_doubt, 0)
  loss = -advantages / jnp.maximum(1 - old, floor) * log_c - beta * calibration
  difference = log_ratio(batch, outputs.logprobs, batch.behaviour_logprobs)
  return jnp.where(mask, loss, 0), {
      "confidence": c * mask, "calibration_error": jnp.where(mask, (c - target) ** 2, 0),
      "behaviour_kl": jnp.expm1(cap(difference)) - difference}
