"""One update: the same gradient for any split, off what counts for nothing, never from a NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import compose
from jaxrl import objectives
from jaxrl import schedule
from jaxrl import sharding
from jaxrl.batch import pack
from jaxrl.batch import Trajectory
from jaxrl.models import decoder as decoders
from jaxrl.objectives.aggregate import Aggregation
from jaxrl.training.learner import make_learner
from jaxrl.training.learner import to_micro_batches

SPLITS = [(8, 64), (1, 16), (2, 0), (4, 32)]  # micro-batch rows, row length


@pytest.fixture(scope="module")
def learners(toys):
  """`learners(kind, rows, **changes)`, each compiled once."""
  made = {}

  def get(kind, rows, **changes):
    name = (kind, rows, *sorted(changes))
    if name not in made:
      parts = toys.learning(kind, **changes)
      made[name] = parts, make_learner(parts, toys.shardings(parts, toys.one_device()))
    return made[name]
  return get


def put(trajectories, rows, length=32, **packing):
  """A batch on one device; its shape is nearly always the same, for programs to be used again."""
  packing = dict(min_rows=8, min_sequences=16) | packing
  host = pack(trajectories, row_length=length, rows_multiple=rows, **packing)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  return sharding.put_batch(to_micro_batches(host, rows), mesh)


def step(learner, state, batch):
  """Prepares and updates -> (prepared batch, state, metrics)."""
  batch = learner.prepare(state, batch)[1]
  state, metrics = learner.update(state, batch)
  return batch, state, {k: float(v) for k, v in metrics.items()}


@functools.partial(jax.jit, static_argnums=0)
def hidden_and_vocabulary(config, params, tokens):
  model = decoders.Decoder(config)
  hidden, _ = model.apply(params, tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
  return hidden[0], model.apply(params, method="vocabulary")


def log_softmax(parts, params, tokens):
  """Log-probabilities of all tokens at each position of one sequence, in float64."""
  padded = np.zeros((1, 16), np.int32)  # causal: what comes later does not matter
  padded[0, :len(tokens)] = tokens
  hidden, vocabulary = (np.asarray(x, np.float64)
                        for x in hidden_and_vocabulary(parts.decoder, params, padded))
  logits = hidden @ vocabulary.T / parts.temperature
  logits -= logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_any_micro_batches_and_any_packing_give_the_same_update(toys, learners, kind):
  results = []
  for rows, length in SPLITS if kind == "grpo" else SPLITS[2:]:
    parts, learner = learners(kind, rows)
    batch = put(toys.rollouts(), rows, length)
    _, state, metrics = step(learner, toys.start(parts), batch)
    results.append((toys.gradient(state), state.params, metrics))
  assert max(np.abs(g).max() for g in jax.tree.leaves(results[0][0])) > 1e-3
  for other in results[1:]:
    toys.close(other, results[0])


def test_padding_has_no_effect(toys, learners):
  parts, learner = learners("grpo", 4)
  batch = put(toys.rollouts(), 4)
  prepared, state, metrics = step(learner, toys.start(parts), batch)
  wide = put(toys.rollouts(), 4, min_rows=32, min_sequences=64)
  assert wide.tokens.shape[0] > batch.tokens.shape[0]
  _, padded, padded_metrics = step(learner, toys.start(parts), wide)
  toys.close((toys.gradient(padded), padded_metrics), (toys.gradient(state), metrics), rtol=1e-6)
  padding = prepared.segment_ids == 0
  assert padding.any()
  junk = prepared.replace(tokens=jnp.where(padding, 7, prepared.tokens),
                          behaviour_logprobs=jnp.where(padding, 1e3,
                                                             prepared.behaviour_logprobs))
  littered, littered_metrics = learner.update(toys.start(parts), junk)
  toys.close((toys.gradient(littered), dict(littered_metrics)), (toys.gradient(state), metrics),
             rtol=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "sft"])
@pytest.mark.parametrize("trajectories", ["unscored", "none"])
def test_nothing_to_learn_from_changes_nothing(toys, learners, kind, trajectories):
  parts, learner = learners(kind, 4)
  found = toys.rollouts(unscored=range(12)) if trajectories == "unscored" else []
  before = jax.device_get(toys.start(parts).params)
  _, state, metrics = step(learner, toys.start(parts), put(found, 4))
  assert all(not np.any(g) for g in jax.tree.leaves(toys.gradient(state)))
  toys.same_bits(state.params, before)
  assert metrics["loss"] == metrics["grad_norm"] == metrics["bad_steps"] == 0
  assert np.isfinite(list(metrics.values())).all()


def test_an_unscored_sample_is_as_if_it_were_not_there(toys, learners):
  parts, learner = learners("grpo", 4)
  _, with_it, metrics = step(learner, toys.start(parts), put(toys.rollouts(unscored=(2, 7)), 4))
  left = [t for i, t in enumerate(toys.rollouts(unscored=())) if i not in (2, 7)]
  _, without, expected = step(learner, toys.start(parts), put(left, 4))
  toys.close((toys.gradient(with_it), metrics), (toys.gradient(without), expected))


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(toys, learners):
  schedule = optax.linear_schedule(1.0, 0.0, 4)
  parts, learner = learners("sft", 4, optimizer=optax.sgd(schedule, momentum=0.9),
                            learning_rate=schedule)
  good, bad = put(toys.rollouts(), 4), toys.rollouts()
  bad[4].weight = np.nan
  bad = put(bad, 4)
  _, state, metrics = step(learner, toys.start(parts), good)
  assert metrics["learning_rate"] == 1.0
  before = jax.device_get(state)
  for times in (1, 2):
    _, state, metrics = step(learner, state, bad)
    assert not np.isfinite(metrics["loss"])
    assert metrics["bad_steps"] == metrics["skipped_steps"] == times
  toys.same_bits((state.params, state.opt_state), (before.params, before.opt_state))
  assert int(state.step) == 3
  _, state, metrics = step(learner, state, good)
  assert (metrics["bad_steps"], metrics["skipped_steps"]) == (0, 2)
  assert metrics["learning_rate"] == 0.75  # the optimiser has not counted what was skipped
  assert not np.array_equal(jax.tree.leaves(state.params)[0], jax.tree.leaves(before.params)[0])


def test_the_second_update_on_a_batch_is_off_policy_and_the_reference_stays(toys, learners):
  parts, learner = learners("grpo", 4)
  state = toys.start(parts)
  reference = jax.device_get(state.reference)
  on_policy = []
  for t in toys.rollouts():
    logprobs = log_softmax(parts, state.params, t.tokens)
    t.behaviour_logprobs[1:] = logprobs[np.arange(len(t.tokens) - 1), t.tokens[1:]]
    on_policy.append(t)
  batch = learner.prepare(state, put(on_policy, 4))[1]
  state, first = learner.update(state, batch)
  assert abs(float(first["ratio"]) - 1) < 1e-5 and float(first["logprob_gap"]) < 1e-4
  assert float(first["clip_fraction"]) == 0
  state, second = learner.update(state, batch)
  assert abs(float(second["ratio"]) - 1) > 1e-3 and float(second["logprob_gap"]) > 1e-2
  assert float(second["kl"]) != float(first["kl"])
  toys.same_bits(state.reference, reference)


def test_donating_the_state_leaves_the_batch_alone(toys, learners):
  parts, learner = learners("grpo", 4)
  state = toys.start(parts)
  batch = learner.prepare(state, put(toys.rollouts(), 4))[1]
  before = jax.device_get(batch)
  after, _ = learner.update(state, batch)
  assert jax.tree.leaves(state.params)[0].is_deleted()
  toys.same_bits(batch, before)
  again, _ = learner.update(toys.start(parts), batch)
  toys.same_bits(again, after)


def expected_grpo(parts, state, trajectories: list[Trajectory]):
  """Loss of the toy objective with aggregation `token_mean`, from its equations."""
  scored = [t for t in trajectories if t.scored]
  groups = {t.group: [u.reward for u in scored if u.group == t.group] for t in scored}
  tokens, total = sum(int(t.loss_mask.sum()) for t in scored), 0.0
  for t in scored:
    rewards = np.asarray(groups[t.group])
    spread = rewards.std(ddof=1)
    advantage = (t.reward - rewards.mean()) / (spread + 1e-4) if spread > 0 else 0.0
    policy, reference = (log_softmax(parts, p, t.tokens)
                         for p in (state.params, state.reference))
    at = np.nonzero(t.loss_mask)[0]
    logprobs, frozen = (x[at - 1, t.tokens[at]] for x in (policy, reference))
    ratio = np.exp(np.mean(logprobs - t.behaviour_logprobs[at]))
    surrogate = -min(ratio * advantage, np.clip(ratio, 0.9, 1.2) * advantage)
    k3 = np.exp(frozen - logprobs) - 1 - (frozen - logprobs)
    entropy = -(np.exp(policy) * policy).sum(-1)[at - 1]
    total += t.weight * np.sum(surrogate + 0.3 * k3 - 0.05 * entropy) / tokens
  return total


def test_loss_equals_its_equations_in_float64_and_the_gradient_is_its_slope(toys, learners):
  parts, learner = learners("grpo", 4)
  trajectories = toys.rollouts(3)
  state = toys.start(parts)
  expected = expected_grpo(parts, state, trajectories)
  before = jax.device_get(state)
  batch, after, metrics = step(learner, state, put(trajectories, 4))
  assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
  gradient = jax.device_get(toys.gradient(after))
  length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
  assert metrics["grad_norm"] == pytest.approx(length, rel=1e-5)
  ends = []
  for way in (1e-2, -1e-2):
    moved = before.replace(params=jax.tree.map(lambda p, g: p + way * g / length, before.params,
                                               gradient))
    ends.append(expected_grpo(parts, moved, trajectories))
  assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(length, rel=1e-2)


def expected_of_two(parts, params, trajectories):
  """By term: REINFORCE on raw rewards, a mean over sequences of means over their tokens; entropy, a
  sum over tokens divided by sequences and 7.5."""
  scored = [t for t in trajectories if t.scored]
  reinforce = entropy = 0.0
  for t in scored:
    policy = log_softmax(parts, params, t.tokens)
    at = np.nonzero(t.loss_mask)[0]
    reinforce -= t.weight * t.reward * policy[at - 1, t.tokens[at]].mean() / len(scored)
    bonus = (np.exp(policy) * policy).sum(-1)[at - 1].sum()
    entropy += t.weight * 0.4 * bonus / (len(scored) * 7.5)
  return reinforce, entropy


def test_losses_are_weighed_at_every_update(toys):
  """A mixture of one term with weights 1/4 and, falling to 0, 3/4 is the term, then a quarter of it."""
  falling = schedule.Schedule("linear", 0.75, 0.0, 1)
  found = {}
  for name, weights in dict(alone=(1.0,), mixture=(0.25, falling)).items():
    parts = toys.learning(terms=[compose.build("reinforce", objectives)] * len(weights), advantage=[],
                          aggregations=[Aggregation("sequence_mean", weight=w) for w in weights])
    learner = make_learner(parts, toys.shardings(parts, toys.one_device()))
    state, batch = toys.start(parts), put(toys.rollouts(6), 2)
    for step_ in range(2):
      _, state, metrics = step(learner, state, batch)
      gradient = jax.device_get(toys.gradient(state))
      found[name, step_] = metrics, gradient
  metrics, gradient = found["mixture", 0]
  assert metrics["loss"] == pytest.approx(found["alone", 0][0]["loss"], rel=1e-6)
  toys.close(gradient, found["alone", 0][1], rtol=1e-5)
  metrics, _ = found["mixture", 1]
  assert metrics["loss/reinforce_2"] == 0 != metrics["loss/reinforce"] == metrics["loss"]


def test_every_term_has_its_own_aggregation(toys):
  terms = [dict(name="reinforce"), dict(name="entropy", coefficient=0.4)]
  parts = toys.learning(
      terms=[compose.build(t, objectives) for t in terms], advantage=[],
      aggregations=[Aggregation("sequence_mean"), Aggregation("constant", 7.5)])
  learner = make_learner(parts, toys.shardings(parts, toys.one_device()))
  trajectories, state = toys.rollouts(6), toys.start(parts)
  params = jax.device_get(state.params)
  batch = put(trajectories, 2)
  assert batch.tokens.shape[0] // batch.micro_batch_rows > 1
  _, state, metrics = step(learner, state, batch)
  expected = expected_of_two(parts, params, trajectories)
  assert metrics["loss/reinforce"] == pytest.approx(expected[0], rel=1e-5)
  assert metrics["loss/entropy"] == pytest.approx(expected[1], rel=1e-5)
  assert metrics["loss"] == pytest.approx(sum(expected), rel=1e-5)
  gradient = jax.device_get(toys.gradient(state))
  length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
  ends = [sum(expected_of_two(parts, jax.tree.map(lambda p, g: p + way * g / length, params,
                                                  gradient), trajectories))
          for way in (1e-2, -1e-2)]
  assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(length, rel=1e-2)
