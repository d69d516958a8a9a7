"""Losses of reward models against float64 NumPy from the equations, on ragged packed answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from jaxrl import batch as batches
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives import beta_preference, bradley_terry, ordinal, plackett_luce
from jaxrl.objectives import regress_attributes
from jaxrl.objectives import beta as betas
from jaxrl.objectives import reward_model
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms

log_s, s, psi = scipy.special.log_expit, scipy.special.expit, scipy.special.digamma
HEADS = 4
LABELS = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.8, 0.2)]


def answers(seed, groups=LABELS):
  """Groups of answers with 1 to 9 loss tokens behind a prompt, in a shuffled order."""
  rng = np.random.default_rng(seed)
  found = []
  for group, labels in enumerate(groups):
    head, ranks = int(rng.integers(1, 6)), rng.permutation(len(labels))
    constants = {"gap": rng.normal(), "count": float(rng.integers(1, 5))}
    for label, rank in zip(labels, ranks):
      n = int(rng.integers(1, 10))
      found.append(Trajectory(
          rng.integers(0, 9, head + n), np.arange(head + n) >= head, group=3 * group + 1,
          columns={"preference": label, "rank": float(rank), "label": float(rng.integers(1, 5)),
                   "tone": rng.normal(), **constants}))
  return [found[i] for i in rng.permutation(len(found))]


def bt(r, c, _=None):
  d = r[0][0] - r[1][0]
  return sum(c[i]["preference"] * (-0.9 * log_s(x) - 0.1 * log_s(-x)) for i, x in
             ((0, d - c[0]["gap"]), (1, -d - c[0]["gap"]))) + 0.03 * (r[0][0] + r[1][0]) ** 2


def kl_of_betas(a, b, a0, b0):
  return (scipy.special.betaln(a0, b0) - scipy.special.betaln(a, b) + (a - a0) * psi(a)
          + (b - b0) * psi(b) + (a0 - a + b0 - b) * psi(a + b))


def belief(r, c):
  mu = s(r[0][0] - r[1][0])
  tau = 0.01 + sum(np.logaddexp(0, x[1]) for x in r)
  a, b, z = mu * tau, (1 - mu) * tau, c[0]["preference"]
  likelihood = z * psi(a) + (1 - z) * psi(b) - psi(a + b)
  return -c[0]["count"] * likelihood + 0.2 * kl_of_betas(a, b, 2.0, 2.0)


def ranking(r, c):
  """Minus the logarithm of the probability that answers are drawn in the order of their ranks."""
  order, total = np.argsort([x["rank"] for x in c]), 0.0
  for i in range(len(order)):
    left = np.array([r[j][0] for j in order[i:]])
    total -= left[0] - scipy.special.logsumexp(left)
  return total


def thresholds(r, c):
  t = c[0]["label"] > np.arange(1, 4)
  return -np.mean(np.where(t, log_s(r[0][1:4]), log_s(-r[0][1:4])))


def squares(r, c):
  return ((r[0][2] - c[0]["label"]) ** 2 + (r[0][3] - c[0]["tone"]) ** 2) / 2


SINGLES = [(1.0,), (0.0,), (0.0,), (1.0,), (1.0,)]
CASES = {
    "bradley_terry": (functools.partial(bradley_terry, margin="gap", centre=0.03,
                                        label_smoothing=0.1), bt, LABELS),
    "beta_preference": (functools.partial(beta_preference, prior=(2.0, 2.0), weight=0.2,
                                          evidence="count"), belief, LABELS),
    "plackett_luce": (plackett_luce, ranking, [(1, 0, 0, 0)] * 4),
    "ordinal": (functools.partial(ordinal, levels=4, head=1), thresholds, SINGLES),
    "regress_attributes": (functools.partial(regress_attributes, labels=("label", "tone"), head=2),
                           squares, SINGLES),
}


def value_and_gradient(term, batch, scores, weights=None, means=None):
  weights = loss_weights(batch, "sequence_mean") if weights is None else weights
  means = mean_weights(batch, by_sequence=True) if means is None else means

  def loss(x):
    return sum_of_terms([term])(ModelOutputs(scores=x), batch, weights, means)
  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(scores))
  return value, metrics, gradient


def last_tokens(batch, trajectories):
  return [np.argwhere((batch.sequence_ids == item) & batch.loss_mask)[-1]
          for item in range(len(trajectories))]


def expected_loss(trajectories, scores, equation):
  groups = {}
  for t, own in zip(trajectories, scores):
    groups.setdefault(t.group, []).append((own, t.columns))
  return np.mean([equation([r for r, _ in g], [c for _, c in g]) for g in groups.values()])


def drawn(seed, batch, trajectories, scale=1.0):
  """Scores that are NaN wherever nothing may read them."""
  own = scale * np.random.default_rng(seed).normal(size=(len(trajectories), HEADS))
  packed = np.full((*batch.tokens.shape, HEADS), np.nan, np.float32)
  for values, at in zip(own, last_tokens(batch, trajectories)):
    packed[tuple(at)] = values
  return packed, own


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_equal_the_equation(name, seed):
  term, equation, groups = CASES[name]
  trajectories = answers(seed, groups)
  batch = pack(trajectories, row_length=40, together=True)
  scores, own = drawn(seed, batch, trajectories)
  value, _, gradient = value_and_gradient(term, batch, scores)
  np.testing.assert_allclose(value, expected_loss(trajectories, own, equation), rtol=1e-5)

  seen = np.zeros(scores.shape, bool)
  for item, at in enumerate(last_tokens(batch, trajectories)):
    for head in range(HEADS):
      def moved(step):
        shifted = own.copy()
        shifted[item, head] += step
        return expected_loss(trajectories, shifted, equation)
      expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
      np.testing.assert_allclose(gradient[*at, head], expected, rtol=2e-5, atol=2e-7)
      seen[*at, head] = True
  assert not np.asarray(gradient)[~seen].any()


@pytest.mark.parametrize("name", CASES)
def test_rows_add_up_to_the_batch(name):
  term, _, groups = CASES[name]
  trajectories = answers(3, groups * 3)
  batch = pack(trajectories, row_length=48, together=True)
  assert batch.tokens.shape[0] >= 3
  scores, _ = drawn(3, batch, trajectories)
  weights, means = loss_weights(batch, "sequence_mean"), mean_weights(batch, by_sequence=True)
  value, metrics, gradient = value_and_gradient(term, batch, scores)
  parts = []
  for row in range(batch.tokens.shape[0]):
    at = slice(row, row + 1)
    rows = batch.replace(**{k: jax.tree.map(lambda x: x[at], getattr(batch, k))
                            for k in batches.PER_TOKEN})
    parts.append(value_and_gradient(term, rows, scores[at], weights[at], means[at]))
  np.testing.assert_allclose(sum(p[0] for p in parts), value, rtol=1e-5)
  np.testing.assert_allclose(np.concatenate([p[2] for p in parts]), gradient, rtol=1e-5, atol=1e-8)
  for key in metrics:
    np.testing.assert_allclose(sum(p[1][key] for p in parts), metrics[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 30.0, 1e4])
@pytest.mark.parametrize("name", CASES)
def test_extreme_scores_stay_finite(name, scale, dtype):
  term, _, groups = CASES[name]
  trajectories = answers(4, groups)
  batch = pack(trajectories, row_length=40, together=True)
  scores = jnp.asarray(drawn(4, batch, trajectories, scale)[0], dtype)
  value, metrics, gradient = value_and_gradient(term, batch, scores)
  assert value.dtype == jnp.float32 and np.isfinite(value)
  assert np.isfinite(np.asarray(gradient, np.float32)).all()
  assert all(np.isfinite(x) for x in metrics.values())


def test_scores_are_those_of_the_last_loss_token_in_float32():
  trajectories = answers(5)
  trajectories[0].loss_mask[-1] = False  # ends with a token that is not its own
  trajectories[1].loss_mask[:] = False
  batch = pack(trajectories, row_length=40, together=True)
  scores = np.random.default_rng(5).normal(size=(*batch.tokens.shape, HEADS)).astype(np.float32)
  found = reward_model.sequence_scores(ModelOutputs(scores=jnp.asarray(scores, jnp.bfloat16)), batch,
                                       head=2)
  assert found.dtype == jnp.float32
  for item, t in enumerate(trajectories):
    at = np.argwhere((batch.sequence_ids == item) & batch.loss_mask)
    expected = float(jnp.bfloat16(scores[*at[-1], 2])) if len(at) else 0.0
    assert found[item] == expected


def test_a_ranking_of_two_is_a_pair_and_ties_have_one_likelihood():
  trajectories = answers(6, [(1.0, 0.0)] * 3)
  for t in trajectories:
    t.columns["rank"] = 1 - t.columns["preference"]
  batch = pack(trajectories, row_length=40, together=True)
  scores, own = drawn(6, batch, trajectories)
  pair, ranked = (value_and_gradient(term, batch, scores) for term in (bradley_terry, plackett_luce))
  np.testing.assert_allclose(pair[0], ranked[0], rtol=1e-6)
  np.testing.assert_allclose(pair[1]["preference_accuracy"], ranked[1]["ranking_accuracy"], rtol=1e-6)
  for t in trajectories:
    t.columns["rank"] = 0.0
  tied = pack(trajectories, row_length=40, together=True)
  value, metrics, _ = value_and_gradient(plackett_luce, tied, scores)
  sets = {t.group: [own[i][0] for i, u in enumerate(trajectories) if u.group == t.group]
          for t in trajectories}
  np.testing.assert_allclose(value, np.mean([2 * scipy.special.logsumexp(r) - sum(r)
                                             for r in sets.values()]), rtol=1e-5)
  assert metrics["ranking_accuracy"] == 0  # there is nothing to rank


def test_rating_metrics_follow_the_score():
  trajectories = answers(7, SINGLES)
  batch = pack(trajectories, row_length=40, together=True)
  scores, own = drawn(7, batch, trajectories)
  _, metrics, _ = value_and_gradient(functools.partial(ordinal, levels=4, head=1), batch, scores)
  rated = 1 + s(own[:, 1:4]).sum(1)
  labels = np.array([t.columns["label"] for t in trajectories])
  np.testing.assert_allclose(metrics["rating_error"], np.abs(rated - labels).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["rating_accuracy"], (rated.round() == labels).mean(), rtol=1e-6)


GRID = np.logspace(-3, 6, 13).astype(np.float32)


def test_beta_terms_keep_to_scipy_from_thousandths_to_millions():
  a, b = (np.ravel(x) for x in np.meshgrid(GRID, GRID))
  exact = psi(np.float64(a) + np.float64(b)) - psi(np.float64(a))
  found = betas.digamma_difference(a, b)
  # SciPy's own difference has lost digits where psi is large and the difference small.
  np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-13)
  for prior in ((1.0, 1.0), (0.5, 2.0), (3.0, 3.0)):
    expected = kl_of_betas(np.float64(a), np.float64(b), *prior)
    np.testing.assert_allclose(betas.kl_to_beta(a, b, *prior), expected, rtol=1e-5, atol=1e-5)


def test_beta_gradients_keep_to_the_trigamma_function():
  a, b = (np.ravel(x) for x in np.meshgrid(GRID, GRID))
  to_a, to_b = jax.vmap(jax.grad(betas.digamma_difference, (0, 1)))(a, b)
  a, b = np.float64(a), np.float64(b)
  np.testing.assert_allclose(to_b, scipy.special.polygamma(1, a + b), rtol=2e-4)
  np.testing.assert_allclose(to_a, scipy.special.polygamma(1, a + b) - scipy.special.polygamma(1, a),
                             rtol=1e-5, atol=1e-13)
  kl_a = jax.vmap(jax.grad(lambda a, b: betas.kl_to_beta(a, b, 1.5, 1.5)))(np.float32(a), np.float32(b))
  expected = (a - 1.5) * scipy.special.polygamma(1, a) - (a + b - 3) * scipy.special.polygamma(1, a + b)
  np.testing.assert_allclose(kl_a, expected, rtol=5e-4, atol=1e-7)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weight, prior", [(0.1, 1.0), (0.1, 3.0), (1.0, 1.0)])
def test_the_belief_ends_at_the_closed_form(p, weight, prior):
  trajectories = answers(8, [(p, 1 - p)])
  packed = pack(trajectories, row_length=40, together=True)
  batch = jax.tree.map(jnp.asarray, packed)
  rows, columns = np.transpose(last_tokens(packed, trajectories))
  term = functools.partial(beta_preference, prior=(prior, prior), weight=weight)

  @jax.jit
  @jax.value_and_grad
  def loss(heads):
    scores = jnp.zeros((*batch.tokens.shape, HEADS)).at[rows, columns, :2].set(heads.reshape(2, 2))
    values, _ = term(ModelOutputs(scores=scores), batch)
    return jnp.sum(loss_weights(batch, "sequence_mean") * values)
  end = scipy.optimize.minimize(lambda x: [np.float64(v) for v in loss(jnp.float32(x))], np.zeros(4),
                                jac=True, method="BFGS", options=dict(gtol=1e-5))
  r, c = end.x.reshape(2, 2).T
  first = trajectories[0].columns["preference"]
  a, b = prior + first / weight, prior + (1 - first) / weight
  np.testing.assert_allclose(0.01 + np.logaddexp(0, c).sum(), a + b, rtol=5e-3)
  np.testing.assert_allclose(r[0] - r[1], np.log(a / b), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("term, arguments, message", [
    (bradley_terry, dict(head=4), "use 0 to 3"), (bradley_terry, dict(head=-1), "head=-1"),
    (bradley_terry, dict(margin="gapp"), "'gapp'"), (bradley_terry, dict(centre=-1), "centre=-1"),
    (bradley_terry, dict(label_smoothing=0.5), "bradley_terry: label_smoothing"),
    (beta_preference, dict(weight=0), "weight=0"), (beta_preference, dict(prior=(1, 2)), "equal"),
    (plackett_luce, dict(rank="place"), "'place'"), (ordinal, dict(levels=1), "at least 2"),
    (ordinal, dict(levels=6), "use 0 to 3"), (regress_attributes, dict(labels="tone"), "must list")])
def test_impossible_arguments_are_refused(term, arguments, message):
  trajectories = answers(0)
  batch = pack(trajectories, row_length=40, together=True)
  with pytest.raises(ValueError, match=message):
    term(ModelOutputs(scores=jnp.zeros((*batch.tokens.shape, HEADS))), batch, **arguments)
