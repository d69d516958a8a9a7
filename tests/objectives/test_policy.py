"""Policy terms: float64 loops and finite differences, identities, hostile ratios."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.batch import ModelOutputs, Trajectory, pack, to_tokens
from jaxrl.objectives import clipped_surrogate, reinforce
from jaxrl.objectives.aggregate import AGGREGATIONS, loss_weights, mean_weights, sum_of_terms

SURROGATES = {
    "token": dict(low=0.2, high=0.3),
    "sequence": dict(level="sequence", low=0.03, high=0.06),
    "dual": dict(low=0.1, high=0.2, dual_clip=1.4),
    "dual_sequence": dict(level="sequence", low=0.03, high=0.06, dual_clip=1.1),
}


def surrogate_reference(batch, logprobs, sequences, *, low, high, level="token", dual_clip=None):
  """The clipped surrogate from its equation: (losses, distance to the nearest kink)."""
  losses, kink = np.zeros(logprobs.shape), np.inf
  for _, rows, columns in sequences(batch):
    at = (rows, columns)
    difference = logprobs[at] - np.asarray(batch.behaviour_logprobs[at], np.float64)
    if level == "sequence" and len(rows):
      difference = np.full_like(difference, difference.mean())
    ratio = np.exp(difference)
    advantage = np.asarray(batch.signals["advantages"][at], np.float64)
    gain = np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
    if dual_clip is not None:
      gain = np.where(advantage < 0, np.maximum(gain, dual_clip * advantage), gain)
    losses[at] = -gain
    for bound in (1 - low, 1 + high, dual_clip or 1 + high):
      kink = min(kink, np.min(np.abs(ratio - bound), initial=np.inf))
  return losses, kink


@functools.lru_cache(maxsize=None)
def step(term, aggregation="token_mean"):
  """Jitted ((loss, metrics), gradient in the outputs)."""
  objective = sum_of_terms([term])

  def loss(outputs, batch):
    return objective(outputs, batch, loss_weights(batch, aggregation, constant=10),
                     mean_weights(batch))

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", SURROGATES)
def test_surrogate_and_its_gradient_equal_the_equation(packed, name, aggregation):
  settings, checked = SURROGATES[name], 0
  run = step(functools.partial(clipped_surrogate, **settings), aggregation)
  for seed in range(8):
    batch, outputs = packed.batch(seed)
    logprobs = np.asarray(outputs.logprobs, np.float64)

    def loss(logprobs):
      losses, _ = surrogate_reference(batch, logprobs, packed.sequences, **settings)
      return packed.aggregate(batch, losses, aggregation, constant=10)

    if surrogate_reference(batch, logprobs, packed.sequences, **settings)[1] < 1e-4:
      continue  # a finite difference would straddle the kink
    (value, _), gradient = run(outputs, batch)
    packed.close(value, loss(logprobs))
    packed.close(gradient.logprobs, packed.finite_differences(loss, logprobs, batch.loss_mask))
    checked += 1
  assert checked >= 4


def test_gspo_token_keeps_the_ratio_of_the_sequence_and_the_gradient_of_the_token(packed):
  low, high = 0.03, 0.06
  run = step(functools.partial(clipped_surrogate, level="sequence_token", low=low, high=high))
  cut = kept = 0
  for seed in range(6):
    batch, outputs = packed.batch(seed)  # advantages differ within a sequence
    (value, metrics), gradient = run(outputs, batch)
    weights = np.asarray(loss_weights(batch, "token_mean"), np.float64)
    logprobs, total = np.asarray(outputs.logprobs, np.float64), 0.0
    expected = np.zeros(batch.tokens.shape)
    for _, rows, columns in packed.sequences(batch):
      at = (rows, columns)
      if not len(rows):
        continue
      ratio = np.exp(np.mean(logprobs[at] - np.asarray(batch.behaviour_logprobs[at], np.float64)))
      for r, c in zip(rows, columns):
        a = float(batch.signals["advantages"][r, c])
        total -= weights[r, c] * min(ratio * a, np.clip(ratio, 1 - low, 1 + high) * a)
        trusted = ratio <= 1 + high if a >= 0 else ratio >= 1 - low
        expected[r, c] = -weights[r, c] * a * ratio * trusted
        cut, kept = cut + (not trusted), kept + trusted
    packed.close(value, total)
    np.testing.assert_allclose(gradient.logprobs, expected, rtol=1e-5, atol=1e-9)
  assert cut and kept


def test_both_levels_of_sequences_agree_where_advantages_are_equal_over_them(packed):
  for seed in range(4):
    batch, outputs = packed.batch(seed)
    values = np.random.default_rng(seed).normal(size=batch.num_sequences).astype(np.float32)
    batch = batch.with_signals(advantages=to_tokens(batch, values))
    (a, _), whole = step(functools.partial(clipped_surrogate, level="sequence"),
                         "sequence_mean")(outputs, batch)
    (b, _), token = step(functools.partial(clipped_surrogate, level="sequence_token"),
                         "sequence_mean")(outputs, batch)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(whole.logprobs, token.logprobs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_reinforce_and_its_gradient_equal_the_equation(packed, aggregation):
  batch, outputs = packed.batch(1)
  (value, _), gradient = step(reinforce, aggregation)(outputs, batch)
  products = -np.asarray(batch.signals["advantages"], np.float64) * outputs.logprobs
  packed.close(value, packed.aggregate(batch, products, aggregation, constant=10))
  for index in np.ndindex(batch.tokens.shape):
    one = np.zeros(batch.tokens.shape)
    one[index] = -batch.signals["advantages"][index]
    expected = packed.aggregate(batch, one, aggregation, constant=10)
    np.testing.assert_allclose(gradient.logprobs[index], expected, rtol=1e-5)


def enumerated(logits, behaviour_logits, rewards, length):
  """Every sequence over the vocabulary, each counting as often as the behaviour policy draws it.

  Args:
    logits, behaviour_logits: of the next token after every prefix. [prefixes, vocabulary]
    rewards: of every sequence, in lexicographic order.

  Returns:
    The batch, and `outputs(logits)` of the policy on it.
  """
  vocabulary, sequences = logits.shape[1], list(itertools.product(range(logits.shape[1]),
                                                                  repeat=length))
  prefixes = [p for n in range(length) for p in itertools.product(range(vocabulary), repeat=n)]
  visited = np.array([[prefixes.index(s[:t]) for t in range(length)] for s in sequences])
  log_b = jax.nn.log_softmax(behaviour_logits)[visited, np.array(sequences)]
  trajectories = [Trajectory(
      tokens=[0, *s], loss_mask=np.arange(length + 1) > 0, behaviour_logprobs=[0, *b],
      weight=len(sequences) * float(np.exp(np.sum(b))),
      signals={"advantages": np.full(length + 1, r)}) for s, b, r in zip(sequences, log_b, rewards)]
  batch = pack(trajectories, row_length=length + 1)

  def outputs(logits):
    found = jax.nn.log_softmax(logits)[visited, np.array(sequences)].reshape(-1)
    flat = jnp.zeros(batch.tokens.size)
    order = np.argsort(batch.sequence_ids[batch.loss_mask], kind="stable")
    return ModelOutputs(logprobs=flat.at[np.flatnonzero(batch.loss_mask)[order]].set(found)
                        .reshape(batch.tokens.shape))
  return batch, outputs


def expected_reward(logits, rewards, length):
  """Of a policy, from its definition in float64."""
  policy = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
  prefixes = [p for n in range(length)
              for p in itertools.product(range(logits.shape[1]), repeat=n)]
  return sum(reward * np.prod([policy[prefixes.index(s[:t]), s[t]] for t in range(length)])
             for s, reward in zip(itertools.product(range(logits.shape[1]), repeat=length),
                                  rewards))


@pytest.mark.parametrize("length, level, unbiased", [
    (1, "token", True), (3, "sequence", True), (3, "token", False), (3, None, False)])
def test_importance_weights_make_samples_of_an_older_policy_unbiased(
    packed, length, level, unbiased):
  """The expectation is exact: over all sequences of a vocabulary of three."""
  rng = np.random.default_rng(length)
  behaviour, drift = rng.normal(size=(2, sum(3 ** n for n in range(length)), 3))
  logits, rewards = behaviour + 0.5 * drift, rng.normal(size=3 ** length)
  batch, outputs = enumerated(logits, behaviour, rewards, length)
  settings = dict(importance_cap=float("inf"), level=level) if level else {}

  def loss(logits):
    return sum_of_terms([functools.partial(reinforce, **settings)])(
        outputs(logits), batch, loss_weights(batch, "sequence_sum"), mean_weights(batch))[0]
  gradient = jax.grad(loss)(jnp.asarray(logits, jnp.float32))
  expected = packed.finite_differences(lambda x: -expected_reward(x, rewards, length), logits,
                                       np.full(logits.shape, True))
  error = np.abs(gradient - expected).max() / np.abs(expected).max()
  assert error < 1e-4 if unbiased else error > 0.02


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_weights_equal_the_equation_and_pass_no_gradient(packed, level):
  batch, outputs = packed.batch(13, noise=0.8)
  term = functools.partial(reinforce, importance_cap=1.5, level=level)
  (value, metrics), gradient = step(term, "sequence_mean")(outputs, batch)
  weights = np.zeros(batch.tokens.shape)
  for _, *at in packed.sequences(batch):
    at = tuple(at)
    ratio = np.exp(outputs.logprobs[at].astype(np.float64) - batch.behaviour_logprobs[at])
    weights[at] = np.minimum(ratio if level == "token" else np.prod(ratio), 1.5)
  scaled = -weights * batch.signals["advantages"]
  packed.close(value, packed.aggregate(batch, scaled * outputs.logprobs, "sequence_mean"))
  packed.close(gradient.logprobs, packed.finite_differences(
      lambda x: packed.aggregate(batch, scaled * x, "sequence_mean"),
      np.asarray(outputs.logprobs, np.float64), batch.loss_mask))
  mask = (weights > 0)
  np.testing.assert_allclose(metrics["importance_weight"], weights[mask].mean(), rtol=1e-4)
  np.testing.assert_allclose(metrics["clip_fraction"], (weights[mask] == 1.5).mean(), rtol=1e-4)
  assert 0.1 < metrics["clip_fraction"] < 0.9


@pytest.mark.parametrize("name", SURROGATES)
def test_on_policy_the_surrogate_has_the_gradient_of_reinforce(packed, name):
  batch, outputs = packed.batch(2)
  batch = batch.replace(behaviour_logprobs=outputs.logprobs)
  surrogate = functools.partial(clipped_surrogate, **SURROGATES[name])
  (_, metrics), gradient = step(surrogate, "sequence_mean")(outputs, batch)
  _, expected = step(reinforce, "sequence_mean")(outputs, batch)
  packed.close(gradient.logprobs, expected.logprobs)
  assert metrics["clip_fraction"] == 0 and metrics["behaviour_kl"] == 0
  np.testing.assert_allclose(metrics["ratio"], 1, rtol=1e-6)


def test_for_single_tokens_sequence_level_is_token_level(packed):
  batch, outputs = packed.batch(4, lengths=[2] * 8, noise=0.5)
  results = [step(functools.partial(clipped_surrogate, level=level, dual_clip=1.5))(outputs, batch)
             for level in ("token", "sequence")]
  jax.tree.map(packed.close, results[0], results[1])


def test_gspo_token_has_the_gradient_of_sequence_level(packed):
  """GSPO-token: each token's gradient is s * A * grad log pi(t) / length, unless s is clipped."""
  batch, outputs = packed.batch(6)
  run = step(functools.partial(clipped_surrogate, level="sequence", low=0.05, high=0.05),
             "sequence_mean")
  _, gradient = run(outputs, batch)
  expected, count = np.zeros(batch.tokens.shape), len(list(packed.sequences(batch)))
  for i, *at in packed.sequences(batch):
    at = tuple(at)
    if len(at[0]):
      s = np.exp(np.mean(outputs.logprobs[at].astype(np.float64) - batch.behaviour_logprobs[at]))
      advantage = batch.signals["advantages"][at][0]
      inside = s <= 1.05 if advantage > 0 else s >= 0.95
      expected[at] = -batch.weights[i] * inside * s * advantage / len(at[0]) / count
  assert np.any(expected) and np.any(batch.loss_mask & (expected == 0))
  packed.close(gradient.logprobs, expected)


def test_dual_clip_touches_negative_advantages_only_and_bounds_their_loss(packed):
  batch, outputs = packed.batch(7, noise=2.0)
  plain, _ = clipped_surrogate(outputs, batch)
  dual, _ = clipped_surrogate(outputs, batch, dual_clip=3.0)
  plain, dual, advantages = np.asarray(plain), np.asarray(dual), batch.signals["advantages"]
  up, down = batch.loss_mask & (advantages > 0), batch.loss_mask & (advantages < 0)
  np.testing.assert_array_equal(plain[up], dual[up])
  assert np.any(plain[down] > 3 * np.abs(advantages[down]))
  assert np.all(dual[down] <= 3.00001 * np.abs(advantages[down]))


@pytest.mark.parametrize("name", ["token", "dual"])
def test_clip_fraction_counts_the_tokens_whose_gradient_is_cut(packed, name):
  batch, outputs = packed.batch(8, noise=0.6)
  idle = batch.tokens == 1  # without an advantage there is no gradient to cut
  batch = batch.with_signals(advantages=np.where(idle, 0, batch.signals["advantages"]))
  surrogate = functools.partial(clipped_surrogate, **SURROGATES[name])
  (_, metrics), gradient = step(surrogate)(outputs, batch)
  cut = np.mean(((np.asarray(gradient.logprobs) == 0) & ~idle)[batch.loss_mask])
  assert 0.1 < cut < 0.9
  np.testing.assert_allclose(metrics["clip_fraction"], cut, rtol=1e-5)


def test_metrics_describe_the_drift_from_the_behaviour_policy(packed):
  batch, outputs = packed.batch(9)
  drift = outputs.logprobs.astype(np.float64) - batch.behaviour_logprobs
  drift = drift[batch.loss_mask]
  for term in (clipped_surrogate, reinforce):
    (_, metrics), _ = step(term)(outputs, batch)
    np.testing.assert_allclose(metrics["behaviour_kl"], np.mean(np.exp(drift) - 1 - drift),
                               rtol=1e-4)
  (_, metrics), _ = step(clipped_surrogate)(outputs, batch)
  np.testing.assert_allclose(metrics["ratio"], np.mean(np.exp(drift)), rtol=1e-5)


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("difference", [100.0, -100.0, 1e30, -1e30, np.inf, -np.inf])
def test_hostile_ratios_give_finite_losses_and_gradients(packed, name, difference):
  surrogate = functools.partial(clipped_surrogate, **SURROGATES[name])
  batch, outputs = packed.batch(10)
  hostile = np.where(batch.tokens % 2 == 0, batch.behaviour_logprobs + difference, outputs.logprobs)
  run = jax.value_and_grad(lambda x: jnp.sum(surrogate(outputs.replace(logprobs=x), batch)[0]))
  value, gradient = run(hostile.astype(np.float32))
  assert np.isfinite(value) and np.all(np.isfinite(gradient))
  assert np.any(batch.loss_mask & (batch.tokens % 2 == 0) & (batch.signals["advantages"] < 0))


@pytest.mark.parametrize("term", [
    reinforce, clipped_surrogate, functools.partial(clipped_surrogate, level="sequence"),
    functools.partial(reinforce, importance_cap=2.0, level="sequence")])
def test_off_the_loss_mask_nothing_is_read(packed, term):
  batch, outputs = packed.batch(11)
  expected = step(term)(outputs, batch)
  for garbage in (np.nan, np.inf, -np.inf):
    def spoil(x):
      return np.where(batch.loss_mask, x, np.float32(garbage))
    spoiled = batch.replace(behaviour_logprobs=spoil(batch.behaviour_logprobs),
                            signals=jax.tree.map(spoil, batch.signals))
    result = step(term)(outputs.replace(logprobs=spoil(outputs.logprobs)), spoiled)
    np.testing.assert_array_equal(result[0][0], expected[0][0])
    np.testing.assert_array_equal(result[1].logprobs, expected[1].logprobs)


@pytest.mark.parametrize("settings, message", [
    (dict(level="tokens"), "level='tokens'; valid are 'token', 'sequence' and 'sequence_token'"),
    (dict(low=-0.1), "low=-0.1, high=0.2; both are distances from 1"),
    (dict(dual_clip=0.9), "dual_clip=0.9 has to be above 1"),
])
def test_settings_that_make_no_sense_are_refused(packed, settings, message):
  batch, outputs = packed.batch(0)
  with pytest.raises(ValueError, match=message):
    clipped_surrogate(outputs, batch, **settings)


@pytest.mark.parametrize("settings, message", [
    (dict(level="row"), "reinforce: level='row'; valid are 'token' and 'sequence'"),
    (dict(importance_cap=0.0), "importance_cap=0.0 has to be above 0"),
])
def test_importance_weights_that_make_no_sense_are_refused(packed, settings, message):
  batch, outputs = packed.batch(0)
  with pytest.raises(ValueError, match=message):
    reinforce(outputs, batch, **settings)


@pytest.mark.parametrize("term", [reinforce, clipped_surrogate])
def test_a_phase_without_advantages_is_told_so(packed, term):
  batch, outputs = packed.batch(0)
  with pytest.raises(ValueError, match="needs batch.signals\\['advantages'\\]"):
    term(outputs, batch.replace(signals={}))
