"""Policy gradients: raise the probability of tokens with a positive advantage, lower the others.

Both terms read `batch.signals["advantages"]`, one per token, which no gradient passes through.
"""

import jax
import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch, mean_by_sequence, sum_by_sequence, to_tokens
from jaxrl.objectives.aggregate import TermOutput
from jaxrl.objectives.log_ratio import cap, log_ratio


def reinforce(outputs: ModelOutputs, batch: TokenBatch, *, importance_cap: float | None = None,
              level: str = "token") -> TermOutput:
  """Policy gradient (Williams, 1992): `loss_t = -w_t * A_t * log pi(t)`, with w_t a constant.

    importance_cap=None:  w_t = 1, unbiased when the batch comes from the current policy
    level="token":        w_t = min(pi(t) / behaviour(t), importance_cap)
    level="sequence":     w_t = min(product over the sequence's loss tokens of pi / behaviour,
                                    importance_cap)

  The weights correct for samples of an older policy (`config.rollout.staleness`). Those of whole
  sequences leave no bias below the cap, but vary the more the longer a sequence is; those of tokens
  take the prefix of a token as if the current policy had written it. A cap bounds the variance
  (truncated importance sampling, Ionides, 2008) and leans towards the older policy.

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `signals["advantages"]` and `behaviour_logprobs`.
    importance_cap: largest weight, above 0; None gives all tokens weight 1.
    level: "token" or "sequence".

  Returns:
    Loss per token; metrics `behaviour_kl`, and with a cap `importance_weight` and `clip_fraction`
    (tokens whose weight is the cap).
  """
  _check_importance(importance_cap, level)
  advantages = _advantages(batch)
  logprobs = jnp.where(batch.loss_mask, outputs.logprobs, 0)
  log_ratios = log_ratio(batch, outputs.logprobs, batch.behaviour_logprobs)
  metrics = {"behaviour_kl": _behaviour_kl(log_ratios)}
  if importance_cap is None:
    return -advantages * logprobs, metrics
  if level == "sequence":
    log_ratios = to_tokens(batch, sum_by_sequence(batch, log_ratios))
    log_ratios = jnp.where(batch.loss_mask, log_ratios, 0)
  ratio = jax.lax.stop_gradient(jnp.exp(cap(log_ratios)))
  weight = jnp.minimum(ratio, importance_cap)
  metrics["importance_weight"] = weight
  metrics["clip_fraction"] = jnp.where(advantages != 0, ratio > importance_cap, False).astype(
      ratio.dtype)
  return -weight * advantages * logprobs, metrics


def clipped_surrogate(outputs: ModelOutputs, batch: TokenBatch, *, low: float = 0.2,
                      high: float = 0.2, level: str = "token", dual_clip: float | None = None
                      ) -> TermOutput:
  """Clipped importance-weighted policy gradient (PPO, arXiv:1707.06347).

    loss_t = -min(r_t * A_t, clip(r_t, 1 - low, 1 + high) * A_t)
    level="token":     r_t = pi(t) / behaviour(t)
    level="sequence":  r_t = exp(mean over the sequence's loss tokens of log(pi / behaviour))

  At sequence level every token of a sequence has the same ratio, and through it the loss of one
  token has a gradient in all of them; with aggregation "sequence_mean" this is GSPO
  (arXiv:2507.18071). GSPO-token, in which a token's loss reaches that token only, has the same
  gradient as long as advantage and weight are equal over a sequence. Asymmetric bounds are DAPO's
  clip-higher (arXiv:2503.14476).

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `behaviour_logprobs` and `signals["advantages"]`.
    low, high: the ratio is trusted in [1 - low, 1 + high].
    level: "token" or "sequence".
    dual_clip: for negative advantages the loss is at most `dual_clip * |A_t|`, so that one token
      that has become far more likely cannot rule the batch (arXiv:1912.09729). Above 1, usually 3.

  Returns:
    Loss per token; metrics `clip_fraction` (tokens whose gradient is cut), `ratio` and
    `behaviour_kl`, an estimate of KL(behaviour || policy).
  """
  _check(low, high, level, dual_clip)
  advantages = _advantages(batch)
  log_ratios = log_ratio(batch, outputs.logprobs, batch.behaviour_logprobs)
  drift = log_ratios
  if level == "sequence":
    log_ratios = to_tokens(batch, mean_by_sequence(batch, log_ratios))
    log_ratios = jnp.where(batch.loss_mask, log_ratios, 0)
  ratio = jnp.exp(cap(log_ratios))
  # The minimum only ever binds on one side: from above for A >= 0, from below (and, with the dual
  # clip, far above) for A < 0. Selecting the bound cuts the gradient where clip_fraction says.
  negative = advantages < 0
  lower = jnp.where(negative, 1 - low, 0)
  upper = jnp.where(negative, dual_clip or jnp.inf, 1 + high)
  cut = (ratio < lower) | (ratio > upper)
  trusted = jnp.where(cut, jax.lax.stop_gradient(jnp.clip(ratio, lower, upper)), ratio)
  metrics = {
      "clip_fraction": jnp.where(advantages != 0, cut, False).astype(ratio.dtype),
      "ratio": ratio,
      "behaviour_kl": _behaviour_kl(drift),
  }
  return -advantages * trusted, metrics


def _advantages(batch):
  if "advantages" not in batch.signals:
    raise ValueError("a policy term needs batch.signals['advantages'], which a phase with rewards "
                     "computes from its advantage chain; without rewards use 'cross_entropy'")
  return jax.lax.stop_gradient(jnp.where(batch.loss_mask, batch.signals["advantages"], 0))


def _behaviour_kl(log_ratios):
  return jnp.expm1(cap(log_ratios)) - log_ratios


def _check_importance(importance_cap, level):
  if level not in ("token", "sequence"):
    raise ValueError(f"reinforce: level={level!r}; valid are 'token' and 'sequence'")
  if importance_cap is not None and not importance_cap > 0:
    raise ValueError(f"reinforce: importance_cap={importance_cap} has to be above 0; 2.0 is usual, "
                     "None turns importance weights off")


def _check(low, high, level, dual_clip):
  if level not in ("token", "sequence"):
    raise ValueError(f"clipped_surrogate: level={level!r}; valid are 'token' and 'sequence'")
  if low < 0 or high < 0:
    raise ValueError(f"clipped_surrogate: low={low}, high={high}; both are distances from 1, so at "
                     "least 0")
  if dual_clip is not None and dual_clip <= 1:
    raise ValueError(f"clipped_surrogate: dual_clip={dual_clip} has to be above 1; 3.0 is usual, "
                     "None turns it off")
