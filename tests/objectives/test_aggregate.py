"""Weights of tokens and the sum of terms: loops in float64, splits, padding, empty batches."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import compose, objectives
from jaxrl.batch import ModelOutputs, pack, unpack
from jaxrl.objectives.aggregate import AGGREGATIONS, loss_weights, mean_weights, sum_of_terms

quick = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)
EVERYTHING = [
    dict(name="clipped_surrogate", level="sequence", low=0.1, high=0.3),
    dict(name="kl", beta=0.1),
    dict(name="entropy", coefficient=0.01),
    dict(name="cross_entropy"),
]
SPLITS = [[8], [4, 4], [4, 2, 1, 1], [1, 2, 4, 1], [2, 2, 2, 2], [1] * 8]


def build(specs):
  return sum_of_terms([compose.build(spec, objectives) for spec in specs])


def toy_model(parameters, batch, outputs):
  """Log-probabilities and entropies that depend on shared parameters: {"token" [9], "position"}."""
  shift = parameters["token"][batch.tokens] * jnp.cos(parameters["position"] * batch.positions)
  return outputs.replace(logprobs=outputs.logprobs + shift,
                         entropy=outputs.entropy * jnp.exp(0.1 * shift))


def joined(tree):
  """All numbers of a tree in one array: sums that cancel have the error of what they add up."""
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


PARAMETERS = {"token": jnp.linspace(-0.2, 0.2, 9), "position": jnp.float32(0.3)}


@pytest.fixture(scope="module")
def step():
  """Jitted (loss, metrics), gradients of every term at once."""
  objective = build(EVERYTHING)

  def loss(parameters, batch, outputs, weights, means):
    return objective(toy_model(parameters, batch, outputs), batch, weights, means)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_equal_loops_over_sequences_and_tokens(packed, aggregation):
  @quick
  @given(seeds)
  def check(seed):
    batch, outputs = packed.batch(seed)
    weights = loss_weights(batch, aggregation, constant=24.0)
    total = np.sum(np.asarray(weights, np.float64) * outputs.logprobs)
    expected = packed.aggregate(batch, outputs.logprobs, aggregation, constant=24.0)
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-7)
    assert not np.asarray(weights)[~batch.loss_mask].any()

  check()


def test_metrics_are_means_over_loss_tokens_whatever_sequences_weigh(packed):
  batch, outputs = packed.batch(3)
  _, metrics = build([dict(name="cross_entropy"), dict(name="entropy", coefficient=0.5)])(
      outputs, batch, loss_weights(batch, "sequence_sum"), mean_weights(batch))
  np.testing.assert_allclose(metrics["nll"], -outputs.logprobs[batch.loss_mask].mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["entropy"], outputs.entropy[batch.loss_mask].mean(), rtol=1e-5)
  expected = -packed.aggregate(batch, outputs.logprobs, "sequence_sum")
  np.testing.assert_allclose(metrics["loss/cross_entropy"], expected, rtol=1e-5)


def test_a_sequence_without_loss_tokens_counts_among_the_sequences(packed):
  batch, _ = packed.batch(0, lengths=[1, 0, 5], scored=1.0)
  weights = np.asarray(loss_weights(batch, "sequence_mean"))
  np.testing.assert_allclose(weights.sum(), batch.weights[2] / 3, rtol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_sequence_taken_out_after_packing_equals_one_never_scored(packed, aggregation):
  batch, _ = packed.batch(0, lengths=[5, 6, 7], scored=1.0)
  before = unpack(batch)
  before[1].scored = False
  never = pack(before, row_length=16, min_rows=8, min_sequences=8)
  taken = batch.replace(sequence_mask=batch.sequence_mask & (np.arange(8) != 1))
  np.testing.assert_array_equal(loss_weights(taken, aggregation, constant=9),
                                loss_weights(never, aggregation, constant=9))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(packed, step, aggregation):
  @quick
  @given(seeds, st.permutations(range(8)), st.sampled_from(SPLITS))
  def check(seed, order, sizes):
    batch, outputs = packed.batch(seed)
    inputs = (batch, outputs, loss_weights(batch, aggregation, constant=12), mean_weights(batch))
    whole = step(PARAMETERS, *inputs)
    order = np.array(order)
    parts = [step(PARAMETERS, *packed.rows_of(inputs, batch, order[end - size:end]))
             for size, end in zip(sizes, np.cumsum(sizes))]
    total = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *parts)
    for mine, theirs in zip(total, whole):  # loss with metrics, then the gradient as one vector
      packed.close(joined(mine), joined(theirs))

  check()


@pytest.mark.parametrize("packing", [
    dict(row_length=12), dict(min_rows=7), dict(rows_multiple=3),
    dict(row_length=13, rows_multiple=5, min_rows=6, min_sequences=32)])
def test_padding_never_changes_a_loss(packed, packing):
  objective = build(EVERYTHING)

  def loss(shift, batch, outputs):
    outputs = outputs.replace(logprobs=outputs.logprobs + shift)
    return objective(outputs, batch, loss_weights(batch, "sequence_mean"), mean_weights(batch))

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  lengths = [3, 12, 7, 1, 0, 9]
  before = step(0.1, *packed.batch(5, lengths=lengths))
  after = step(0.1, *packed.batch(5, lengths=lengths, **packing))
  jax.tree.map(packed.close, after, before)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_fully_masked_batch_gives_exactly_zero(packed, step, aggregation):
  for lengths, scored in [([5, 6, 7], 0.0), ([1, 1], 1.0), ([0], 1.0)]:
    batch, outputs = packed.batch(0, lengths=lengths, scored=scored)
    weights = loss_weights(batch, aggregation, constant=4)
    (loss, metrics), gradient = step(PARAMETERS, batch, outputs, weights, mean_weights(batch))
    for x in jax.tree.leaves((loss, metrics, gradient, weights)):
      assert np.all(np.asarray(x) == 0)


@pytest.mark.parametrize("aggregation, constant, message", [
    ("token_meen", None, "unknown aggregation 'token_meen'; did you mean 'token_mean'"),
    ("constant", None, "divides by constant=None: set it to a positive number"),
    ("constant", -3.0, "divides by constant=-3.0"),
])
def test_a_wrong_aggregation_is_refused(packed, aggregation, constant, message):
  with pytest.raises(ValueError, match=message):
    loss_weights(packed.batch(0)[0], aggregation, constant=constant)


def test_a_term_may_be_there_twice_and_two_may_report_the_same_metric(packed):
  batch, outputs = packed.batch(0)
  weights = loss_weights(batch, "token_mean")

  def also_kl(outputs, batch):
    return outputs.logprobs, {"kl": outputs.logprobs}

  specs = [dict(name="kl", beta=0.1), dict(name="kl", beta=0.2, estimator="k2")]
  terms = [compose.build(spec, objectives) for spec in specs]
  loss, metrics = sum_of_terms([*terms, also_kl])(outputs, batch, weights, weights)
  alone = [sum_of_terms([term])(outputs, batch, weights, weights) for term in (*terms, also_kl)]
  assert loss == pytest.approx(sum(float(value) for value, _ in alone))
  for label, key, (value, found), name in zip(
      ("kl", "kl_2", "also_kl"), ("kl", "kl_2/kl", "also_kl/kl"), alone, ("kl", "kl", "also_kl")):
    assert metrics[f"loss/{label}"] == value == found[f"loss/{name}"]
    assert metrics[key] == found["kl"]


def test_terms_that_cannot_be_added_are_refused(packed):
  batch, outputs = packed.batch(0)
  weights = loss_weights(batch, "token_mean")

  with pytest.raises(ValueError, match="lists no term"):
    sum_of_terms([])
  with pytest.raises(ValueError, match=r"config.objective\[0\] \(entropy\) needs 'entropy', which is neither among"):
    build([dict(name="entropy", coefficient=0.1)])(
        ModelOutputs(logprobs=outputs.logprobs), batch, weights, weights)
  with pytest.raises(ValueError, match=r"\(kl\) needs 'reference_logprobs'.*signals \(none\)"):
    build([dict(name="kl", beta=0.1)])(outputs, batch.replace(signals={}), weights, weights)
