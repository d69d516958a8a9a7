"""Preference losses: DPO and its family, over pairs of sequences of which one is preferred.

A pair is a group of two scored sequences; a group of any other size has no loss. The column
`preference` is the probability that a sequence is the better one of its pair: 1 and 0 for chosen and
rejected, 0.5 twice for a tie, anything that adds up to 1 for soft labels. With y the sequence, y' the
other one, and

  pi(y)  = sum over the loss tokens of y of log pi(t), EOS included (with `normalise`, their mean)
  rho(y) = pi(y) - pi_reference(y),      h = g(rho(y)) - g(rho(y')),      g(x) = x by default

the loss of a pair is `sum over both y of preference(y) * loss(y, y')`. Every token of both sequences
has the value of its pair, so that aggregation "sequence_mean" is the mean over pairs, whatever their
lengths. Pairs have to be packed together (`batch.pack(together=True)`), as phases whose terms are
`compose.by_sequence` do. In phases of rollouts an edit supplies the column (`edits.best_and_worst`), and
log-probabilities are those at `rollout.temperature`. Sums are made in float32.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.batch import column_of, sum_by_sequence, to_tokens
from jaxrl.compose import by_sequence, nearest, needs, of_pairs
from jaxrl.log_ratio import cap, check_clamp, clamped, log_ratio
from jaxrl.objectives.aggregate import TermOutput
from jaxrl.objectives.pairs import answers_of, check_numbers, diagnostics, loss_of_pairs, of_other, preferences
from jaxrl.objectives.pairs import reduce, token_weights


@of_pairs
@needs("reference_logprobs", lambda weigh_by_policy: ("collision",) if weigh_by_policy else ())
def dpo(outputs: ModelOutputs, batch: TokenBatch, *, loss: str = "sigmoid", beta: float = 0.1,
        label_smoothing: float = 0.0, divergence: str = "reverse_kl", alpha: float = 0.5,
        tail_weight: float = 1.0, normalise: bool = False, margin: str | None = None,
        tau: float = 0.05, weigh_by_policy: bool = False,
        clamp: Sequence[float] | None = None) -> TermOutput:
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
    bco_pair    -log s(beta r) - log s(-beta r')          arXiv:2404.04656 without its shift, see `bco`
    discopop    (1-m) (-log s(beta h)) + m exp(-beta h), m = s(beta h / tau)           arXiv:2406.08414

  The divergence from the reference (f-DPO, arXiv:2309.16240) is g(x), up to a constant:

    reverse_kl x,   forward_kl -exp(-x),   js x - log(1 + exp(x)),   alpha -exp(-alpha x) / alpha

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `signals["reference_logprobs"]` and `columns["preference"]`; and
      `signals["token_weights"]`, if there are any, multiply log-probabilities of both models.
    loss: one of those above.
    beta: strength of the pull to the reference, above 0.
    label_smoothing: probability that a label is wrong, in [0, 0.5); for sigmoid, robust and exo.
    divergence: one of `DIVERGENCES`; others than "reverse_kl" for losses of h only.
    alpha: of the alpha divergence, above 0; 1 minus TRL's coefficient.
    tail_weight: what tokens beyond the length of the shorter sequence count (LD-DPO,
      arXiv:2409.06411); 1 is DPO.
    normalise: means of log-probabilities instead of sums (LN-DPO).
    margin: column that is subtracted from `beta h` (ODPO, arXiv:2402.10571), equal in both
      sequences of a pair; None for none. For losses of h only.
    tau: of discopop; other losses do not read it, nor other divergences `alpha`.
    weigh_by_policy: multiplies the loss of a pair by w(y) w(y'), where w(y) is the exponential of the
      mean over tokens of log pi(t) - log sum over the vocabulary of pi^2, and passes no gradient
      (WPO, arXiv:2406.11827, eq. 2).
    clamp: smallest and largest log-ratio of a token, beyond which it passes no gradient; its bounds
      stand in for it in the sum (Humanline, arXiv:2509.24207). None is no clamp.

  Returns:
    Loss per token; metrics by sequence `preference_accuracy`, `preference_margin` (beta h),
    `chosen_reward` and `rejected_reward` (beta rho), and with a clamp `unclamped_fraction`.

  Raises:
    ValueError: unknown names, numbers out of range; a margin, divergence or label_smoothing that the
      loss does not read.
  """
  _check(loss, divergence, margin, label_smoothing)
  check_numbers("dpo", label_smoothing=label_smoothing, above_0=dict(beta=beta, alpha=alpha, tau=tau))
  check_clamp("dpo", clamp)
  weights = token_weights(batch, tail_weight)
  ratios, unclamped = clamped(
      log_ratio(batch, outputs.logprobs, batch.signals["reference_logprobs"]), clamp)
  ratio = reduce(batch, ratios, weights, normalise)
  score = DIVERGENCES[divergence](ratio, alpha)
  h = beta * (score - of_other(batch, score))
  offset = column_of(batch, margin, "dpo")
  if offset is not None:
    h = h - offset
  if loss in OF_DIFFERENCE:
    values = OF_DIFFERENCE[loss](h, beta, label_smoothing, tau)
  else:
    values = OF_BOTH[loss](beta * ratio, beta * of_other(batch, ratio), beta)
  if weigh_by_policy:
    aligned = outputs.logprobs - jnp.log(jnp.maximum(outputs.get("collision"), 1e-30))
    own = jnp.exp(jax.lax.stop_gradient(reduce(batch, aligned, normalise=True)))
    values = values * own * of_other(batch, own)
  return loss_of_pairs(batch, values), diagnostics(batch, beta * ratio, h) | unclamped


@of_pairs
def cpo(outputs: ModelOutputs, batch: TokenBatch, *, beta: float = 0.1,
        label_smoothing: float = 0.0) -> TermOutput:
  """Contrastive preference optimisation: DPO without a reference (arXiv:2401.08417, eq. 5).

    loss = -(1-e) log s(beta (pi(y) - pi(y'))) - e log s(-beta (pi(y) - pi(y')))

  The paper adds `imitate_preferred`. Arguments, result and errors as in `dpo`.
  """
  check_numbers("cpo", label_smoothing=label_smoothing, above_0=dict(beta=beta))
  reward = beta * reduce(batch, outputs.logprobs, token_weights(batch))
  h = reward - of_other(batch, reward)
  return loss_of_pairs(batch, logistic(h, label_smoothing)), diagnostics(batch, reward, h)


@of_pairs
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
  check_numbers("simpo", label_smoothing=label_smoothing, above_0=dict(beta=beta))
  reward = beta * reduce(batch, outputs.logprobs, token_weights(batch), normalise=True)
  h = reward - of_other(batch, reward)
  return loss_of_pairs(batch, logistic(h - gamma, label_smoothing)), diagnostics(batch, reward, h)


@of_pairs
def orpo(outputs: ModelOutputs, batch: TokenBatch, *, beta: float = 0.1) -> TermOutput:
  """Odds-ratio preference optimisation (arXiv:2403.07691, eq. 6-7), to be added to
  `imitate_preferred`.

    p(y) = exp(mean log pi(t)),  loss = -beta log s(log p(y) / (1 - p(y)) - log p(y') / (1 - p(y')))

  A mean above -1e-6 counts as that: the odds of certainty are infinite. Arguments and result as in
  `dpo`; rewards are the log odds.
  """
  check_numbers("orpo", above_0=dict(beta=beta))
  mean = reduce(batch, outputs.logprobs, token_weights(batch), normalise=True)
  mean = jnp.minimum(mean, -1e-6)
  odds = mean - jnp.log(-jnp.expm1(mean))
  h = odds - of_other(batch, odds)
  return loss_of_pairs(batch, -beta * jax.nn.log_sigmoid(h)), diagnostics(batch, odds, h)


@by_sequence
def imitate_preferred(outputs: ModelOutputs, batch: TokenBatch, *, coefficient: float = 1.0
                      ) -> TermOutput:
  """Cross-entropy of the preferred sequences: `-2 c preference(y) log pi(t)`.

  With aggregation "sequence_mean" the sum is c times the mean over pairs of the chosen sequence's
  mean token loss (RPO, arXiv:2404.19733, eq. 1; TRL and CPO average over all chosen tokens of the
  batch). The metric `chosen_nll` is that mean.
  """
  answers = answers_of(batch).loss_mask
  lengths = [sum_by_sequence(batch, mask.astype(jnp.float32)) for mask in (batch.loss_mask, answers)]
  # A critique behind the answer is no part of it, but of what the aggregation divides by.
  share = to_tokens(batch, preferences(batch) * lengths[0] / jnp.maximum(lengths[1], 1))
  values = jnp.where(answers, -2 * share * outputs.logprobs, 0)
  return coefficient * values, {"chosen_nll": values}


# --------------------------------------------------------------------------------- losses by name


def logistic(h: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
  """`-(1-e) log s(h) - e log s(-h)`"""
  e = label_smoothing
  return -(1 - e) * jax.nn.log_sigmoid(h) - e * jax.nn.log_sigmoid(-h)


def _robust(h, beta, e, tau):
  return (-(1 - e) * jax.nn.log_sigmoid(h) + e * jax.nn.log_sigmoid(-h)) / (1 - 2 * e)


def _exo(h, beta, e, tau):
  return (jax.nn.sigmoid(h) * (jax.nn.log_sigmoid(h) - jnp.log1p(-e))
          + jax.nn.sigmoid(-h) * (jax.nn.log_sigmoid(-h) - jnp.log(e)))


def _discopop(h, beta, e, tau):
  share = jax.nn.sigmoid(h / tau)
  return -(1 - share) * jax.nn.log_sigmoid(h) + share * jnp.exp(cap(-h))


def _nca(own, other, beta):
  return -jax.nn.log_sigmoid(own) - (jax.nn.log_sigmoid(-own) + jax.nn.log_sigmoid(-other)) / 2


# Of h with beta, label_smoothing and tau; of beta r and beta r' with beta.
OF_DIFFERENCE: dict[str, Callable] = {
    "sigmoid": lambda h, beta, e, tau: logistic(h, e), "robust": _robust,
    "hinge": lambda h, beta, e, tau: jax.nn.relu(1 - h),
    "ipo": lambda h, beta, e, tau: ((h - 0.5) / beta) ** 2, "exo": _exo, "discopop": _discopop}
OF_BOTH: dict[str, Callable] = {
    "nca": _nca,
    "bco_pair": lambda own, other, beta: -jax.nn.log_sigmoid(own) - jax.nn.log_sigmoid(-other),
    "sppo_hard": lambda own, other, beta: ((own - 0.5) / beta) ** 2 + ((other + 0.5) / beta) ** 2,
    "apo_zero": lambda own, other, beta: jax.nn.sigmoid(-own) + jax.nn.sigmoid(other),
    "apo_down": lambda own, other, beta: jax.nn.sigmoid(own) + jax.nn.sigmoid(other - own)}
SMOOTHED = ("sigmoid", "robust", "exo")
DIVERGENCES: dict[str, Callable] = {
    "reverse_kl": lambda x, alpha: x,
    "forward_kl": lambda x, alpha: -jnp.exp(cap(-x)),
    "js": lambda x, alpha: jax.nn.log_sigmoid(x),
    "alpha": lambda x, alpha: -jnp.exp(cap(-alpha * x)) / alpha}


def _check(loss, divergence, margin, label_smoothing):
  names = (*OF_DIFFERENCE, *OF_BOTH)
  if loss not in names:
    raise ValueError(f"dpo: loss={loss!r}{nearest(loss, names)}")
  if divergence not in DIVERGENCES:
    raise ValueError(f"dpo: divergence={divergence!r}{nearest(divergence, DIVERGENCES)}")
  if loss in OF_BOTH and (divergence != "reverse_kl" or margin is not None):
    raise ValueError(f"dpo: loss={loss!r} is no function of the difference h, so it takes neither a "
                     f"divergence ({divergence!r}) nor a margin ({margin!r})")
  if isinstance(label_smoothing, int | float):
    if label_smoothing and loss not in SMOOTHED:
      raise ValueError(f"dpo: loss={loss!r} takes no label_smoothing; {', '.join(SMOOTHED)} do")
    if loss == "exo" and not label_smoothing:
      raise ValueError("dpo: loss='exo' needs label_smoothing above 0, usually 1e-3")
