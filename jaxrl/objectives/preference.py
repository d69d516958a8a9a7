"""Preference losses: DPO and its family, over pairs of sequences of which one is preferred.

A pair is a group of two scored sequences; a group of any other size has no loss. The column
`preference` is the probability that a sequence is the better one of its pair: 1 and 0 for chosen and
rejected, 0.5 twice for a tie, anything that adds up to 1 for soft labels. With y the sequence, y' the
other one, and

  pi(y)  = sum over the loss tokens of y of log pi(t), EOS included (with `normalise`, their mean)
  rho(y) = pi(y) - pi_reference(y),      h = g(rho(y)) - g(rho(y')),      g(x) = x by default

the loss of a pair is `sum over both y of preference(y) * loss(y, y')`. Every token of both sequences
has the value of its pair, so that aggregation "sequence_mean" is the mean over pairs, whatever their
lengths. Pairs have to be packed together (`batch.pack(together=True)`), as phases of kind
`preference` do. Sums are made in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.batch import column_of, count_by_group, mean_by_sequence, sum_by_group, sum_by_sequence
from jaxrl.batch import to_tokens
from jaxrl.compose import by_sequence, nearest, needs
from jaxrl.log_ratio import cap
from jaxrl.objectives.aggregate import TermOutput

PREFERENCE = "preference"
Sequences = Float[Array, "sequences"]


@by_sequence
@needs("reference_logprobs")
def dpo(outputs: ModelOutputs, batch: TokenBatch, *, loss: str = "sigmoid", beta: float = 0.1,
        label_smoothing: float = 0.0, divergence: str = "reverse_kl", alpha: float = 0.5,
        tail_weight: float = 1.0, normalise: bool = False, margin: str | None = None,
        tau: float = 0.05) -> TermOutput:
  """Direct preference optimisation (Rafailov et al., arXiv:2305.18290, eq. 7) and its variants.

  With e = label_smoothing, s the logistic function, r = rho(y) and r' = rho(y'):

    sigmoid     -(1-e) log s(beta h) - e log s(-beta h)                           DPO; cDPO with e > 0
    robust      (-(1-e) log s(beta h) + e log s(-beta h)) / (1 - 2e)                   arXiv:2403.00409
    hinge       max(0, 1 - beta h)                                               SLiC, arXiv:2305.10425
    ipo         (h - 1 / (2 beta))^2, with means over tokens if `normalise`            arXiv:2310.12036
    exo         KL((s(beta h), s(-beta h)) || (1-e, e)), for which e > 0               arXiv:2402.00856
    nca         -log s(beta r) - (log s(-beta r) + log s(-beta r')) / 2                arXiv:2402.05369
    sppo_hard   (r - 1 / (2 beta))^2 + (r' + 1 / (2 beta))^2                           arXiv:2405.00675
    apo_zero    1 - s(beta r) + s(beta r')                                             arXiv:2408.06266
    apo_down    s(beta r) + 1 - s(beta h)                                              arXiv:2408.06266
    discopop    (1-m) (-log s(beta h)) + m exp(-beta h), m = s(beta h / tau)           arXiv:2406.08414

  The divergence from the reference (f-DPO, arXiv:2309.16240) is g(x), up to a constant:

    reverse_kl x,   forward_kl -exp(-x),   js x - log(1 + exp(x)),   alpha -exp(-alpha x) / alpha

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `signals["reference_logprobs"]` and `columns["preference"]`; and
      `signals["token_weights"]`, if there are any, multiply log-probabilities of both models.
    loss: one of `LOSSES`.
    beta: strength of the pull to the reference, above 0.
    label_smoothing: probability that a label is wrong, in [0, 0.5); for sigmoid, robust and exo.
    divergence: one of `DIVERGENCES`; others than "reverse_kl" for losses of h only.
    alpha: of the alpha divergence, above 0.
    tail_weight: what tokens beyond the length of the shorter sequence count (LD-DPO,
      arXiv:2409.06411); 1 is DPO.
    normalise: means of log-probabilities instead of sums (LN-DPO).
    margin: column that is subtracted from `beta h` (ODPO, arXiv:2402.10571), equal in both
      sequences of a pair; None for none. For losses of h only.
    tau: of discopop.

  Returns:
    Loss per token; metrics by sequence `preference_accuracy`, `preference_margin` (beta h),
    `chosen_reward` and `rejected_reward` (beta rho).

  Raises:
    ValueError: unknown names, numbers out of range, or arguments that the loss does not read.
  """
  _check(loss, beta, label_smoothing, divergence, alpha, margin)
  weights = _token_weights(batch, tail_weight)
  ratio = _reduce(batch, outputs.logprobs - batch.signals["reference_logprobs"], weights, normalise)
  other = _other(batch, ratio)
  score = DIVERGENCES[divergence](ratio, alpha)
  h = beta * (score - _other(batch, score))
  offset = column_of(batch, margin, "dpo")
  if offset is not None:
    h = h - offset
  function = LOSSES[loss]
  if function in _OF_MARGIN:
    values = function(h, beta=beta, e=label_smoothing, tau=tau)
  else:
    values = function(beta * ratio, beta * other, beta=beta)
  return _of_pairs(batch, values), _diagnostics(batch, beta * ratio, h)


@by_sequence
def cpo(outputs: ModelOutputs, batch: TokenBatch, *, beta: float = 0.1,
        label_smoothing: float = 0.0) -> TermOutput:
  """Contrastive preference optimisation: DPO without a reference (arXiv:2401.08417, eq. 5).

    loss = -(1-e) log s(beta (pi(y) - pi(y'))) - e log s(-beta (pi(y) - pi(y')))

  The paper adds `imitate_preferred`. Arguments, result and errors as in `dpo`.
  """
  _check("sigmoid", beta, label_smoothing, "reverse_kl", 1.0, None)
  reward = beta * _reduce(batch, outputs.logprobs, _token_weights(batch, 1.0), False)
  h = reward - _other(batch, reward)
  return (_of_pairs(batch, _sigmoid(h, beta=beta, e=label_smoothing, tau=0.0)),
          _diagnostics(batch, reward, h))


@by_sequence
def simpo(outputs: ModelOutputs, batch: TokenBatch, *, beta: float = 2.0, gamma: float = 1.0,
          label_smoothing: float = 0.0) -> TermOutput:
  """Simple preference optimisation (arXiv:2405.14734, eq. 6).

    h = beta (mean log pi(y) - mean log pi(y')) - gamma,  loss = -(1-e) log s(h) - e log s(-h)

  Args:
    outputs, batch: as in `cpo`.
    beta: scale of rewards, 2 to 10.
    gamma: target margin between rewards; in the paper about half of beta.
    label_smoothing: as in `dpo`.

  Returns and raises: as `dpo`.
  """
  _check("sigmoid", beta, label_smoothing, "reverse_kl", 1.0, None)
  reward = beta * _reduce(batch, outputs.logprobs, _token_weights(batch, 1.0), True)
  h = reward - _other(batch, reward)
  return (_of_pairs(batch, _sigmoid(h - gamma, beta=beta, e=label_smoothing, tau=0.0)),
          _diagnostics(batch, reward, h))


@by_sequence
def orpo(outputs: ModelOutputs, batch: TokenBatch, *, beta: float = 0.1) -> TermOutput:
  """Odds-ratio preference optimisation (arXiv:2403.07691, eq. 6-7), to be added to
  `imitate_preferred`.

    p(y) = exp(mean log pi(t)),  loss = -beta log s(log p(y) / (1 - p(y)) - log p(y') / (1 - p(y')))

  A mean above -1e-6 counts as that: the odds of certainty are infinite. Arguments and result as in
  `dpo`; rewards are the log odds.
  """
  _check("sigmoid", beta, 0.0, "reverse_kl", 1.0, None)
  mean = _reduce(batch, outputs.logprobs, _token_weights(batch, 1.0), True)
  mean = jnp.minimum(mean, -1e-6)
  odds = mean - jnp.log(-jnp.expm1(mean))
  h = odds - _other(batch, odds)
  return _of_pairs(batch, -beta * jax.nn.log_sigmoid(h)), _diagnostics(batch, odds, h)


@by_sequence
def imitate_preferred(outputs: ModelOutputs, batch: TokenBatch, *, coefficient: float = 1.0
                      ) -> TermOutput:
  """Cross-entropy of the preferred sequences: `-2 c preference(y) log pi(t)`.

  With aggregation "sequence_mean" the sum is c times the mean over pairs of the chosen sequence's
  mean token loss (RPO, arXiv:2404.19733, eq. 1). The metric `chosen_nll` is that mean.
  """
  preference = to_tokens(batch, _preference(batch))
  values = jnp.where(batch.loss_mask, -2 * preference * outputs.logprobs, 0)
  return coefficient * values, {"chosen_nll": values}


# ------------------------------------------------------------------------- losses of one direction


def _sigmoid(h, *, beta, e, tau):
  return -(1 - e) * jax.nn.log_sigmoid(h) - e * jax.nn.log_sigmoid(-h)


def _robust(h, *, beta, e, tau):
  return (-(1 - e) * jax.nn.log_sigmoid(h) + e * jax.nn.log_sigmoid(-h)) / (1 - 2 * e)


def _hinge(h, *, beta, e, tau):
  return jax.nn.relu(1 - h)


def _ipo(h, *, beta, e, tau):
  return (h / beta - 0.5 / beta) ** 2


def _exo(h, *, beta, e, tau):
  return (jax.nn.sigmoid(h) * (jax.nn.log_sigmoid(h) - jnp.log1p(-e))
          + jax.nn.sigmoid(-h) * (jax.nn.log_sigmoid(-h) - jnp.log(e)))


def _discopop(h, *, beta, e, tau):
  share = jax.nn.sigmoid(h / tau)
  return -(1 - share) * jax.nn.log_sigmoid(h) + share * jnp.exp(cap(-h))


def _nca(own, other, *, beta):
  return -jax.nn.log_sigmoid(own) - (jax.nn.log_sigmoid(-own) + jax.nn.log_sigmoid(-other)) / 2


def _sppo_hard(own, other, *, beta):
  return ((own - 0.5) / beta) ** 2 + ((other + 0.5) / beta) ** 2


def _apo_zero(own, other, *, beta):
  return jax.nn.sigmoid(-own) + jax.nn.sigmoid(other)


def _apo_down(own, other, *, beta):
  return jax.nn.sigmoid(own) + jax.nn.sigmoid(other - own)


LOSSES: dict[str, Callable] = {
    "sigmoid": _sigmoid, "robust": _robust, "hinge": _hinge, "ipo": _ipo, "exo": _exo,
    "discopop": _discopop, "nca": _nca, "sppo_hard": _sppo_hard, "apo_zero": _apo_zero,
    "apo_down": _apo_down}
_OF_MARGIN = (_sigmoid, _robust, _hinge, _ipo, _exo, _discopop)
_SMOOTHED = ("sigmoid", "robust", "exo")
DIVERGENCES: dict[str, Callable] = {
    "reverse_kl": lambda x, alpha: x,
    "forward_kl": lambda x, alpha: -jnp.exp(cap(-x)),
    "js": lambda x, alpha: jax.nn.log_sigmoid(x),
    "alpha": lambda x, alpha: -jnp.exp(cap(-alpha * x)) / alpha}


# ------------------------------------------------------------------------------------------- pairs


def _preference(batch: TokenBatch) -> Sequences:
  return column_of(batch, PREFERENCE, "a preference term")


def _other(batch, values):
  """The value of the other sequence of the pair."""
  return sum_by_group(batch, values) - jnp.where(batch.sequence_mask, values, 0)


def _of_pairs(batch, values):
  """At every token, the loss of its pair."""
  pair = sum_by_group(batch, _preference(batch) * values)
  pair = jnp.where(count_by_group(batch) == 2, pair, 0)
  return jnp.where(batch.loss_mask, to_tokens(batch, pair), 0)


def _reduce(batch, per_token, weights, normalise):
  """Weighted sum, or mean, over the loss tokens of every sequence, in float32."""
  per_token = jnp.where(batch.loss_mask, per_token.astype(jnp.float32) * weights, 0)
  return (mean_by_sequence if normalise else sum_by_sequence)(batch, per_token)


def _token_weights(batch, tail_weight):
  """Weights per token; those beyond the shorter sequence of the pair count `tail_weight`."""
  weights = batch.signals.get("token_weights", jnp.ones(batch.tokens.shape, jnp.float32))
  if isinstance(tail_weight, int | float) and tail_weight == 1:
    return weights
  mask = batch.loss_mask
  lengths = sum_by_sequence(batch, mask.astype(jnp.float32))
  shared = to_tokens(batch, jnp.minimum(lengths, _other(batch, lengths)))
  before = jnp.cumsum(mask, axis=1) - mask  # loss tokens of the row before this one
  first = -jax.ops.segment_max(jnp.where(mask, -before, -mask.size).reshape(-1),
                               batch.sequence_ids.reshape(-1), num_segments=batch.num_sequences)
  return jnp.where(before - to_tokens(batch, first) < shared, weights, tail_weight * weights)


def _diagnostics(batch, rewards, h):
  preference = _preference(batch)
  paired = count_by_group(batch) == 2

  def of_pair(values):
    return to_tokens(batch, jnp.where(paired, sum_by_group(batch, values), 0))
  right = (h > 0) + 0.5 * (h == 0)
  return {"preference_accuracy": of_pair(preference * right),
          "preference_margin": of_pair(preference * h),
          "chosen_reward": of_pair(preference * rewards),
          "rejected_reward": of_pair((1 - preference) * rewards)}


def _check(loss, beta, label_smoothing, divergence, alpha, margin):
  if loss not in LOSSES:
    raise ValueError(f"dpo: loss={loss!r}{nearest(loss, LOSSES)}")
  if divergence not in DIVERGENCES:
    raise ValueError(f"dpo: divergence={divergence!r}{nearest(divergence, DIVERGENCES)}")
  of_margin = LOSSES[loss] in _OF_MARGIN
  if not of_margin and (divergence != "reverse_kl" or margin is not None):
    raise ValueError(f"dpo: loss={loss!r} is no function of the difference h, so it takes neither a "
                     f"divergence ({divergence!r}) nor a margin ({margin!r})")
  for name, value in (("beta", beta), ("alpha", alpha)):
    if isinstance(value, int | float) and not value > 0:
      raise ValueError(f"dpo: {name}={value} has to be above 0")
  if isinstance(label_smoothing, int | float):
    if not 0 <= label_smoothing < 0.5:
      raise ValueError(f"dpo: label_smoothing={label_smoothing} has to be at least 0 and below 0.5")
    if label_smoothing and loss not in _SMOOTHED:
      raise ValueError(f"dpo: loss={loss!r} takes no label_smoothing; {', '.join(_SMOOTHED)} do")
    if loss == "exo" and not label_smoothing:
      raise ValueError("dpo: loss='exo' needs label_smoothing above 0, usually 1e-3")

