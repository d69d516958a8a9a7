"""States: where their arrays live, what they start from, what a restore fills in."""

import jax
import optax
import pytest

from jaxrl import sharding
from jaxrl.training import state as states


def key(seed):
  return jax.random.key_data(jax.random.key(seed))


def test_parameters_do_not_depend_on_the_mesh(toys):
  found = states.initial_parameters(toys.decoder, key(0), sharding.make_mesh(2, 2, 2))
  toys.close(found, toys.parameters(0), rtol=1e-6)


@pytest.mark.parametrize("frozen", [(), ("reference", "average")])
def test_abstract_state_describes_the_real_one(toys, frozen):
  mesh, optimizer = sharding.make_mesh(2, 2, 2), optax.adamw(1e-3)
  abstract = states.abstract_state(toys.decoder, mesh, optimizer, frozen=frozen)
  params = toys.parameters(0)
  real = jax.jit(lambda p: states.start_phase(p, key(0), optimizer, frozen=frozen),
                 out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(params)
  assert jax.tree.structure(real) == jax.tree.structure(abstract)
  for x, y in zip(jax.tree.leaves(real), jax.tree.leaves(abstract)):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
  moments = real.opt_state[0].mu
  for x, y in zip(jax.tree.leaves(moments), jax.tree.leaves(real.params)):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_a_phase_starts_from_zero_with_a_reference_of_its_own(toys):
  params = jax.device_put(toys.parameters(0), toys.one_device().devices.item())
  state = states.start_phase(params, key(7), optax.sgd(0.1), frozen=("reference",))
  assert [int(x) for x in (state.step, state.bad_steps, state.skipped_steps)] == [0, 0, 0]
  toys.same_bits(state.reference, params)
  for mine, theirs in zip(jax.tree.leaves(state.reference), jax.tree.leaves(params)):
    assert mine.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()
  assert states.start_phase(params, key(7), optax.sgd(0.1)).reference is None
