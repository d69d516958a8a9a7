"""A critic of its own: what it learns from, what it begins as, and that the policy is left alone."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages
from jaxrl import compose
from jaxrl import config as configs
from jaxrl import objectives
from jaxrl import sharding
from jaxrl.batch import pack
from jaxrl.models import decoder as decoders
from jaxrl.models.outputs import critic_of
from jaxrl.objectives.aggregate import Aggregation
from jaxrl.training import builders
from jaxrl.training import phases as phase_lib
from jaxrl.training import state as states
from jaxrl.training.learner import make_learner
from jaxrl.training.learner import to_micro_batches

GAMMA, LAM, COEFFICIENT = 0.9, 0.7, 0.6
POLICY = dict(name="clipped_surrogate", low=0.1, high=0.2)
VALUE = dict(name="value_loss", coefficient=COEFFICIENT, clip=None)


def decoder_of(toys):
  return dataclasses.replace(toys.decoder, critic=True)


@pytest.fixture(scope="module")
def learners(toys):
  """By names of terms: what a learner with a critic is made of, and the learner."""
  made = {}
  for name, terms in (("both", [POLICY, VALUE]), ("policy", [POLICY])):
    parts = toys.learning(
        decoder=decoder_of(toys), terms=[compose.build(t, objectives) for t in terms],
        advantage=[compose.build(dict(name="gae", gamma=GAMMA, lam=LAM), advantages)],
        aggregations=[Aggregation("token_mean")] * len(terms))
    made[name] = parts, make_learner(parts, toys.shardings(parts, toys.one_device()))
  return made


@pytest.fixture(scope="module")
def params(toys):
  """A policy, and a critic that is another model, with a head that says something."""
  key = jax.random.key_data(jax.random.key(5))
  found = jax.device_get(states.initial_parameters(decoder_of(toys), key, toys.one_device()))
  head = found["critic"]["value_head"]
  rng = np.random.default_rng(0)
  head["kernel"] = rng.normal(size=head["kernel"].shape).astype(np.float32) / 4
  head["bias"] = np.full_like(head["bias"], 0.3)
  return found


def updated(toys, learner, parts, params, trajectories):
  """One update -> (state, metrics)."""
  key = jax.random.key_data(jax.random.key(0))
  state = states.start_phase(params, key, parts.optimizer)
  state = jax.device_put(state, toys.shardings(parts, toys.one_device()))
  host = to_micro_batches(pack(trajectories, row_length=32, rows_multiple=2, min_rows=8), 2)
  assert host.tokens.shape[0] // 2 > 1, "several micro-batches"
  batch = learner.prepare(state, sharding.put_batch(host, toys.one_device()))[1]
  state, metrics = learner.update(state, batch)
  return state, {k: float(v) for k, v in metrics.items()}


def values_of(toys, params, tokens):
  """What the critic says just before each token of a sequence; 0 before the first. Float64."""
  padded = np.zeros((1, 16), np.int32)
  padded[0, :len(tokens)] = tokens
  hidden, _ = decoders.Decoder(critic_of(decoder_of(toys))).apply(
      {"params": params["critic"]}, padded, np.arange(16)[None], np.ones_like(padded))
  head = params["critic"]["value_head"]
  said = np.asarray(hidden[0], np.float64) @ np.asarray(head["kernel"], np.float64) + head["bias"]
  return np.concatenate([[0.0], said[:len(tokens) - 1, 0]])


def returns_of(values, mask, reward):
  """lambda-returns of the loss tokens: R_t = r_t + gamma ((1 - lambda) V_{t+1} + lambda R_{t+1})."""
  at, found, later, value = np.nonzero(mask)[0], {}, 0.0, 0.0
  for t in at[::-1]:
    now = reward if t == at[-1] else 0.0
    found[t] = now + GAMMA * ((1 - LAM) * value + LAM * later)
    later, value = found[t], values[t]
  return found


def value_loss(toys, params, trajectories, returns=None):
  """Squared error by its equations, over all loss tokens of scored sequences, and its returns."""
  scored = [t for t in trajectories if t.scored]
  values = [values_of(toys, params, t.tokens) for t in scored]
  returns = returns or [returns_of(v, t.loss_mask, t.reward) for v, t in zip(values, scored)]
  count = sum(int(t.loss_mask.sum()) for t in scored)
  return sum(t.weight * COEFFICIENT / 2 * (v[i] - r[i]) ** 2
             for t, v, r in zip(scored, values, returns) for i in r) / count, returns


def test_each_model_has_the_gradient_of_its_own_loss_and_none_of_the_other(toys, learners, params):
  gradients, metrics = {}, {}
  for name, (parts, learner) in learners.items():
    state, metrics[name] = updated(toys, learner, parts, params, toys.rollouts(4))
    gradients[name] = jax.device_get(toys.gradient(state))
  both, policy = gradients["both"], gradients["policy"]
  assert all(not np.any(g) for g in jax.tree.leaves(policy["critic"]))
  toys.close(both["params"], policy["params"])
  for gradient in (both["params"], both["critic"]):
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradient)) > 1e-3
  assert metrics["both"]["loss"] == pytest.approx(
      metrics["policy"]["loss"] + metrics["both"]["loss/value_loss"], rel=1e-5)


def test_the_loss_of_the_critic_equals_its_equations_and_the_gradient_is_its_slope(
    toys, learners, params):
  trajectories = toys.rollouts(7)
  state, metrics = updated(toys, learners["both"][1], learners["both"][0], params, trajectories)
  expected, returns = value_loss(toys, params, trajectories)
  assert metrics["loss/value_loss"] == pytest.approx(expected, rel=1e-5)
  gradient = jax.device_get(toys.gradient(state)["critic"])
  length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
  ends = []
  for way in (1e-2, -1e-2):  # along the gradient, with the returns of before
    moved = jax.tree.map(lambda p, g: p + way * g / length, params["critic"], gradient)
    ends.append(value_loss(toys, {"critic": moved}, trajectories, returns)[0])
  assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(length, rel=1e-2)


def test_advantages_are_against_the_critic_whatever_the_policy(toys, learners, params):
  parts, learner = learners["both"]
  trajectories = toys.rollouts(2, unscored=())
  key = jax.random.key_data(jax.random.key(0))
  found = []
  for policy in (params["params"], jax.tree.map(lambda p: p * 1.1, params["params"])):
    state = states.start_phase({**params, "params": policy}, key, parts.optimizer)
    state = jax.device_put(state, toys.shardings(parts, toys.one_device()))
    host = to_micro_batches(pack(trajectories, row_length=32, rows_multiple=2, min_rows=8), 2)
    batch = learner.prepare(state, sharding.put_batch(host, toys.one_device()))[1]
    found.append(np.asarray(batch.signals["advantages"]))
  np.testing.assert_array_equal(*found)
  expected = 0.0
  for t in trajectories:
    values = values_of(toys, params, t.tokens)
    expected += sum(r - values[i] for i, r in returns_of(values, t.loss_mask, t.reward).items())
  assert found[0].sum(dtype=np.float64) == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def parts(tmp_path, monkeypatch):
  """A supervised phase, and two that want values, of a small model."""
  monkeypatch.setattr(phase_lib, "rehearse", lambda *_: types.SimpleNamespace(learner=None))
  config = configs.load("configs/ppo.py")
  config.model.update(layers=2, d_model=16, heads=2, kv_heads=2, d_ff=16)
  config.evaluate.problems = 0
  config.data.validation = config.data.test = ""
  config.phases, config.sft.until = ("sft", "rl", "more"), None
  config.more = config.rl.copy_and_resolve_references()
  found = builders.build_parts(config, tmp_path, print)
  yield found
  found.scorer.close()


def test_a_critic_begins_as_the_policy_where_values_are_first_read(parts):
  key = jax.random.key_data(jax.random.key(0))
  fresh = states.initial_parameters(parts.decoder, key, parts.mesh)

  def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)

  def bodies(params):
    policy, critic = params["params"], params["critic"]
    shared = sorted(set(policy) & set(critic))
    assert "embedding" in shared and "blocks_1" in shared
    return [bits({name: model[name] for name in shared}) for model in (policy, critic)]

  def trained(params):  # as if a phase had moved everything
    return jax.tree.map(lambda x: x + jnp.asarray(0.01, x.dtype), params)

  assert bodies(fresh)[0] != bodies(fresh)[1]
  sft, rl, more = parts.phases
  state = builders.start_state(parts, sft, fresh, key)
  assert bits(state.params) == bits(fresh), "imitation reads no values"
  state = builders.start_state(parts, rl, trained(state.params), key)
  policy, critic = bodies(state.params)
  assert policy == critic == bodies(trained(fresh))[0]
  assert bits(state.params["critic"]["value_head"]) == bits(trained(fresh)["critic"]["value_head"])
  learned = {**state.params, "critic": trained(state.params["critic"])}
  state = builders.start_state(parts, more, learned, key)
  assert bits(state.params) == bits(learned), "a critic that has learned goes on"


@pytest.mark.parametrize("done, critic, taught", [
    (["sft", "rl"], True, True), (["sft"], True, False), (["sft", "rl"], False, False)])
def test_a_critic_goes_on_where_the_run_that_is_started_from_taught_one(parts, tmp_path, done, critic, taught):
  key = jax.random.key_data(jax.random.key(0))
  earlier = parts.config.copy_and_resolve_references()
  earlier.phases, later = ("sft", "rl"), tmp_path / "later"
  earlier.model.critic = critic
  for place, start in ((tmp_path / "earlier", ""), (later, tmp_path / "earlier")):
    place.mkdir()
    (place / "config.json").write_text(json.dumps({**configs.to_dict(earlier), "start": str(start)}))
    (place / "metrics.jsonl").write_text("".join(
        json.dumps({"phase": name, "grad_norm": 1.0}) + "\n" for name in done if name in earlier.phases))
    earlier.phases, earlier.model.critic = ("sft",), True
  params = states.initial_parameters(parts.decoder, key, parts.mesh)
  config = parts.config.copy_and_resolve_references()
  config.start = str(later)
  rl = dataclasses.replace(parts.phases[1], index=0)
  state = builders.start_state(dataclasses.replace(parts, config=config, phases=[rl]), rl, params, key)
  same = jax.tree.map(lambda a, b: bool((a == b).all()), state.params["critic"], params["critic"])
  assert all(jax.tree.leaves(same)) == taught
