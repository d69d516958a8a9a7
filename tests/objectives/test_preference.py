"""Preference losses against float64 NumPy from the equations, on ragged packed pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxrl import batch as batches
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.data import CharacterTokenizer
from jaxrl.data.parts import with_critique
from jaxrl.objectives import cpo, dpo, imitate_preferred, orpo, simpo
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms

log_s, s = scipy.special.log_expit, scipy.special.expit
LABELS = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.8, 0.2)]  # the last two: a tie, and a soft label


def pairs(seed, labels=LABELS, **columns):
  """Pairs of 1 to 9 loss tokens, behind prompts of other lengths, in a shuffled order."""
  rng = np.random.default_rng(seed)
  found = []
  for group, both in enumerate(labels):
    head = int(rng.integers(1, 6))
    for label in both:
      n = int(rng.integers(1, 10))
      found.append(Trajectory(
          rng.integers(0, 9, head + n), np.arange(head + n) >= head, group=7 * group,
          columns={"preference": label, **{k: v[group] for k, v in columns.items()}},
          signals={"reference_logprobs": rng.uniform(-2, 0, head + n)}))
  return [found[i] for i in rng.permutation(len(found))]


def reference_loss(trajectories, logprobs, loss):
  """Mean over pairs of `sum of preference(y) * loss(y, y')`; sequences are (pi, ref) per token."""
  groups = {}
  for t, own in zip(trajectories, logprobs):
    mask = t.loss_mask
    groups.setdefault(t.group, []).append(
        (t.columns, np.asarray(own, np.float64)[mask],
         np.asarray(t.signals["reference_logprobs"], np.float64)[mask]))
  total = 0.0
  for (ca, *a), (cb, *b) in groups.values():
    total += ca["preference"] * loss(a, b, ca) + cb["preference"] * loss(b, a, cb)
  return total / len(groups)


def rho(y):
  return y[0].sum() - y[1].sum()


def mean_rho(y):
  return y[0].mean() - y[1].mean()


def of_h(function, beta=0.1, g=lambda x: x, ratio=rho):
  return lambda a, b, _: function(beta * (g(ratio(a)) - g(ratio(b))))


def of_both(function, beta):
  return lambda a, b, _: function(beta * rho(a), beta * rho(b))


def desensitised(a, b, _):
  n = min(len(a[0]), len(b[0]))

  def cut(y):
    weights = np.where(np.arange(len(y[0])) < n, 1.0, 0.3)
    return (weights * (y[0] - y[1])).sum()
  return -log_s(0.7 * (cut(a) - cut(b)))


def odds(y):
  p = np.exp(y[0].mean())
  return np.log(p / (1 - p))


def kl_of_labels(x, e):  # EXO: KL from the model's preferences to the smoothed ones
  return s(x) * np.log(s(x) / (1 - e)) + s(-x) * np.log(s(-x) / e)


B = 0.4
CASES = {
    "sigmoid": (functools.partial(dpo, beta=B), of_h(lambda x: -log_s(x), B)),
    "smoothed": (functools.partial(dpo, beta=B, label_smoothing=0.2),
                 of_h(lambda x: -0.8 * log_s(x) - 0.2 * log_s(-x), B)),
    "robust": (functools.partial(dpo, loss="robust", beta=B, label_smoothing=0.2),
               of_h(lambda x: (-0.8 * log_s(x) + 0.2 * log_s(-x)) / 0.6, B)),
    "hinge": (functools.partial(dpo, loss="hinge", beta=B), of_h(lambda x: max(0, 1 - x), B)),
    "ipo": (functools.partial(dpo, loss="ipo", beta=B, normalise=True),
            of_h(lambda x: (x / B - 1 / (2 * B)) ** 2, B, ratio=mean_rho)),
    "exo": (functools.partial(dpo, loss="exo", beta=B, label_smoothing=1e-3),
            of_h(lambda x: kl_of_labels(x, 1e-3), B)),
    "discopop": (functools.partial(dpo, loss="discopop", beta=B, tau=0.3),
                 of_h(lambda x: (1 - s(x / 0.3)) * -log_s(x) + s(x / 0.3) * np.exp(-x), B)),
    "nca": (functools.partial(dpo, loss="nca", beta=B),
            of_both(lambda x, y: -log_s(x) - 0.5 * log_s(-x) - 0.5 * log_s(-y), B)),
    "sppo_hard": (functools.partial(dpo, loss="sppo_hard", beta=B),
                  of_both(lambda x, y: (x / B - 0.5 / B) ** 2 + (y / B + 0.5 / B) ** 2, B)),
    "bco_pair": (functools.partial(dpo, loss="bco_pair", beta=B),
                 of_both(lambda x, y: -log_s(x) - log_s(-y), B)),
    "apo_zero": (functools.partial(dpo, loss="apo_zero", beta=B),
                 of_both(lambda x, y: 1 - s(x) + s(y), B)),
    "apo_down": (functools.partial(dpo, loss="apo_down", beta=B),
                 of_both(lambda x, y: s(x) + 1 - s(x - y), B)),
    "normalised": (functools.partial(dpo, beta=B, normalise=True),
                   of_h(lambda x: -log_s(x), B, ratio=mean_rho)),
    "forward_kl": (functools.partial(dpo, beta=B, divergence="forward_kl"),
                   of_h(lambda x: -log_s(x), B, g=lambda x: -np.exp(-x))),
    "js": (functools.partial(dpo, beta=B, divergence="js"),
           of_h(lambda x: -log_s(x), B, g=lambda x: np.log(2 * np.exp(x) / (1 + np.exp(x))))),
    "alpha": (functools.partial(dpo, beta=B, divergence="alpha", alpha=0.3),
              of_h(lambda x: -log_s(x), B, g=lambda x: (1 - np.exp(-0.3 * x)) / 0.3)),
    "length": (functools.partial(dpo, beta=0.7, tail_weight=0.3), desensitised),
    "margin": (functools.partial(dpo, beta=B, margin="gap"),
               lambda a, b, c: -log_s(B * (rho(a) - rho(b)) - c["gap"])),
    "cpo": (functools.partial(cpo, beta=B, label_smoothing=0.1),
            lambda a, b, _: (lambda x: -0.9 * log_s(x) - 0.1 * log_s(-x))(
                B * (a[0].sum() - b[0].sum()))),
    "simpo": (functools.partial(simpo, beta=2.0, gamma=0.7),
              lambda a, b, _: -log_s(2 * (a[0].mean() - b[0].mean()) - 0.7)),
    "orpo": (functools.partial(orpo, beta=0.3),
             lambda a, b, _: -0.3 * log_s(odds(a) - odds(b))),
    "imitate_preferred": (functools.partial(imitate_preferred, coefficient=0.4),
                          lambda a, b, _: -0.4 * a[0].mean()),
}


def value_and_gradient(term, batch, logprobs, weights=None, means=None):
  weights = loss_weights(batch, "sequence_mean") if weights is None else weights
  means = mean_weights(batch, by_sequence=True) if means is None else means

  def loss(x):
    return sum_of_terms([term])(ModelOutputs(logprobs=x), batch, weights, means)
  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logprobs))
  return value, metrics, gradient


def drawn(seed, batch, trajectories):
  """Log-probabilities in the batch's places, and of every trajectory. NaN where nothing may read."""
  rng = np.random.default_rng(seed)
  own = [rng.uniform(-2, -0.01, len(t.tokens)) for t in trajectories]
  packed = np.full(batch.tokens.shape, np.nan, np.float32)
  for item, values in enumerate(own):
    packed[batch.sequence_ids == item] = values
  return np.where(batch.loss_mask, packed, np.nan).astype(np.float32), own


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_equal_the_equation(name, seed):
  term, equation = CASES[name]
  trajectories = pairs(seed, gap=[0.3, -0.2, 0.0, 1.0])
  batch = pack(trajectories, row_length=32, together=True)
  logprobs, own = drawn(seed, batch, trajectories)
  value, _, gradient = value_and_gradient(term, batch, logprobs)
  np.testing.assert_allclose(value, reference_loss(trajectories, own, equation), rtol=1e-5)

  for item, t in enumerate(trajectories):
    in_batch = np.asarray(gradient)[batch.sequence_ids == item]
    assert not in_batch[~t.loss_mask].any()
    for place in np.flatnonzero(t.loss_mask):
      def moved(step):
        shifted = [x.copy() for x in own]
        shifted[item][place] += step
        return reference_loss(trajectories, shifted, equation)
      expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
      np.testing.assert_allclose(in_batch[place], expected, rtol=2e-5, atol=2e-7)
  assert not np.asarray(gradient)[batch.segment_ids == 0].any()


@pytest.mark.parametrize("name", CASES)
def test_rows_add_up_to_the_batch(name):
  term, _ = CASES[name]
  trajectories = pairs(3, LABELS * 3, gap=[0.1] * 12)
  batch = pack(trajectories, row_length=32, together=True)
  assert batch.tokens.shape[0] >= 4
  logprobs, _ = drawn(3, batch, trajectories)
  weights, means = loss_weights(batch, "sequence_mean"), mean_weights(batch, by_sequence=True)
  value, metrics, gradient = value_and_gradient(term, batch, logprobs)
  parts = []
  for row in range(batch.tokens.shape[0]):
    at = slice(row, row + 1)
    rows = batch.replace(**{k: jax.tree.map(lambda x: x[at], getattr(batch, k))
                            for k in batches.PER_TOKEN})
    parts.append(value_and_gradient(term, rows, logprobs[at], weights[at], means[at]))
  np.testing.assert_allclose(sum(p[0] for p in parts), value, rtol=1e-6)
  np.testing.assert_allclose(np.concatenate([p[2] for p in parts]), gradient, rtol=1e-6)
  for key in metrics:
    np.testing.assert_allclose(sum(p[1][key] for p in parts), metrics[key], rtol=1e-5, atol=1e-6)


def test_metrics_are_means_over_pairs():
  trajectories = pairs(4)
  batch = pack(trajectories, row_length=32, together=True)
  logprobs, own = drawn(4, batch, trajectories)
  _, metrics, _ = value_and_gradient(functools.partial(dpo, beta=B), batch, logprobs)
  expected = {
      "preference_accuracy": lambda a, b, _: float(rho(a) > rho(b)),
      "preference_margin": lambda a, b, _: B * (rho(a) - rho(b)),
      "chosen_reward": lambda a, b, _: B * rho(a),
      "rejected_reward": lambda a, b, _: B * rho(b)}
  for name, equation in expected.items():
    np.testing.assert_allclose(metrics[name], reference_loss(trajectories, own, equation),
                               rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("spoil", ["unscored", "alone", "three"])
def test_a_group_that_is_no_pair_has_no_loss(spoil):
  trajectories = pairs(5)
  whole = [t for t in trajectories if t.group != 7]
  odd = [t for t in trajectories if t.group == 7]
  if spoil == "unscored":
    odd[0].scored = False
  elif spoil == "alone":
    odd = odd[:1]
  else:
    odd = [*odd, odd[0]]
  batch = pack([*whole, *odd], row_length=32, together=True)
  logprobs, _ = drawn(5, batch, [*whole, *odd])
  _, _, gradient = value_and_gradient(dpo, batch, logprobs)
  mine = np.isin(batch.sequence_ids, range(len(whole), len(whole) + len(odd)))
  assert not np.asarray(gradient)[mine].any()
  assert np.asarray(gradient)[batch.loss_mask & ~mine].all()


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("name", CASES)
def test_extreme_log_probabilities_stay_finite(name, scale):
  term, _ = CASES[name]
  trajectories = pairs(6, gap=[0.0] * 4)
  batch = pack(trajectories, row_length=32, together=True)
  logprobs, _ = drawn(6, batch, trajectories)
  for values in (logprobs * scale, logprobs * 0, -logprobs * 0 - scale):
    value, _, gradient = value_and_gradient(term, batch, values)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("arguments, message", [
    (dict(loss="sigmoyd"), "did you mean 'sigmoid'"),
    (dict(divergence="kl"), "divergence='kl'"),
    (dict(beta=0.0), "above 0"),
    (dict(tau=0.0), "dpo: tau"),
    (dict(label_smoothing=0.5), "below 0.5"),
    (dict(loss="hinge", label_smoothing=0.1), "takes no label_smoothing"),
    (dict(loss="exo"), "1e-3"),
    (dict(loss="nca", margin="gap"), "neither a divergence"),
    (dict(margin="gapp"), "reads the column 'gapp'")])
def test_impossible_arguments_are_refused(arguments, message):
  trajectories = pairs(0, gap=[0.0] * 4)
  batch = pack(trajectories, row_length=32, together=True)
  with pytest.raises(ValueError, match=message):
    dpo(ModelOutputs(logprobs=jnp.zeros(batch.tokens.shape)), batch, **arguments)


@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_in_one_row(seed):
  trajectories = pairs(seed, LABELS * 5)
  batch = pack(trajectories, row_length=16, together=True, rows_multiple=2)
  for group in set(batch.group_ids[batch.group_ids >= 0]):
    members = np.flatnonzero(batch.group_ids == group)
    rows = np.nonzero(np.isin(batch.sequence_ids, members))[0]
    assert len(set(rows)) == 1
  for t, back in zip(trajectories, batches.unpack(batch)):
    np.testing.assert_array_equal(t.tokens, back.tokens)
  assert batches.PREFERENCE in batch.columns


def test_a_long_group_raises_the_row_length():
  trajectories = pairs(0)
  longest = max(sum(len(t.tokens) for t in trajectories if t.group == g) for g in (0, 7, 14, 21))
  batch = pack(trajectories, row_length=longest - 1, together=True)
  assert batch.tokens.shape[1] == batches.bucket(longest)


def test_pairs_that_the_policy_would_write_count_more():
  trajectories = pairs(9)
  batch = pack(trajectories, row_length=32, together=True)
  logprobs, own = drawn(9, batch, trajectories)
  collision = np.random.default_rng(9).uniform(0.1, 0.9, batch.tokens.shape).astype(np.float32)
  weights = []
  for item, (t, x) in enumerate(zip(trajectories, own)):
    at = (batch.sequence_ids == item) & batch.loss_mask
    weights.append(np.exp((x[t.loss_mask] - np.log(np.float64(collision[at]))).mean()))
  weight_of_group = {g: np.prod([w for w, t in zip(weights, trajectories) if t.group == g])
                     for g in (0, 7, 14, 21)}
  groups = iter(dict.fromkeys(t.group for t in trajectories))
  expected = {g: None for g in weight_of_group}
  for g in groups:
    mine = [i for i, t in enumerate(trajectories) if t.group == g]
    expected[g] = weight_of_group[g] * reference_loss(
        [trajectories[i] for i in mine], [own[i] for i in mine], of_h(lambda x: -log_s(x), B))

  def loss(x, collision):
    outputs = ModelOutputs(logprobs=x, distribution={"collision": collision})
    term = functools.partial(dpo, beta=B, weigh_by_policy=True)
    return sum_of_terms([term])(outputs, batch, loss_weights(batch, "sequence_mean"),
                                mean_weights(batch, by_sequence=True))[0]
  value, gradients = jax.value_and_grad(loss, (0, 1))(jnp.asarray(logprobs), jnp.asarray(collision))
  np.testing.assert_allclose(value, np.mean(list(expected.values())), rtol=1e-5)
  assert not np.asarray(gradients[1]).any()


@pytest.mark.parametrize("name", CASES)
def test_critiques_behind_answers_are_no_part_of_them(name):
  """With a critique behind some answers, value and gradient are those of the answers alone."""
  term, _ = CASES[name]
  made = pairs(5, gap=[0.3, -0.2, 0.1, 0.0])
  longer = [with_critique(t, "abc"[:i % 4], CharacterTokenizer()) for i, t in enumerate(made)]
  batches_ = [pack(some, row_length=64, together=True) for some in (made, longer)]
  own = [np.random.default_rng(i).uniform(-2, -0.01, len(t.tokens)) for i, t in enumerate(made)]
  found = []
  for batch, some in zip(batches_, (made, longer)):
    logprobs = np.full(batch.tokens.shape, np.nan, np.float32)
    for item, values in enumerate(own):
      at = np.argwhere(batch.sequence_ids == item)[:len(values)]
      logprobs[tuple(at.T)] = values
    value, metrics, gradient = value_and_gradient(term, batch, np.where(batch.loss_mask, logprobs, np.nan))
    answers = np.asarray(batch.loss_mask & (batch.tag_ids != batches.CRITIQUE))
    found.append((value, metrics, [np.asarray(gradient)[(np.asarray(batch.sequence_ids) == i) & answers]
                                   for i in range(len(made))]))
  (value, metrics, gradient), (other, others, same) = found
  assert value == pytest.approx(float(other), rel=1e-5)
  for key in metrics:
    assert metrics[key] == pytest.approx(float(others[key]), rel=1e-5, abs=1e-6), key
  for a, b in zip(gradient, same):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
