"""PCRM: caps and losses in float64 from the equations, stationary gaps, label noise, and a fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives import bounded_bradley_terry, bounded_dpo, bradley_terry
from jaxrl.objectives import bounded
from jaxrl.objectives.aggregate import loss_weights

log_s, s = scipy.special.log_expit, scipy.special.expit
# Prompt, answers: a common start of 2; none; one that goes on where the other ends; the same.
PAIRS = [([7, 7], [1, 2, 3, 4, 5], [1, 2, 8]), ([7], [1, 2], [3, 4, 5, 6]),
         ([7, 6, 5], [1, 2], [1, 2, 3, 4]), ([7], [1, 2, 3], [1, 2, 3])]
RATIOS = [1 / 3, 1 / 2, 0.0, 1.0]


def pairs(labels=(1.0, 0.0, 0.7, 1.0), similarity=(0.2, 0.9, 0.5, 0.1)):
  """Trajectories whose second sequences stand at other places of their rows than the first."""
  found = []
  for group, ((prompt, one, other), p, alike) in enumerate(zip(PAIRS, labels, similarity)):
    for answer, label in ((one, p), (other, 1 - p)):
      tokens = [*prompt, *answer]
      found.append(Trajectory(tokens, np.arange(len(tokens)) >= len(prompt), group=group,
                              columns={"preference": label, "alike": alike}))
  return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def packed(trajectories):
  return jax.tree.map(jnp.asarray, pack(trajectories, row_length=24, together=True, min_rows=4))


def by_group(trajectories, values):
  """Both values of every pair, its labels and its similarity."""
  for group in range(len(PAIRS)):
    items = [i for i, t in enumerate(trajectories) if t.group == group]
    columns = [trajectories[i].columns for i in items]
    yield ([values[i] for i in items], [c["preference"] for c in columns], columns[0]["alike"],
           RATIOS[group], [trajectories[i] for i in items])


def outputs_of(batch, trajectories, seed=1):
  """Scores of two heads at every token, and each sequence's own."""
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=(*batch.tokens.shape, 2)).astype(np.float32)
  own = [scores[np.nonzero((np.asarray(batch.sequence_ids) == i) & np.asarray(batch.loss_mask))]
         for i in range(len(trajectories))]
  return ModelOutputs(scores=jnp.asarray(scores)), own


def mean_loss(term, outputs, batch):
  values, metrics = term(outputs, batch)
  return float(jnp.sum(loss_weights(batch, "sequence_mean") * values)), metrics


def test_lengths_are_counted_from_the_first_token_that_differs():
  trajectories = pairs()
  found = bounded.length_ratios(packed(trajectories))
  for i, t in enumerate(trajectories):
    assert found[i] == pytest.approx(RATIOS[t.group])


@pytest.mark.parametrize("arguments", [{}, dict(similarity="alike", b1=30.0, b3=-25.0), dict(cap=4.5)])
def test_the_loss_of_last_scores_is_that_of_the_equation(arguments):
  trajectories = pairs()
  batch = packed(trajectories)
  outputs, own = outputs_of(batch, trajectories)
  found, metrics = mean_loss(functools.partial(bounded_bradley_terry, head=1, **arguments), outputs, batch)
  expected, caps = [], []
  for (x, y), p, alike, ratio, _ in by_group(trajectories, [o[-1, 1] for o in own]):
    similarity = alike if "similarity" in arguments else ratio
    cap = arguments.get("cap", arguments.get("b1", 20) / (similarity + 1e-3) + arguments.get("b3", -15))
    d = float(x) - float(y)
    expected.append(sum(q * (-log_s(h) - log_s(cap - h)) for q, h in zip(p, (d, -d))))
    caps.append(cap)
  assert found == pytest.approx(np.mean(expected), rel=1e-5)
  mean = float(jnp.sum(loss_weights(batch, "sequence_mean") * metrics["cap"]))
  assert mean == pytest.approx(np.mean(caps), rel=1e-4)


def test_over_every_place_the_shorter_answer_keeps_its_last_score():
  trajectories = pairs()
  batch = packed(trajectories)
  outputs, own = outputs_of(batch, trajectories, seed=2)
  found, _ = mean_loss(functools.partial(bounded_bradley_terry, where="every", cap=3.0), outputs, batch)
  expected = []
  for (x, y), p, _, _, both in by_group(trajectories, [np.float64(o[:, 0]) for o in own]):
    words = [t.tokens[t.loss_mask] for t in both]
    longest = max(map(len, words))
    x, y = (np.concatenate([v, np.full(longest - len(v), v[-1])]) for v in (x, y))
    first = next((i for i in range(longest) if [w[i:i + 1].tolist() for w in words][0]
                  != [w[i:i + 1].tolist() for w in words][1]), longest)
    d = (x - y)[first:]
    expected.append(sum(q * np.mean(-log_s(h) - log_s(3 - h)) for q, h in zip(p, (d, -d)))
                    if len(d) else 0.0)
  assert found == pytest.approx(np.mean(expected), rel=1e-5)


def test_dpo_is_bounded_in_the_same_way():
  trajectories = pairs()
  batch = packed(trajectories)
  rng = np.random.default_rng(4)
  policy, reference = rng.normal(size=(2, *batch.tokens.shape)).astype(np.float32)
  batch = batch.with_signals(reference_logprobs=jnp.asarray(reference))
  found, _ = mean_loss(functools.partial(bounded_dpo, beta=0.5, similarity="alike"),
                       ModelOutputs(logprobs=jnp.asarray(policy)), batch)
  rho = [np.sum(np.float64(policy - reference)[(np.asarray(batch.sequence_ids) == i)
                                               & np.asarray(batch.loss_mask)])
         for i in range(len(trajectories))]
  expected = []
  for (x, y), p, alike, _, _ in by_group(trajectories, rho):
    d, cap = 0.5 * (x - y), 20 / (alike + 1e-3) - 15
    expected.append(sum(q * (-log_s(h) - log_s(cap - h)) for q, h in zip(p, (d, -d))))
  assert found == pytest.approx(np.mean(expected), rel=1e-5)


def fitted_gap(cap, noise, term=None):
  """The gap of one pair where the term's own loss is least, by the root of its derivative."""
  trajectories = [Trajectory([7, 1 + i], [False, True], group=0, columns={"preference": p})
                  for i, p in enumerate((1 - noise, noise))]
  batch = packed(trajectories)
  at = tuple(np.argwhere(np.asarray((batch.sequence_ids == 0) & batch.loss_mask))[0])
  term = term or functools.partial(bounded_bradley_terry, cap=cap)

  @jax.jit
  @jax.value_and_grad
  def loss(d):
    scores = jnp.zeros((*batch.tokens.shape, 1)).at[at].set(d)
    return jnp.sum(loss_weights(batch, "sequence_mean") * term(ModelOutputs(scores=scores), batch)[0])
  return scipy.optimize.brentq(lambda d: float(loss(jnp.float32(d))[1]), -50, 50, xtol=1e-4)


@pytest.mark.parametrize("cap, half", [(2.0, 1.0), (5.0, 2.5), (9.0, 4.5)])
def test_the_stationary_gap_is_half_the_cap(cap, half):
  assert fitted_gap(cap, 0.0) == pytest.approx(half, abs=2e-3)


@pytest.mark.parametrize("noise", [0.1, 0.3, 0.5])
def test_with_label_noise_the_gap_solves_the_card_s_equation(noise, cap=5.0):
  def equation(d):
    return ((1 - noise) * s(-d) + noise * s(-d - cap)) - (noise * s(d) + (1 - noise) * s(d - cap))
  assert fitted_gap(cap, noise) == pytest.approx(scipy.optimize.brentq(equation, -20, 20), abs=2e-3)


def test_gaps_settle_where_those_of_bradley_terry_go_on_growing():
  """Gradient descent on the gaps of separable pairs of different similarity."""
  alike = np.array([0.3, 0.6, 1.0])
  trajectories = []
  for group, x in enumerate(alike):
    trajectories += [Trajectory([7, 1 + i], [False, True], group=group,
                                columns={"preference": 1.0 - i, "alike": x}) for i in range(2)]
  batch = packed(trajectories)
  last = [tuple(np.argwhere(np.asarray((batch.sequence_ids == i) & batch.loss_mask))[0]) for i in range(6)]
  rows, columns = np.transpose(last)

  def gaps_after(term, steps):
    @jax.jit
    def run(own):
      def loss(own):
        scores = jnp.zeros((*batch.tokens.shape, 1)).at[rows, columns, 0].set(own)
        return 100 * jnp.sum(loss_weights(batch, "sequence_mean")
                             * term(ModelOutputs(scores=scores), batch)[0])
      return jax.lax.fori_loop(0, steps, lambda _, x: x - 0.05 * jax.grad(loss)(x), own)
    own = np.asarray(run(jnp.zeros(6)))
    return own[0::2] - own[1::2]
  ours = functools.partial(bounded_bradley_terry, similarity="alike", b1=5.0, b3=0.0)
  settled = gaps_after(ours, 4000)
  np.testing.assert_allclose(settled, 5 / (alike + 1e-3) / 2, rtol=1e-2)
  np.testing.assert_allclose(gaps_after(ours, 2000), settled, rtol=1e-2)
  early, late = gaps_after(bradley_terry, 2000), gaps_after(bradley_terry, 4000)
  assert (late > early + 0.3).all() and np.ptp(late) < 1e-3  # whatever the similarity


@pytest.mark.parametrize("arguments, message", [
    (dict(where="first"), "where='first'"), (dict(b2=0.0), "b2=0"), (dict(similarity="same"), "'same'"),
    (dict(head=5), "use 0 to 1")])
def test_bad_arguments_are_refused(arguments, message):
  trajectories = pairs()
  batch = packed(trajectories)
  with pytest.raises(ValueError, match=message):
    bounded_bradley_terry(outputs_of(batch, trajectories)[0], batch, **arguments)
