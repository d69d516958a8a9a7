"""Regularisers: stay near a reference policy, stay uncertain."""

import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch, to_tokens
from jaxrl.compose import needs
from jaxrl.log_ratio import kl_estimate, log_ratio
from jaxrl.objectives.aggregate import TermOutput


def _signals_of_kl(estimator, model):
  if estimator != "full":
    return (f"{model}_logprobs",)
  if model != "reference":
    raise ValueError(f"kl: estimator='full' is of the reference alone, not of model={model!r}: make that the "
                     "reference, with config.reference.source if it is another run's")
  return ("reference_kl",)


@needs(_signals_of_kl)
def kl(outputs: ModelOutputs, batch: TokenBatch, *, beta: float, estimator: str = "k3",
       weight: str = "", model: str = "reference") -> TermOutput:
  """Penalty `beta * KL(policy || reference)`: estimated at the sampled token (Schulman, 2020), or full.

  With d = log policy(t) - log reference(t) and t sampled from the policy:

    estimator  loss / beta      its mean            the mean of its gradient
    k1         d                KL(policy || ref)   0: the score function has mean 0
    k2         d^2 / 2          biased, near KL     the gradient of KL(policy || ref)
    k3         exp(-d) - 1 + d  KL(policy || ref)   the gradient of KL(ref || policy)
    full       the KL itself, over the whole vocabulary, and so is its gradient

  So k1, the best known as a value, regularises nothing as a loss (it belongs into rewards); k2
  follows the KL that is meant; k3, never negative, is the one in GRPO (arXiv:2402.03300) and TRL,
  with the gradient taken through it as here. Near the reference k2 and k3 agree. "full", of samples
  of the policy and without any other term, is on-policy distillation from the reference (GKD with the
  reverse KL, arXiv:2306.13649). A sample that is off-policy is not corrected for. Source of the
  estimates: http://joschu.net/blog/kl-approx.html.

  Args:
    outputs: supplies `logprobs`; for "full" `reference_kl`.
    batch: supplies `signals["reference_logprobs"]`, or those of another model, but for "full".
    beta: coefficient.
    estimator: "k1", "k2", "k3" or "full".
    weight: column of sequences that multiplies `beta`, such as how hard their problem is; empty is
      none.
    model: the reference, or a model of `config.frozen`, but for "full".

  Returns:
    Loss per token; metric `kl`, the estimate before `beta`.

  Raises:
    ValueError: no such column, or "full" of another model than the reference.
  """
  if estimator == "full":
    estimate = jnp.where(batch.loss_mask, outputs.get("reference_kl"), 0)
  else:
    difference = log_ratio(batch, outputs.logprobs, batch.signals[f"{model}_logprobs"])
    estimate = kl_estimate(difference, estimator)
  if not weight:
    return beta * estimate, {"kl": estimate}
  if weight not in batch.columns:
    raise ValueError(f"kl: weight={weight!r} is none of the batch's columns, "
                     f"{', '.join(batch.columns) or 'of which there are none'}; episodes and edits "
                     "supply columns")
  return beta * to_tokens(batch, batch.columns[weight]) * estimate, {"kl": estimate}


@needs("entropy")
def entropy(outputs: ModelOutputs, batch: TokenBatch, *, coefficient: float) -> TermOutput:
  """Bonus for the entropy of the policy at each loss token: `loss_t = -coefficient * H(t)`.

  A positive coefficient keeps the policy uncertain; a negative one makes it more certain.
  Metrics: `entropy`, in nats.
  """
  entropies = jnp.where(batch.loss_mask, outputs.entropy, 0)
  return -coefficient * entropies, {"entropy": entropies}
