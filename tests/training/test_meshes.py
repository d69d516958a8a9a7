"""One update on eight devices is the same update as on one, and takes the memory of a share."""

import contextlib

import jax
import numpy as np
import pytest

from jaxrl import sharding
from jaxrl.batch import pack
from jaxrl.batch import Trajectory
from jaxrl.sampling import Request
from jaxrl.sampling import Sampler
from jaxrl.sampling import SamplingParams
from jaxrl.training import loop
from jaxrl.training.learner import make_learner
from jaxrl.training.learner import to_micro_batches
from jaxrl.training.machine import CompileCounter

MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2)]
ROWS = 8


@pytest.fixture(scope="module")
def one_device(toys):
  """The update of each kind on one device: (gradient, parameters, metrics)."""
  found = {}
  for kind in ("sft", "grpo"):
    parts, learner, state, batch = setup(toys, kind, toys.one_device())
    state, metrics = learner.update(state, learner.prepare(state, batch)[1])
    found[kind] = jax.device_get((toys.gradient(state), state.params, metrics))
  return found


def setup(toys, kind, mesh):
  parts = toys.learning(kind)
  learner = make_learner(parts, toys.shardings(parts, mesh))
  host = pack(toys.rollouts(), row_length=16, rows_multiple=ROWS)
  return (parts, learner, toys.start(parts, mesh),
          sharding.put_batch(to_micro_batches(host, ROWS), mesh))


def bytes_on_first_device(tree):
  return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree)
             for shard in leaf.addressable_shards if shard.device == jax.devices()[0])


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_an_update_on_a_mesh_equals_that_of_one_device(toys, one_device, kind, shape):
  mesh = sharding.make_mesh(*shape)
  parts, learner, state, batch = setup(toys, kind, mesh)
  whole = sum(p.nbytes for p in jax.tree.leaves(toys.parameters(0)))
  with jax.set_mesh(mesh):
    prepared = learner.prepare(state, batch)[1]
    stored = loop.to_buffer(prepared)
    state, metrics = learner.update(state, prepared)
  toys.close(jax.device_get((toys.gradient(state), state.params, metrics)), one_device[kind])

  wanted = toys.shardings(parts, mesh)
  jax.tree.map(lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)), state,
               wanted)
  share = 1 / (shape[1] * shape[2])
  for tree in (state.params, toys.gradient(state), state.reference):
    assert tree is None or bytes_on_first_device(tree) <= (share + 0.05) * whole

  with jax.set_mesh(mesh):  # a batch that was in a checkpoint meets the same program
    begun = toys.start(parts, mesh), sharding.put_batch(loop.from_buffer(stored), mesh)
    jax.block_until_ready(begun)
    with contextlib.closing(CompileCounter()) as counter:
      again, _ = jax.block_until_ready(learner.update(*begun))
  assert counter.count == 0
  toys.same_bits(jax.device_get(again), jax.device_get(state))


@pytest.mark.parametrize("shape", MESHES[1:2], ids=str)
def test_sampler_and_trainer_agree_on_a_mesh(toys, shape):
  mesh = sharding.make_mesh(*shape)
  parts, learner, state, _ = setup(toys, "grpo", mesh)
  settings = SamplingParams(max_tokens=6, temperature=parts.temperature, stop_ids=(0,))
  requests = [Request(prompt=[1 + i, 2, 3][:1 + i % 3], n=2, key=(i,), params=settings)
              for i in range(8)]
  samples = Sampler(parts.decoder, mesh=mesh).sample(state.params["params"], requests,
                                                     jax.random.key(0))
  trajectories = []
  for group, (request, row) in enumerate(zip(requests, samples)):
    for index, sample in enumerate(row):
      prompt, count = len(request.prompt), len(sample.tokens)
      trajectories.append(Trajectory(
          tokens=[*request.prompt, *sample.tokens], group=group, reward=float(index),
          loss_mask=np.arange(prompt + count) >= prompt,
          behaviour_logprobs=np.concatenate([np.zeros(prompt), sample.logprobs])))
  host = pack(trajectories, row_length=16, rows_multiple=ROWS)
  with jax.set_mesh(mesh):
    batch = learner.prepare(state, sharding.put_batch(to_micro_batches(host, ROWS), mesh))[1]
    _, metrics = learner.update(state, batch)
  assert float(metrics["logprob_gap"]) < 1e-4
  assert float(metrics["grad_norm"]) > 1e-3
