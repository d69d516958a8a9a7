"""Policy gradients: raise the probability of tokens with a positive advantage, lower the others.

Both terms read `batch.signals["advantages"]`, one per token, which no gradient passes through.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch, mean_by_sequence, sum_by_sequence, to_tokens
from jaxrl.compose import needs, takes_whole
from jaxrl.log_ratio import cap, check_clamp, clamped, log_ratio
from jaxrl.objectives.aggregate import TermOutput


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


def _anchor_signal(anchor):
  return (f"{anchor}_logprobs",) if anchor in ("old", "reference") else ()


@takes_whole(lambda level: level == "sequence")
@needs(_anchor_signal)
def clipped_surrogate(outputs: ModelOutputs, batch: TokenBatch, *, low: float = 0.2,
                      high: float = 0.2, level: str = "token", dual_clip: float | None = None,
                      anchor: str = "behaviour", clamp: Sequence[float] | None = None) -> TermOutput:
  """Clipped importance-weighted policy gradient (PPO, arXiv:1707.06347).

    loss_t = -min(r_t * A_t, clip(r_t, 1 - low, 1 + high) * A_t)
    level="token":     r_t = pi(t) / behaviour(t)
    level="sequence":  r_t = exp(mean over the sequence's loss tokens of log(pi / behaviour))
    level="sequence_token":  the same number, but its gradient is that of log pi(t) alone

  At sequence level every token of a sequence has the same ratio, and through it the loss of one
  token has a gradient in all of them; with aggregation "sequence_mean" this is GSPO
  (arXiv:2507.18071), which has one advantage per sequence. "sequence_token" is its GSPO-token, in
  which a token's loss reaches that token only, for advantages per token; both have the same gradient
  where advantage and weight are equal over a sequence. Asymmetric bounds are DAPO's clip-higher
  (arXiv:2503.14476).

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `behaviour_logprobs` and `signals["advantages"]`.
    low, high: the ratio is trusted in [1 - low, 1 + high].
    level: "token", "sequence" or "sequence_token".
    dual_clip: for negative advantages the loss is at most `dual_clip * |A_t|`, so that one token
      that has become far more likely cannot rule the batch (arXiv:1912.09729). Above 1, usually 3.
    anchor: what the ratio divides by: "behaviour", the log-probabilities of the sampler, or "old",
      those that the trainer itself computes before the first update on the batch. The latter is for
      samples whose behaviour is unknown, or corrected by `advantages.truncate_importance`. With
      "reference" they are those of the reference, which `config.reference` moves along.
    clamp: smallest and largest log(pi / anchor) of a token, beyond which it passes no gradient; the
      bounds stand in for it in r_t (Humanline, arXiv:2509.24207). None is no clamp.

  Returns:
    Loss per token; metrics `clip_fraction` (tokens whose gradient is cut), `ratio`, `behaviour_kl`, an
    estimate of KL(behaviour || policy), and with a clamp `unclamped_fraction`.
  """
  _check(low, high, level, dual_clip)
  _check_anchor("clipped_surrogate", anchor)
  check_clamp("clipped_surrogate", clamp)
  advantages = _advantages(batch)
  drift = log_ratio(batch, outputs.logprobs, _anchor(batch, anchor))
  log_ratios, unclamped = clamped(drift, clamp)
  if level != "token":
    own = log_ratios - jax.lax.stop_gradient(log_ratios)  # 0, with the gradient of one token
    log_ratios = to_tokens(batch, mean_by_sequence(batch, log_ratios))
    if level == "sequence_token":
      log_ratios = jax.lax.stop_gradient(log_ratios) + own
    log_ratios = jnp.where(batch.loss_mask, log_ratios, 0)
  ratio = jnp.exp(cap(log_ratios))
  # The minimum only ever binds on one side: from above for A >= 0, from below (and, with the dual
  # clip, far above) for A < 0. Selecting the bound cuts the gradient where clip_fraction says.
  negative = advantages < 0
  lower = jnp.where(negative, 1 - low, 0)
  upper = jnp.where(negative, jnp.inf if dual_clip is None else dual_clip, 1 + high)
  cut = (ratio < lower) | (ratio > upper)
  trusted = jnp.where(cut, jax.lax.stop_gradient(jnp.clip(ratio, lower, upper)), ratio)
  metrics = {
      "clip_fraction": jnp.where(advantages != 0, cut, False).astype(ratio.dtype),
      "ratio": ratio,
      "behaviour_kl": _behaviour_kl(drift), **unclamped,
  }
  return -advantages * trusted, metrics


@takes_whole()
@needs(_anchor_signal)
def geometric_mean(outputs: ModelOutputs, batch: TokenBatch, *, high: float = 0.4,
                   anchor: str = "behaviour") -> TermOutput:
  """Policy gradient with the geometric mean of the token ratios (GMPO, arXiv:2507.20673, eq. 4).

  With d_t = log(pi(t) / behaviour(t)), s the sign of the sequence's advantage and T its loss tokens:

    loss = -A * exp(s / T * sum_t min(s * d_t, high))

  so a token is cut where it has moved far enough in the direction of s; the paper's lower bound never
  binds inside its minimum. Every token of the sequence has this loss, so aggregation
  "sequence_mean" is the paper's.

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `behaviour_logprobs` and `signals["advantages"]`, of which a sequence's mean over
      its loss tokens is A.
    high: largest log-ratio in the direction of s that has a gradient; 0.4 in the paper.
    anchor: as in `clipped_surrogate`.

  Returns:
    Loss per token; metrics `clip_fraction`, `ratio` and `behaviour_kl`.
  """
  _check_anchor("geometric_mean", anchor)
  if _is_known(high) and high < 0:
    raise ValueError(f"geometric_mean: high={high} is the largest log-ratio in the direction of "
                     "the advantage, so at least 0; 0.4 is usual")
  advantages = to_tokens(batch, mean_by_sequence(batch, _advantages(batch)))
  sign = jnp.sign(advantages)
  log_ratios = log_ratio(batch, outputs.logprobs, _anchor(batch, anchor))
  directed = jnp.where(sign == 0, 0, sign * log_ratios)  # not 0 * inf
  mean = to_tokens(batch, mean_by_sequence(batch, sign * jnp.minimum(directed, high)))
  ratio = jnp.exp(cap(jnp.where(batch.loss_mask, mean, 0)))
  metrics = {"clip_fraction": jnp.where(batch.loss_mask & (sign != 0), directed > high, False
                                        ).astype(ratio.dtype),
             "ratio": ratio, "behaviour_kl": _behaviour_kl(log_ratios)}
  return jnp.where(batch.loss_mask, -advantages * ratio, 0), metrics


def _anchor(batch, anchor):
  return batch.behaviour_logprobs if anchor == "behaviour" else batch.signals[f"{anchor}_logprobs"]


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
  if _is_known(importance_cap) and not importance_cap > 0:
    raise ValueError(f"reinforce: importance_cap={importance_cap} has to be above 0; 2.0 is usual, "
                     "None turns importance weights off")


def _check_anchor(term, anchor):
  if anchor not in ("behaviour", "old", "reference"):
    raise ValueError(f"{term}: anchor={anchor!r}; valid are 'behaviour', 'old' and 'reference'")


def _check(low, high, level, dual_clip):
  if level not in ("token", "sequence", "sequence_token"):
    raise ValueError(f"clipped_surrogate: level={level!r}; valid are 'token', 'sequence' and "
                     "'sequence_token'")
  if _is_known(low, high) and (low < 0 or high < 0):
    raise ValueError(f"clipped_surrogate: low={low}, high={high}; both are distances from 1, so at "
                     "least 0")
  if _is_known(dual_clip) and dual_clip <= 1:
    raise ValueError(f"clipped_surrogate: dual_clip={dual_clip} has to be above 1; 3.0 is usual, "
                     "None turns it off")


def _is_known(*numbers):
  """Whether all are plain numbers, not scheduled ones, whose value only the device knows."""
  return all(isinstance(x, int | float) for x in numbers)
