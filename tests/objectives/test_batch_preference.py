"""KTO, BCO and AOT against float64 NumPy over the whole batch, gradients by finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxrl import compose
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives import aot, bco, kto
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms

log_s, s = scipy.special.log_expit, scipy.special.expit
B = 0.4
PAIRS = [(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
SINGLES = [(1.0,), (0.0,), (0.3,), (1.0,), (1.0,), (0.0,)]


def drawn(seed, groups, strays=3):
  """Trajectories with the log-probabilities of both models in their signals, and unscored strays."""
  rng = np.random.default_rng(seed)
  found = []
  for group, labels in enumerate([*groups, *[(0.0,)] * strays]):
    head = int(rng.integers(1, 6))
    stray = group >= len(groups)
    for label in labels:
      n = int(rng.integers(1, 10))
      mask = np.arange(head + n) >= head
      found.append(Trajectory(
          rng.integers(0, 9, head + n), mask, group=group, scored=not stray,
          columns={"preference": label}, signals={
              "old_logprobs": rng.uniform(-2, 0, head + n),
              "reference_logprobs": rng.uniform(-2, 0, head + n), "mismatched": stray * mask}))
  return [found[i] for i in rng.permutation(len(found))]


def sums(trajectories, name, scored=True):
  return np.array([np.float64(t.signals[name])[t.loss_mask].sum() for t in trajectories
                   if t.scored == scored])


def both(trajectories):
  """pi and pi_reference of the chosen answers of pairs, and of the rejected ones."""
  sides = []
  for label in (1.0, 0.0):
    mine = sorted((t for t in trajectories if t.scored and t.columns["preference"] == label),
                  key=lambda t: t.group)
    sides.append((sums(mine, "old_logprobs"), sums(mine, "reference_logprobs")))
  return sides


def good(trajectories):
  return np.array([t.columns["preference"] for t in trajectories if t.scored])


def rho(trajectories, scored=True):
  return (sums(trajectories, "old_logprobs", scored)
          - sums(trajectories, "reference_logprobs", scored))


def kto_equation(trajectories, frozen):
  z, r, p = max(0, rho(frozen, scored=False).mean()), rho(trajectories), good(trajectories)
  return np.mean(p * 0.7 * (1 - s(B * (r - z))) + (1 - p) * 1.3 * (1 - s(B * (z - r))))


def bco_equation(trajectories, frozen):
  r, p, shift = B * rho(trajectories), good(trajectories), (B * rho(frozen)).mean()
  return np.mean(-p * log_s(r - shift) - (1 - p) * log_s(shift - r))


def aot_equation(trajectories, _):
  (chosen, chosen_ref), (rejected, rejected_ref) = both(trajectories)
  d = np.sort(chosen - rejected) - np.sort(chosen_ref - rejected_ref)
  return np.mean(-0.9 * log_s(B * d) - 0.1 * log_s(-B * d))


def unpaired_equation(trajectories, _):
  (chosen, chosen_ref), (rejected, rejected_ref) = both(trajectories)
  return np.mean(-log_s(B * (np.sort(chosen - chosen_ref) - np.sort(rejected - rejected_ref))))


KTO = functools.partial(kto, beta=B, desirable=0.7, undesirable=1.3)
CASES = {
    "kto": (KTO, kto_equation, SINGLES), "kto_of_pairs": (KTO, kto_equation, PAIRS),
    "bco": (functools.partial(bco, beta=B), bco_equation, SINGLES),
    "aot": (functools.partial(aot, beta=B, label_smoothing=0.1), aot_equation, PAIRS),
    "aot_unpaired": (functools.partial(aot, beta=B, unpaired=True), unpaired_equation, PAIRS)}


def prepared(term, trajectories, memory=None):
  batch = jax.tree.map(jnp.asarray, pack(trajectories, row_length=32, together=True))
  initial = compose.initial_of(term)
  memory = memory if memory is not None or initial is None else initial()
  signals, memory = compose.prepared(term, batch, memory)
  return batch.with_signals(**signals), memory


def loss_of(term, batch, logprobs):
  return sum_of_terms([term])(ModelOutputs(logprobs=logprobs), batch,
                              loss_weights(batch, "sequence_mean"), mean_weights(batch, True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_equal_the_equation(name, seed):
  term, equation, groups = CASES[name]
  trajectories = drawn(seed, groups)
  batch, _ = prepared(term, trajectories)
  (value, _), gradient = jax.value_and_grad(functools.partial(loss_of, term, batch), has_aux=True)(
      jnp.where(batch.loss_mask, batch.signals["old_logprobs"], jnp.nan))
  np.testing.assert_allclose(value, equation(trajectories, trajectories), rtol=1e-5)
  for item, t in enumerate(trajectories):
    mine = np.asarray(gradient)[np.asarray(batch.sequence_ids) == item]
    if not t.scored:
      assert not mine.any()
      continue
    def moved(step):
      shifted = [Trajectory(u.tokens, u.loss_mask, group=u.group, scored=u.scored, columns=u.columns,
                            signals=dict(u.signals)) for u in trajectories]
      values = np.float64(t.signals["old_logprobs"])
      values[np.flatnonzero(t.loss_mask)[0]] += step
      shifted[item].signals["old_logprobs"] = values
      return equation(shifted, trajectories)
    expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
    np.testing.assert_allclose(mine[t.loss_mask], expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_extreme_ratios_and_batches_of_nothing_stay_finite(name):
  term, _, groups = CASES[name]
  for trajectories in (drawn(2, groups), drawn(2, groups[:1], strays=0), drawn(2, [], strays=1)):
    for t in trajectories:
      t.signals["old_logprobs"] *= 1e4
    batch, _ = prepared(term, trajectories)
    (value, metrics), gradient = jax.value_and_grad(
        functools.partial(loss_of, term, batch), has_aux=True)(batch.signals["old_logprobs"])
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert all(np.isfinite(x) for x in metrics.values())


def test_the_shift_is_the_mean_of_all_rewards_so_far():
  batches = [drawn(seed, groups) for seed, groups in ((3, SINGLES), (4, SINGLES[:2]), (5, SINGLES))]
  memory, seen = None, []
  for trajectories in batches:
    batch, memory = prepared(functools.partial(bco, beta=B), trajectories, memory)
    seen += list(B * rho(trajectories))
    np.testing.assert_allclose(memory["mean"], np.mean(seen), rtol=1e-5)
    _, metrics = loss_of(functools.partial(bco, beta=B), batch, batch.signals["old_logprobs"])
    np.testing.assert_allclose(metrics["bco_shift"], np.mean(seen), rtol=1e-5)


def test_unequal_numbers_meet_at_their_quantiles():
  trajectories = drawn(6, [(1.0,)] * 2 + [(0.0,)] * 4, strays=0)
  batch, _ = prepared(functools.partial(aot, unpaired=True), trajectories)
  ratio, labels = rho(trajectories), good(trajectories)
  high, low = np.sort(ratio[labels == 1]), np.sort(ratio[labels == 0])
  for item, (r, label) in enumerate(zip(ratio, labels)):
    found = np.asarray(batch.signals["aot_partner"])[np.asarray(batch.sequence_ids) == item][0]
    rank = np.searchsorted(high if label else low, r)
    expected = low[[1, 3][rank]] if label else high[[0, 0, 1, 1][rank]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("term, arguments, message", [
    (kto, dict(beta=0.0), "kto: beta=0.0"), (kto, dict(desirable=-1), "desirable=-1"),
    (bco, dict(beta=-1), "bco: beta"), (aot, dict(label_smoothing=0.5), "aot: label_smoothing")])
def test_impossible_arguments_are_refused(term, arguments, message):
  batch, _ = prepared(term, drawn(0, PAIRS))
  with pytest.raises(ValueError, match=message):
    term(ModelOutputs(logprobs=batch.signals["old_logprobs"]), batch, **arguments)
