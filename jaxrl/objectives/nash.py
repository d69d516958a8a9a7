"""Nash preference optimisation: the policy plays against models of its own past."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.compose import needs, of_pairs
from jaxrl.objectives.aggregate import TermOutput
from jaxrl.objectives.pairs import check_numbers, diagnostics, loss_of_pairs, of_other, reduce
from jaxrl.objectives.pairs import token_weights


def _read(rho, models):
  """The models whose log-probabilities the loss reads."""
  known = isinstance(rho, int | float)  # rather than a schedule
  reference = () if known and rho == 0 else ("reference",)
  return (*reference, *(() if known and rho == 1 else models))


@of_pairs
@needs(lambda rho, models: [f"{model}_logprobs" for model in _read(rho, models)])
def mnpo(outputs: ModelOutputs, batch: TokenBatch, *, rho: float = 1 / 3, eta: float = 1.0,
         models: Sequence[str] = ("previous", "before"), weights: Sequence[float] = ()) -> TermOutput:
  """Multiplayer Nash preference optimisation, its loss TD-MNPO (arXiv:2509.23102).

  With l_m(y) the mean over the loss tokens of y of log m(t), and D_m = l_m(y) - l_m(y') for a pair:

    loss(y, y') = (D_policy - rho D_reference - (1 - rho) sum_j weight_j D_j - 1 / (2 eta))^2

  over opponents j, frozen models of `config.frozen`, usually the policies of the last iterations. rho = 1
  is `dpo(loss="ipo", beta=eta, normalise=True)`; one opponent, the policy that the iteration began with,
  is INPO (arXiv:2407.00617) of means; rho = 0 without opponents has no anchor, as SimPO. The target
  1 / (2 eta) has to be one that means over tokens reach: 0.0075, as published, asks for 67.

  Args:
    outputs: supplies `logprobs`.
    batch: supplies `columns["preference"]` and the signals `NAME_logprobs` of reference and opponents.
    rho: share of the reference, 0 to 1; the rest is that of the opponents.
    eta: step, above 0.
    models: the opponents.
    weights: of the opponents, adding up to 1; none is equal weights.

  Returns:
    Loss per token; metrics by sequence as those of `dpo`, with D_policy less the anchor for h.

  Raises:
    ValueError: numbers out of range, or weights that are not one for each opponent.
  """
  check_numbers("mnpo", above_0=dict(eta=eta))
  if isinstance(rho, int | float) and not 0 <= rho <= 1:
    raise ValueError(f"mnpo: rho={rho} has to be from 0 to 1")
  share = tuple(weights) or (1 / max(len(models), 1),) * len(models)
  if len(share) != len(models) or (models and abs(sum(share) - 1) > 1e-6) or min(share, default=0) < 0:
    raise ValueError(f"mnpo: weights={tuple(weights)} of the opponents {', '.join(models) or 'none'} have "
                     "to be one for each, at least 0, and add up to 1")
  anchor = jnp.zeros(batch.tokens.shape, jnp.float32)
  factors = {"reference": rho, **{model: (1 - rho) * w for model, w in zip(models, share)}}
  for model in _read(rho, models):
    anchor += factors[model] * batch.signals[f"{model}_logprobs"]
  ratio = reduce(batch, outputs.logprobs - anchor, token_weights(batch), normalise=True)
  h = ratio - of_other(batch, ratio)
  return loss_of_pairs(batch, (h - 1 / (2 * eta)) ** 2), diagnostics(batch, ratio, h)
