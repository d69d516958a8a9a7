"""WildReward: the ordinal loss and its score, how users' words become ratings, and who rates."""

import itertools

from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from jaxrl import data
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.data import feedback
from jaxrl.models.decoder import Constant, Decoder, DecoderConfig
from jaxrl.objectives import ordinal
from jaxrl.objectives.aggregate import loss_weights
from jaxrl.objectives.reward_model import ordered_logits
from jaxrl.tasks import rated_addition
from jaxrl.training.reward_models import rating

CUTS = np.array([-1.5, -1.0, 2.0])  # uneven


def answers(labels):
  made = [Trajectory([1, 2], [False, True], group=i, columns={"label": float(x)})
          for i, x in enumerate(labels)]
  return pack(made, row_length=2)


def loss_of(batch, numbers, **arguments):
  """The mean loss over answers whose heads say so. [answers, heads]"""
  scores = jnp.zeros((*batch.tokens.shape, numbers.shape[1])).at[:len(numbers), 1].set(numbers)
  values, metrics = ordinal(ModelOutputs(scores=scores), batch, levels=4, **arguments)
  return jnp.sum(loss_weights(batch, "sequence_mean") * values), metrics


def by_definition(numbers, labels, ordered):
  z = np.array(numbers, np.float64)
  if ordered:
    cuts = np.cumsum(np.concatenate([z[:, 1:2], np.log1p(np.exp(z[:, 2:]))], 1), 1)
    z = z[:, :1] - cuts
  p = 1 / (1 + np.exp(-z))
  target = np.asarray(labels)[:, None] > np.arange(1, 4)
  return np.mean(-np.where(target, np.log(p), np.log(1 - p))), 1 + p.sum(1)


@pytest.mark.parametrize("ordered", [False, True])
def test_loss_gradient_and_score_are_the_papers(ordered):
  rng = np.random.default_rng(0)
  labels, numbers = rng.integers(1, 5, 40), rng.normal(size=(40, 3 + ordered))
  batch = answers(labels)
  expected, scores = by_definition(numbers, labels, ordered)
  (value, metrics), gradient = jax.value_and_grad(
      lambda x: loss_of(batch, x, ordered=ordered), has_aux=True)(jnp.array(numbers, jnp.float32))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  numeric = optimize.approx_fprime(
      numbers.reshape(-1), lambda x: by_definition(x.reshape(numbers.shape), labels, ordered)[0], 1e-7)
  np.testing.assert_allclose(gradient, numeric.reshape(numbers.shape), rtol=1e-3, atol=1e-6)
  np.testing.assert_allclose(np.asarray(metrics["rating_error"])[:40, 1], np.abs(scores - labels),
                             rtol=1e-5)
  found = [rating(row.astype(np.float32), 0, 4, ordered) for row in numbers]
  np.testing.assert_allclose(found, scores, rtol=1e-5)


def test_its_minimum_is_the_mean_label_with_calibrated_chances():
  """Check 1: labels of a latent utility with ordered cuts; sigma(z_k) = P(y > k) at the minimum."""
  rng = np.random.default_rng(1)
  utility = np.repeat(np.linspace(-2, 2, 5), 2000)
  labels = 1 + np.sum(utility[:, None] + rng.logistic(size=(10_000, 1)) > CUTS, 1)
  groups = utility.reshape(5, 2000), labels.reshape(5, 2000)
  counts = np.stack([(groups[1] > k).mean(1) for k in (1, 2, 3)], 1)
  z = np.log(counts / (1 - counts))
  batch = answers(labels[::10])
  at = lambda z: float(loss_of(batch, jnp.array(np.repeat(z, 200, 0), jnp.float32))[0])
  best = optimize.minimize(
      lambda x: by_definition(np.repeat(x.reshape(5, 3), 2000, 0), labels, False)[0], np.zeros(15)).x
  np.testing.assert_allclose(1 / (1 + np.exp(-best.reshape(5, 3))), counts, atol=2e-3)
  scores = [rating(row.astype(np.float32), 0, 4) for row in z]
  np.testing.assert_allclose(scores, groups[1].mean(1), atol=1e-5)
  np.testing.assert_allclose(counts, 1 / (1 + np.exp(CUTS - np.linspace(-2, 2, 5)[:, None])), atol=0.04)
  assert (np.diff(scores) > 0).all() and at(z) < at(z + 0.3) and at(z) < at(z - 0.3)


def test_ordered_thresholds_never_cross():
  numbers = np.random.default_rng(2).normal(0, 3, (50, 4)).astype(np.float32)
  cuts = [numbers[:, 0] - z for z in _logits(numbers)]
  assert all((b > a).all() for a, b in zip(cuts, cuts[1:]))


def _logits(numbers):
  return [np.asarray(z) for z in ordered_logits(list(numbers.T))]


def test_thresholds_are_the_same_for_all_answers_and_are_learned():
  config = DecoderConfig(vocab_size=9, layers=1, d_model=8, heads=2, kv_heads=2, d_ff=8,
                         heads_on_top=(("score", 1), ("thresholds", 3)))
  ids = jnp.arange(4)[None]
  shapes = meta.unbox(jax.eval_shape(Decoder(config).init, jax.random.key(0), ids, ids, ids))["params"]
  assert set(shapes["score_head"]) == {"bias", "kernel"} and set(shapes["thresholds_head"]) == {"bias"}
  hidden = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
  head = Constant(config, 3)
  params = meta.unbox(head.init(jax.random.key(0), hidden))
  params = jax.tree.map(lambda x: x + jnp.array([0.0, 1.0, 2.0]), params)
  np.testing.assert_array_equal(head.apply(params, hidden), np.broadcast_to([0.0, 1.0, 2.0], (2, 4, 3)))
  gradient = jax.grad(lambda p: head.apply(p, hidden).sum())(params)["params"]["bias"]
  np.testing.assert_array_equal(gradient, [8, 8, 8])


# -------------------------------------------------------------------------------------- transforms


def turn(conversation, question, label, answer="fine", **more):
  return dict(conversation=conversation, question=question, answer=answer, label=label, **more)


def test_hindsight_looks_two_turns_ahead_and_stops_at_another_topic():
  talk = [("a", "cats eat fish", 3), ("a", "cats eat", 3), ("a", "cats eat fish now", 5),
          ("b", "red car", 3), ("b", "blue moon tonight", 4),
          ("c", "red car", 3), ("c", "the red car", 2), ("c", "a red car", 4),
          ("d", "red car", 3), ("d", "red car", 3), ("d", "red car", 3), ("d", "red car", 4),
          ("e", "red car", 2), ("e", "red car", 5), ("f", "red car", 3), ("g", "red car", 5)]
  rows = [turn(*x) for x in talk]
  found, counts = feedback.with_hindsight(rows, feedback.shared_words)
  assert [r["label"] for r in found] == [5, 5, 5, 3, 4, 4, 2, 4, 3, 4, 4, 4, 2, 5, 3, 5]
  assert counts == {"positive": 5, "negative": 1}
  assert found[0]["provenance"] == ["hindsight"] and "provenance" not in found[3]
  assert rows[0] == turn(*talk[0])  # nothing is changed in place
  strict, _ = feedback.with_hindsight(rows, feedback.shared_words, threshold=0.95)
  assert [r["label"] for r in strict][:3] == [3, 3, 5]
  near, _ = feedback.with_hindsight(rows, feedback.shared_words, ahead=1)
  assert [r["label"] for r in near][:3] == [3, 5, 5]


def test_shared_words_is_the_cosine_of_counts():
  a, b = "Red red car", "red, moon!"
  counts = np.array([[2, 1, 0], [1, 0, 1]], float)
  expected = counts[0] @ counts[1] / np.linalg.norm(counts, axis=1).prod()
  assert feedback.shared_words(a, b) == pytest.approx(expected)
  assert feedback.shared_words("", b) == 0 and feedback.shared_words(a, a) == pytest.approx(1)


def test_refusals_are_judged_by_the_question():
  asked = []

  def judge(row):
    asked.append(row["question"])
    return {"bomb": "harmful", "cake": "harmless"}.get(row["question"], "no refusal")
  rows = [turn("a", "bomb", 1, "I'm sorry, but I can't do that."), turn("a", "cake", 5, "As an AI I cannot."),
          turn("a", "sums", 2, "I can't say it better: 4."), turn("a", "tale", 4, "Once upon a time."),
          turn("a", "bomb", 1, "I cannot. " + "x" * 300)]
  found = feedback.with_checked_refusals(rows, judge)
  assert [r["label"] for r in found] == [5, 1, 2, 4, 1] and asked == ["bomb", "cake", "sums"]
  assert found[0]["provenance"] == ["harmful refused"]
  with pytest.raises(ValueError, match="'maybe'"):
    feedback.with_checked_refusals(rows, lambda row: "maybe")


def test_ratings_leave_neutral_turns_out():
  rows = feedback.ratings_of([turn("a", "q", x) for x in (1, 2, 3, 4, 5)])
  assert [r["label"] for r in rows] == [1, 2, 3, 4]
  with pytest.raises(ValueError, match="label 7"):
    feedback.ratings_of([turn("a", "q", 7)])


class Source(list):
  def where(self, index):
    return f"chat:{index + 1}"


def judged(row):
  return row.get("mood")


def checked(row):
  return "harmful" if "bomb" in row["question"] else "no refusal"


def test_the_whole_pipeline_keeps_places_and_says_what_it_did():
  source = Source([
      dict(dialogue="1", question="red car", answer="fast", mood=None),
      dict(dialogue="1", question="red car", answer="faster", mood=5),
      dict(dialogue="2", question="a bomb", answer="I cannot.", mood=1),
      dict(dialogue="3", question="sums", answer="4", mood=3)])
  here = "tests.methods.test_wildreward"
  made = feedback.rated_turns(source, judge=f"{here}:judged", refusals=f"{here}:checked",
                              conversation="dialogue")
  assert [r["label"] for r in made] == [4, 4, 4] and len(made) == 3
  assert [made.where(i) for i in range(3)] == ["chat:1", "chat:2", "chat:3"]
  assert [r["provenance"] for r in made] == [["unclear", "hindsight", "rated"], ["judged", "rated"],
                                             ["judged", "harmful refused", "rated"]]
  assert made.counts["turns"] == 4 and made.counts["neutral"] == 1
  with pytest.raises(data.BadRow, match="chat:1.*'label'"):
    feedback.rated_turns(source, conversation="dialogue")


# ------------------------------------------------------------------------------------------- users


def test_more_users_tell_more_than_one():
  """Check 2 without a model: pairs of answers that mean ratings tell apart, of one user or of many."""
  rng = np.random.default_rng(3)
  told = {1: [], 64: []}
  for users in told:
    for trial in range(40):
      means = [np.mean([rated_addition.rating(rng, errors, int(rng.integers(users)) + 1000 * trial, 3.0, 0.3)
                        for _ in range(64)]) for errors in (0, 1, 2, 3)]
      told[users].append(np.mean([a > b + 0.05 for a, b in itertools.combinations(means, 2)]))
  assert np.mean(told[64]) > 0.9 > 0.8 > np.mean(told[1])  # who is too strict or too mild tells nothing


def test_ratings_fall_with_errors_by_the_cuts():
  rng = np.random.default_rng(4)
  plain = [[rated_addition.rating(rng, errors, 0, 0.0, 1e-9) for _ in range(3)] for errors in range(4)]
  assert plain == [[4] * 3, [3] * 3, [2] * 3, [1] * 3]
  above = np.mean([rated_addition.rating(rng, 1, 0, 0.0, 0.5) > 2 for _ in range(4000)])
  assert above == pytest.approx(1 / (1 + np.exp(-(-1 + 1.4) / 0.5)), abs=0.03)
  for errors in range(4):
    text = rated_addition.with_errors(rng, "9753", errors)
    assert sum(a != b for a, b in zip(text, "9753")) == errors and len(text) == 4
