"""Losses with labels of answers, steps and critiques against float64 NumPy, on ragged packed answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxrl.batch import CRITIQUE, ModelOutputs, Trajectory, pack
from jaxrl.objectives import binary_label, bradley_terry, critique_likelihood, label_steps
from jaxrl.objectives import reward_model
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms

log_s = scipy.special.log_expit


def answers(seed, count=7, critiques=True):
  """Pairs, and one answer that is alone, with steps and, behind some, critiques."""
  rng = np.random.default_rng(seed)
  found = []
  for item in range(count):
    head, n = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    about = int(rng.integers(1, 5)) * (critiques and item % 3 > 0)
    tags = np.array([0] * (head + n) + [CRITIQUE] * about)
    found.append(Trajectory(
        rng.integers(0, 9, len(tags)), np.arange(len(tags)) >= head, group=item // 2, tag_ids=tags,
        columns={"preference": [0.9, 0.1][item % 2], "good": float(rng.integers(2))},
        signals={"step_labels": rng.choice([0.0, 1.0, 0.3], len(tags))}))
  return [found[i] for i in rng.permutation(count)]


def value_and_gradient(term, batch, aggregation="sequence_mean", **outputs):
  weights = loss_weights(batch, aggregation)
  means = mean_weights(batch, by_sequence=aggregation == "sequence_mean")

  def loss(outputs):
    return sum_of_terms([term])(ModelOutputs(**outputs), batch, weights, means)
  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
      {k: jnp.asarray(v, jnp.float32) for k, v in outputs.items()})
  return float(value), metrics, gradient


def places(batch, item):
  """Loss tokens of the answer, and of the critique behind it."""
  of = (batch.sequence_ids == item) & batch.loss_mask
  return np.argwhere(of & (batch.tag_ids != CRITIQUE)), np.argwhere(of & (batch.tag_ids == CRITIQUE))


def check(term, expected, batch, aggregation="sequence_mean", **outputs):
  """Value, and gradient by finite differences of the float64 loss."""
  value, metrics, gradient = value_and_gradient(term, batch, aggregation, **outputs)
  outputs = {k: np.float64(v) for k, v in outputs.items()}
  np.testing.assert_allclose(value, expected(**outputs), rtol=2e-6)
  for name, array in outputs.items():
    for index in np.ndindex(array.shape):
      if not np.isnan(array[index]):
        ends = []
        for step in (1e-5, -1e-5):
          moved = array.copy()
          moved[index] += step
          ends.append(expected(**{**outputs, name: moved}))
        np.testing.assert_allclose(gradient[name][index], (ends[0] - ends[1]) / 2e-5, rtol=5e-5, atol=1e-7)
      else:
        assert not gradient[name][index].any()
  return metrics


def at_ends(batch, rng, heads=2):
  """Scores that are NaN wherever nothing may read them: all but the last token of every answer."""
  scores = np.full((*batch.tokens.shape, heads), np.nan, np.float32)
  for item in range(int((batch.group_ids >= 0).sum())):
    scores[tuple(places(batch, item)[0][-1])] = rng.normal(size=heads)
  return scores


@pytest.mark.parametrize("label", ["preference", "good"])
def test_labels_cost_their_cross_entropy_where_the_answer_ends(label):
  trajectories = answers(0)
  batch = pack(trajectories, row_length=32, together=True)
  scores = at_ends(batch, np.random.default_rng(1))

  def expected(scores):
    total = 0.0
    for item, t in enumerate(trajectories):
      r, y = scores[tuple(places(batch, item)[0][-1])][1], t.columns[label]
      total -= y * log_s(r) + (1 - y) * log_s(-r)
    return total / len(trajectories)
  metrics = check(functools.partial(binary_label, label=label, head=1), expected, batch, scores=scores)
  right = [(scores[tuple(places(batch, i)[0][-1])][1] > 0) == (t.columns[label] > 0.5)
           for i, t in enumerate(trajectories)]
  np.testing.assert_allclose(metrics["label_accuracy"], np.mean(right), rtol=1e-6)


def test_two_logits_are_a_softmax_over_two_tokens_and_the_full_loss_one_over_all():
  """Logits of a vocabulary of 5, of which 3 says yes and 1 no."""
  trajectories, rng = answers(2), np.random.default_rng(2)
  batch = pack(trajectories, row_length=32, together=True)
  logits = rng.normal(size=(*batch.tokens.shape, 5))
  logp = scipy.special.log_softmax(logits, axis=-1)
  scores = (logits[..., 3] - logits[..., 1])[..., None]

  def expected(log_yes, log_no):
    total = 0.0
    for item, t in enumerate(trajectories):
      at, y = tuple(places(batch, item)[0][-1]), t.columns["good"]
      total -= y * log_yes[at] + (1 - y) * log_no[at]
    return total / len(trajectories)
  two = scipy.special.log_softmax(logits[..., [3, 1]], axis=-1)
  value, _, _ = value_and_gradient(functools.partial(binary_label, label="good"), batch, scores=scores)
  np.testing.assert_allclose(value, expected(two[..., 0], two[..., 1]), rtol=2e-6)
  full = functools.partial(binary_label, label="good", full=True)
  value, _, _ = value_and_gradient(full, batch, scores=scores, yes_logprobs=logp[..., 3])
  np.testing.assert_allclose(value, expected(logp[..., 3], logp[..., 1]), rtol=2e-6)

  # The gradient of the full loss with respect to all logits is p minus the one-hot label.
  def of_logits(z):
    logp = jax.nn.log_softmax(z)
    outputs = ModelOutputs(scores=(z[..., 3] - z[..., 1])[..., None], yes_logprobs=logp[..., 3])
    return jnp.sum(loss_weights(batch, "sequence_mean") * full(outputs, batch)[0])
  gradient = np.asarray(jax.grad(of_logits)(jnp.float32(logits)))
  for item, t in enumerate(trajectories):
    at = tuple(places(batch, item)[0][-1])
    onehot = np.eye(5)[3 if t.columns["good"] else 1]
    np.testing.assert_allclose(gradient[at] * len(trajectories), np.exp(logp[at]) - onehot, atol=2e-6)


def test_the_zero_of_a_label_means_something_and_that_of_a_pair_does_not():
  """An offset of all scores of a prompt leaves Bradley-Terry as it is, and not the labels."""
  trajectories = answers(3, count=8)
  batch = pack(trajectories, row_length=32, together=True)
  scores = np.nan_to_num(at_ends(batch, np.random.default_rng(3), heads=1))
  offsets = 3 * np.random.default_rng(4).normal(size=8)
  moved = scores + np.where(batch.sequence_ids >= 0, offsets[batch.group_ids[batch.sequence_ids]], 0)[..., None]
  of = lambda term, x: value_and_gradient(term, batch, scores=x)[0]
  np.testing.assert_allclose(of(bradley_terry, moved), of(bradley_terry, scores), rtol=1e-5)
  assert abs(of(binary_label, moved) - of(binary_label, scores)) > 0.05


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_steps_cost_their_cross_entropy(aggregation):
  trajectories, rng = answers(5, critiques=False), np.random.default_rng(5)
  for t in trajectories:
    t.loss_mask &= rng.random(len(t.tokens)) < 0.6
  trajectories[2].loss_mask[:] = False
  batch = pack(trajectories, row_length=32)
  scores = np.where(batch.loss_mask[..., None], rng.normal(size=(*batch.tokens.shape, 2)), np.nan)

  def expected(scores):
    each = []
    for item in range(len(trajectories)):
      at = tuple(places(batch, item)[0].T)
      z, y = scores[at][:, 1], batch.signals["step_labels"][at]
      each.append(-(y * log_s(z) + (1 - y) * log_s(-z)))
    if aggregation == "token_mean":
      return np.mean(np.concatenate(each))
    return sum(x.mean() for x in each if len(x)) / len(each)
  term = functools.partial(label_steps, head=1)
  metrics = check(term, expected, batch, aggregation, scores=scores)
  if aggregation == "token_mean":
    y, z = batch.signals["step_labels"][batch.loss_mask], scores[batch.loss_mask][:, 1]
    np.testing.assert_allclose(metrics["step_accuracy"], np.mean((z > 0) == (y > 0.5)), rtol=1e-6)


def test_critiques_count_by_answer_whatever_their_lengths():
  trajectories, rng = answers(6), np.random.default_rng(6)
  batch = pack(trajectories, row_length=32, together=True)
  critique = batch.loss_mask & (batch.tag_ids == CRITIQUE)
  logprobs = np.where(critique, -rng.exponential(1.0, batch.tokens.shape), np.nan)

  def expected(logprobs):
    means = [-logprobs[tuple(at.T)].mean() for at in
             (places(batch, item)[1] for item in range(len(trajectories))) if len(at)]
    assert 0 < len(means) < len(trajectories)
    return 0.3 * sum(means) / len(trajectories)
  metrics = check(functools.partial(critique_likelihood, coefficient=0.3), expected, batch, logprobs=logprobs)
  np.testing.assert_allclose(0.3 * metrics["critique_nll"], expected(logprobs), rtol=1e-5)


def test_a_score_is_read_before_the_critique():
  trajectories = answers(7)
  batch = pack(trajectories, row_length=32, together=True)
  scores = at_ends(batch, np.random.default_rng(7))
  found = reward_model.sequence_scores(ModelOutputs(scores=jnp.asarray(scores)), batch, 1)
  for item in range(len(trajectories)):
    assert found[item] == scores[tuple(places(batch, item)[0][-1])][1]


@pytest.mark.parametrize("term, arguments, message", [
    (binary_label, dict(label="gud"), "'gud'"), (binary_label, dict(head=2), "use 0 to 1"),
    (binary_label, dict(head=0, full=True), "use head=1"), (label_steps, dict(head=-1), "head=-1")])
def test_impossible_arguments_are_refused(term, arguments, message):
  batch = pack(answers(0), row_length=32, together=True)
  with pytest.raises(ValueError, match=message):
    term(ModelOutputs(scores=jnp.zeros((*batch.tokens.shape, 2))), batch, **arguments)
