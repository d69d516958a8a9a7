"""Draws made together are, bit for bit, what an initializer draws one by one."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models import DecoderConfig
from jaxrl.models import adapters
from jaxrl.models import init_parameters
from jaxrl.training import draws
from jaxrl.training import state as states

SIZES = (1, 1023, 1024, 1025, 3000)
PLAIN = DecoderConfig(vocab_size=97, layers=2, d_model=36, heads=3, kv_heads=1, d_ff=50, tie_embeddings=False)


def data(seed=0, impl=None):
  return jax.random.key_data(jax.random.key(seed, impl=impl))


def both(function, argument):
  """What a function gives as it is, what it gives with its draws made together, and the text of that program."""
  traced = jax.jit(function).trace(jax.typeof(argument))
  together = jax.jit(draws.at_once(traced))
  return jax.jit(function)(argument), together(argument), together.lower(argument).as_text()


@pytest.mark.parametrize("config", [
    PLAIN, dataclasses.replace(PLAIN, critic=True), dataclasses.replace(PLAIN, heads_on_top=(("score", 1),)),
    dataclasses.replace(PLAIN, scan_layers=True), dataclasses.replace(PLAIN, param_dtype="bfloat16"),
    dataclasses.replace(PLAIN, experts=4, experts_per_token=2, expert_d_ff=24),
    dataclasses.replace(PLAIN, adapters=(adapters.Adapter("a", rank=2),))],
    ids=["plain", "critic", "head", "scanned", "bfloat16", "experts", "adapter"])
def test_parameters_are_the_same_bits(toys, config):
  def init(rng):
    return nn.unbox(init_parameters(config, jax.random.wrap_key_data(rng)))
  alone, together, _ = both(init, data())
  toys.same_bits(together, alone)


def test_there_is_one_kernel_and_one_derivation_of_keys():
  def init(rng):
    return nn.unbox(init_parameters(PLAIN, jax.random.wrap_key_data(rng)))
  text = both(init, data())[2]
  assert text.count("chlo.erf_inv") == 1
  assert jax.jit(init).lower(data()).as_text().count("chlo.erf_inv") > 1
  assert "dot_general" not in text  # of the forward pass, which only told the shapes


def test_lengths_around_a_chunk_and_keys_of_all_kinds(toys):
  def function(rng):
    key = jax.random.wrap_key_data(rng)
    other = jax.random.fold_in(key, rng[1])  # not a number that the program holds
    split = jax.random.split(key)
    keys = [key, other, split[0], jax.random.fold_in(other, 3), jax.random.fold_in(key, 2 ** 32 - 1)]
    return [jax.random.normal(k, (size,)) for k, size in zip(keys, SIZES)], jax.random.fold_in(key, 5)
  (alone, key), (together, same_key), text = both(function, data(7))
  toys.same_bits(together, alone)
  toys.same_bits(jax.random.key_data(same_key), jax.random.key_data(key))
  assert text.count("chlo.erf_inv") == 1


def test_a_key_that_was_drawn_is_evaluated_in_its_turn(toys):
  def function(rng):
    key = jax.random.wrap_key_data(rng)
    first = jax.random.normal(key, (5,))
    return first, jax.random.normal(jax.random.fold_in(key, (first[0] > 0).astype(jnp.int32)), (7,))
  alone, together, _ = both(function, data(3))
  toys.same_bits(together, alone)


def test_draws_in_loops_branches_and_of_other_types_stay_where_they_are(toys):
  def function(rng):
    key = jax.random.wrap_key_data(rng)
    keys = jax.random.split(key, 3)
    looped = jax.lax.map(lambda k: jax.random.normal(k, (4,)), keys)
    chosen = jax.lax.cond(rng[0] == 0, lambda: jax.random.normal(key, (3,)), lambda: jnp.zeros(3))
    return looped, chosen, jax.random.normal(key, (6,), jnp.bfloat16), jax.random.uniform(key, (2,)), \
        jax.random.normal(key, (6, 1)), jax.random.normal(key)
  alone, together, _ = both(function, data(2))
  toys.same_bits(together, alone)


def test_other_kinds_of_keys_stay_as_they_are(toys):
  def function(rng):
    return jax.random.normal(jax.random.wrap_key_data(rng, impl="rbg"), (10,))
  alone, together, _ = both(function, data(1, "rbg"))
  toys.same_bits(together, alone)


def test_many_numbers_and_older_settings_stay_as_they_are(toys, monkeypatch):
  def function(rng):
    key = jax.random.wrap_key_data(rng)
    return jax.random.normal(key, (40,)), jax.random.normal(jax.random.fold_in(key, 1), (60,))
  monkeypatch.setattr(draws, "MOST", 99)
  alone, together, text = both(function, data(1))
  toys.same_bits(together, alone)
  assert text.count("chlo.erf_inv") == 2
  monkeypatch.setattr(draws, "MOST", 100)
  assert both(function, data(1))[2].count("chlo.erf_inv") == 1
  with jax.threefry_partitionable(False):
    alone, together, _ = both(function, data(1))
  toys.same_bits(together, alone)


def test_a_function_without_draws(toys):
  alone, together, _ = both(lambda x: {"a": x * 2, "b": jnp.ones(3), "same": x}, np.arange(4.0, dtype=np.float32))
  toys.same_bits(together, alone)


def test_what_cannot_be_joined_stays_as_it_is(toys):
  def with_derivative(rng):
    return jax.nn.relu(jax.random.normal(jax.random.wrap_key_data(rng), (9,)))

  def mapped(rng):
    keys = jax.random.split(jax.random.wrap_key_data(rng), 4)
    key = jax.random.fold_in(keys[0], 1)
    return (jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 3), (5,)))(keys),
            jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (5,)))(jnp.arange(3)),
            jax.random.normal(key, (2,)))

  @jax.jit
  def _normal(key):  # with the name of JAX's own
    return 3 * jax.random.normal(key, (4,))
  for function in (with_derivative, mapped, lambda rng: _normal(jax.random.wrap_key_data(rng))):
    alone, together, _ = both(function, data(4))
    toys.same_bits(together, alone)


def test_a_setting_that_gives_other_numbers_is_heeded_whenever_it_changes(toys):
  mesh = toys.one_device()
  with jax.threefry_partitionable(True):
    new = jax.device_get(states.initial_parameters(PLAIN, data(), mesh))
    with jax.threefry_partitionable(False):
      old = jax.device_get(states.initial_parameters(PLAIN, data(), mesh))
      plain = jax.jit(lambda rng: nn.unbox(init_parameters(PLAIN, jax.random.wrap_key_data(rng))))(data())
    toys.same_bits(old, plain)
    toys.same_bits(jax.device_get(states.initial_parameters(PLAIN, data(), mesh)), new)
