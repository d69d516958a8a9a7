"""Digests: equal for what is built alike, in every process; different for what tracing could tell apart."""

import dataclasses
import enum
import functools
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import digests
from jaxrl import sharding
from jaxrl.models import DecoderConfig
from jaxrl.schedule import Schedule

ROOT = pathlib.Path(__file__).parents[1]


class Colour(enum.IntEnum):
  RED = 1
  BLUE = 2


@dataclasses.dataclass(frozen=True)
class Pair:
  first: object
  second: object


def times(factor, *, more=0):
  def call(x, shift=2):
    return x * factor + shift
  return functools.partial(call, shift=more) if more else call


@pytest.fixture
def at_home(monkeypatch):
  """Has this module be one whose functions and classes are described."""
  monkeypatch.setattr(digests, "HOMES", (*digests.HOMES, __name__.split(".")[0]))


def different():
  """Values no two of which are alike, made anew."""
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  return [
      None, True, 1, 1.0, 0.0, -0.0, float("nan"), 1j, "1", b"1", "None", (), [], {}, set(), (1,), [1],
      ((1,), 2), (1, (2,)), (1, 2), ("1", "2"), ("12",), {"a": 1}, {"a": 2}, {"b": 1},
      {1, 2}, {1, 3}, frozenset({1}),
      Colour.RED, Colour.BLUE, Pair(1, 2), Pair(2, 1), Pair(1, (2,)),
      np.float32(1), np.float64(1), np.zeros(2), np.zeros((1, 2)), np.zeros(2, np.float32), np.ones(2),
      jnp.zeros(2), jnp.asarray(2.0), jnp.float32(2), jnp.bfloat16(0),
      np.dtype("int8"), np.dtype(jnp.bfloat16), int, float, jnp.float32,
      times(2), times(3), times(2.0), times(2, more=1), times(2, more=3), lambda x: x + 1, lambda x: x + 2,
      lambda x: x - 1, lambda a: a[0], lambda *a: a[0], lambda *, a: a[0],
      lambda x, y=1: x + y, lambda x, y=2: x + y, lambda x, *, y=2: x + y,
      jnp.sin, jnp.cos, np.sin, len, optax.sgd(0.1).update, optax.sgd(0.2).update, optax.adam(0.1),
      optax.adam(0.1, b1=0.8), optax.adamw(optax.linear_schedule(0.1, 0, 5)),
      DecoderConfig(vocab_size=5, layers=1, d_model=8, heads=2, kv_heads=1, d_ff=8),
      DecoderConfig(vocab_size=6, layers=1, d_model=8, heads=2, kv_heads=1, d_ff=8),
      Schedule("linear", 0, 1, 5), Schedule("cosine", 0, 1, 5),
      jax.tree.structure((1, 2)), jax.tree.structure([1, 2]), jax.tree.structure((1, (2,))),
      jax.tree.structure({"a": 1}), jax.tree.structure({"b": 1}), jax.tree.structure((1, None)),
      jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P(None, "data")),
      jax.NamedSharding(sharding.make_mesh(devices=jax.devices()[:4]), jax.P("data"))]


def test_values_share_a_digest_only_if_they_are_built_alike(at_home):
  names = [repr(value) for value in different()]
  first, second = ([digests.digest(value) for value in different()] for _ in range(2))
  assert first == second
  for (i, one), (j, other) in itertools.combinations(enumerate(first), 2):
    assert one != other, (names[i], names[j])


@functools.wraps(optax.apply_updates)
def like_one_of_optax(params, updates):
  return times(2)(params)


class Numbers(dict):
  pass


def test_what_claims_to_be_from_elsewhere_is_not_believed(monkeypatch):
  for value in (like_one_of_optax, [functools.partial(like_one_of_optax, 1)], Colour.RED, Numbers(a=1)):
    with pytest.raises(digests.Undescribed):
      digests.digest(value)
  monkeypatch.setattr(optax, "apply_updates", like_one_of_optax)
  with pytest.raises(digests.Undescribed):
    digests.digest(optax.apply_updates)


def test_a_value_that_contains_itself_ends(at_home):
  def again(n):
    return again(n - 1) if n else 0
  loop = [1]
  loop.append(loop)
  assert digests.digest(again) != digests.digest(loop)


@pytest.mark.parametrize("value", [
    object(), iter([1]), jax.random.key(0), np.array([None]), Pair(1, 2), times(2), optax, [times],
    functools.partial(times, 2), jax.jit(lambda x: x), {"a": [Colour]}], ids=range(11))
def test_what_has_no_digest_is_refused(value):
  with pytest.raises(digests.Undescribed, match="no digest is made of"):
    digests.digest(value)


def test_other_processes_come_to_the_same_digests():
  code = ("from jaxrl import digests; import optax, jax; print(digests.digest([{'a', 'b', 'c', 'd'}, "
          "optax.chain(optax.clip(1.0), optax.adamw(optax.cosine_decay_schedule(1.0, 5))), "
          "jax.tree.structure(optax.EmptyState())]))")
  found = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300,
                          env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}).stdout
           for seed in ("1", "2")}
  assert len(found) == 1 and len(found.pop().strip()) == 64
