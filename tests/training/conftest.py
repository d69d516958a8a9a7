"""A tiny model, ragged trajectories and learners whose last gradient can be read."""

import functools
import types

import jax
import numpy as np
import optax
import pytest

from jaxrl import advantages
from jaxrl import compose
from jaxrl import objectives
from jaxrl import sharding
from jaxrl.batch import Trajectory
from jaxrl.models import DecoderConfig
from jaxrl.objectives.aggregate import Aggregation
from jaxrl.training.learner import Learning
from jaxrl.training.state import abstract_state
from jaxrl.training.state import initial_parameters
from jaxrl.training.state import start_phase

VOCAB = 12
DECODER = DecoderConfig(vocab_size=VOCAB, layers=1, d_model=16, heads=4, kv_heads=2, d_ff=32)
GRPO = (dict(name="clipped_surrogate", low=0.1, high=0.2, level="sequence"),
        dict(name="kl", beta=0.3), dict(name="entropy", coefficient=0.05))
RATE = 0.5


def one_device():
  """A mesh of one of the virtual devices."""
  return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def rollouts(seed=0, *, groups=4, samples=3, unscored=(2,)):
  """Scored samples of ragged length, with log-probabilities near those of a fresh model."""
  rng = np.random.default_rng(seed)
  found = []
  for item in range(groups * samples):
    prompt, length = int(rng.integers(1, 4)), int(rng.integers(4, 13))
    mask = np.arange(length) >= prompt
    found.append(Trajectory(
        tokens=rng.integers(0, VOCAB, length), loss_mask=mask,
        behaviour_logprobs=np.where(mask, -np.log(VOCAB) + 0.3 * rng.normal(size=length), 0),
        group=item // samples, reward=float(rng.integers(0, 3)), scored=item not in unscored,
        weight=rng.uniform(0.5, 2.0), task_id=f"task-{item // samples}", prompt_length=prompt))
  return found


def gradient_keeper(rate=RATE):
  """Plain gradient descent whose state holds the last gradient; see `gradient`."""
  return optax.chain(optax.trace(decay=0.0), optax.scale(-rate))


def gradient(state):
  """The gradient of the last update of a state made with `gradient_keeper`."""
  return state.opt_state[0].trace


def learning(kind="grpo", **changes):
  """What a learner is made of, for `grpo` or `sft`."""
  sampled = kind == "grpo"
  terms = GRPO if sampled else (dict(name="cross_entropy"),)
  chain = ("center_by_group", "scale_by_group_std") if sampled else ()
  return Learning(**{**dict(
      decoder=DECODER, terms=[compose.build(t, objectives) for t in terms],
      advantage=[compose.build(a, advantages) for a in chain],
      aggregations=[Aggregation("token_mean")] * len(terms), optimizer=gradient_keeper(),
      learning_rate=optax.constant_schedule(RATE), temperature=0.8 if sampled else 1.0, vocabulary_chunk=5,
      with_behaviour=sampled), **changes})


@functools.cache
def parameters(seed):
  """Fresh parameters of the toy decoder, on the host."""
  rng = jax.random.key_data(jax.random.key(seed))
  return jax.device_get(initial_parameters(DECODER, rng, one_device()))


def start(parts, mesh=None, *, seed=0):
  """A state at its first update; its frozen models, if any, are some way off the policy."""
  def moved(parameter):
    noise = np.random.default_rng(parameter.size).normal(size=parameter.shape)
    return (parameter + 0.1 * noise).astype(parameter.dtype)
  params = parameters(seed)
  rng = jax.random.key_data(jax.random.key(seed))
  state = start_phase(params, rng, parts.optimizer, carried=parts.carried)
  state = state.replace(frozen={name: jax.tree.map(moved, params) for name in parts.kept})
  return jax.device_put(state, shardings(parts, mesh or one_device()))


def shardings(parts, mesh):
  """Where a state lives on a mesh."""
  abstract = abstract_state(parts.decoder, mesh, parts.optimizer,
                            frozen=parts.kept, carried=parts.carried)
  return jax.tree.map(lambda x: x.sharding, abstract)


def close(found, expected, rtol=1e-5):
  """Trees whose arrays differ by at most `rtol` of each array's largest entry."""
  def compare(path, x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(np.abs(y).max(initial=0), 1e-6),
                               err_msg=jax.tree_util.keystr(path))
  jax.tree_util.tree_map_with_path(compare, found, expected)


def same_bits(found, expected):
  """Trees that are equal bit for bit."""
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="session")
def toys():
  return types.SimpleNamespace(
      decoder=DECODER, one_device=one_device, rollouts=rollouts, gradient_keeper=gradient_keeper,
      gradient=gradient, learning=learning, parameters=parameters, start=start,
      shardings=shardings, close=close, same_bits=same_bits)
