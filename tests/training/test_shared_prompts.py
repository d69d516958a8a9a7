"""Sharing a prompt saves tokens and changes nothing else: every sequence computed alone agrees."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrl import sharding
from jaxrl.batch import Trajectory, pack, unpack
from jaxrl.models import DecoderConfig, init_parameters, model_outputs, unbox
from jaxrl.training.learner import make_learner, to_micro_batches
from jaxrl.training.machine import CompileCounter

SIGNALS = ("entropy", "hidden", "hidden@1", "values", "scores")
PLAIN = DecoderConfig(vocab_size=12, layers=2, d_model=16, heads=4, kv_heads=2, d_ff=32,
                      heads_on_top=(("value", 1), ("score", 1)))
DIALECTS = {
    "plain": PLAIN,
    "gemma": dataclasses.replace(
        PLAIN, layer_types=("sliding", "full"), sliding_window=4, attention_soft_cap=3.0,
        logit_soft_cap=5.0, rope_local_theta=100.0, qk_norm=True, norm_offset=True),
    "scanned": dataclasses.replace(PLAIN, scan_layers=True, remat="full"),
}


def groups(toys, seed=0, sizes=(5, 1, 3), prompts=(6, 1, 9), scored=True):
  """Ragged samples of three prompts; one sample has nothing to train on."""
  rng = np.random.default_rng(seed)
  found = []
  for group, (size, prompt) in enumerate(zip(sizes, prompts)):
    head = rng.integers(0, 12, prompt)
    for _ in range(size):
      length = prompt + int(rng.integers(1, 9))
      mask = np.arange(length) >= prompt
      mask[prompt + 1:] &= rng.random(length - prompt - 1) > 0.2  # as a tool's answer
      found.append(Trajectory(
          tokens=np.concatenate([head, rng.integers(0, 12, length - prompt)]), loss_mask=mask,
          behaviour_logprobs=np.where(mask, -2.5 + 0.3 * rng.normal(size=length), 0), group=group,
          reward=float(rng.integers(0, 3)), weight=rng.uniform(0.5, 2), prompt_length=prompt))
  if not scored:
    found[1] = dataclasses.replace(found[1], scored=False)
  return found


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("rows_per_trunk", [1, 2, 4])
def test_outputs_are_those_of_each_sequence_alone(toys, name, rows_per_trunk):
  config = DIALECTS[name]
  params = unbox(init_parameters(config, jax.random.key(0)))
  trajectories = groups(toys)
  batch = pack(trajectories, row_length=10, trunk_length=12, rows_per_trunk=rows_per_trunk,
               rows_multiple=rows_per_trunk)
  shared = model_outputs(config, params, batch, signals=SIGNALS, vocabulary_chunk=5)
  for item, t in enumerate(trajectories):
    alone = model_outputs(config, params, pack([t]), signals=SIGNALS)
    places = np.nonzero(batch.sequence_ids == item)
    assert len(places[0]) == len(t.tokens) - t.prompt_length
    for field in ("logprobs", *SIGNALS):
      np.testing.assert_allclose(
          np.asarray(shared.get(field))[places],
          np.asarray(alone.get(field))[0, t.prompt_length:len(t.tokens)], atol=2e-5,
          err_msg=f"{field} of sequence {item}")


def test_long_rows_are_attended_to_in_blocks_with_the_same_result(toys, monkeypatch):
  params = unbox(init_parameters(PLAIN, jax.random.key(0)))
  batches = {}
  for trunk, row in ((0, 32), (12, 24)):
    batch = pack(groups(toys), row_length=row, trunk_length=trunk)

    def logprobs(params):
      return model_outputs(PLAIN, params, batch).logprobs
    for block in (1024, 7):
      monkeypatch.setattr("jaxrl.models.packed_attention.BLOCK", block)
      gradient = jax.grad(lambda p: (logprobs(p) ** 2).sum())(params)
      batches[block] = jax.device_get((logprobs(params), gradient))
    toys.close(batches[7], batches[1024])


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 4, 2)], ids=str)
def test_updates_equal_those_of_whole_sequences(toys, shape, scored):
  """Over micro-batches, a reference, group statistics and sequence-level ratios."""
  trajectories = groups(toys, scored=scored)
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[:np.prod(shape)])
  parts = toys.learning("grpo")
  learner = make_learner(parts, toys.shardings(parts, mesh))
  found = {}
  for name, packing, rows in (("whole", dict(row_length=20), 8),
                              ("shared", dict(row_length=10, trunk_length=9, rows_per_trunk=2), 8)):
    host = to_micro_batches(pack(trajectories, rows_multiple=rows, **packing), rows)
    state = toys.start(parts, mesh)
    with jax.set_mesh(mesh):
      state, metrics = learner.update(
          state, learner.prepare(state, sharding.put_batch(host, mesh))[1])
      found[name] = jax.device_get((toys.gradient(state), metrics))
  toys.close(found["shared"], found["whole"])


@pytest.mark.parametrize("streams", [2, 3])
def test_streams_and_micro_batches_add_up_to_the_same_gradient(toys, streams):
  found = {}
  for count, rows in ((1, 16), (streams, 4), (streams, 2)):
    parts = toys.learning("grpo", streams=count)
    learner = make_learner(parts, toys.shardings(parts, toys.one_device()))
    host = pack(groups(toys), row_length=10, trunk_length=9, rows_per_trunk=2, rows_multiple=rows)
    batch = sharding.put_batch(to_micro_batches(host, rows), toys.one_device())
    counter = CompileCounter()
    for _ in range(2):  # one part after the other, then in threads
      state = toys.start(parts)
      prepared = learner.prepare(state, batch)[1]
      measured = learner.measure(state, prepared)
      state, metrics = learner.update(state, prepared)
      for name, value in measured.items():
        np.testing.assert_allclose(value, metrics[name], rtol=1e-5, atol=1e-7)
      found.setdefault((count, rows), []).append(jax.device_get((toys.gradient(state), metrics)))
    counter.close()
    assert counter.programs["jit(_update)"] == counter.programs["jit(_signals)"] == 1
    assert counter.programs["jit(_sums)"] == counter.programs["jit(_outputs)"] == (count > 1)
    first, found[count, rows] = found[count, rows]
    jax.tree.map(np.testing.assert_array_equal, first, found[count, rows])
  expected = found.pop((1, 16))
  for other in found.values():
    toys.close(other, expected)


def test_packing_keeps_every_sequence_and_stores_a_prompt_once(toys):
  trajectories = groups(toys, sizes=(6, 4), prompts=(7, 3))
  batch = pack(trajectories, row_length=16, trunk_length=8, rows_per_trunk=4, rows_multiple=4)
  assert batch.trunk_tokens.shape == (2, 8)
  assert batch.trunk_lengths.tolist() == [7, 3]
  assert (batch.segment_ids != 0).sum() == sum(len(t.tokens) - t.prompt_length
                                               for t in trajectories)
  for found, expected in zip(unpack(batch), trajectories, strict=True):
    for field in ("tokens", "loss_mask", "behaviour_logprobs"):
      np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    assert (found.group, found.reward) == (expected.group, expected.reward)


def test_prompts_and_responses_longer_than_expected_still_fit(toys):
  trajectories = groups(toys, prompts=(6, 1, 40))
  batch = pack(trajectories, row_length=4, trunk_length=4)
  assert batch.trunk_tokens.shape[1] == 64
  assert batch.tokens.shape[1] == 8
  assert [len(t.tokens) for t in unpack(batch)] == [len(t.tokens) for t in trajectories]


def test_rows_of_a_trunk_are_never_torn_apart(toys):
  with pytest.raises(ValueError, match="rows_multiple=6 .* rows_per_trunk=4"):
    pack(groups(toys), row_length=16, trunk_length=9, rows_per_trunk=4, rows_multiple=6)
  host = pack(groups(toys), row_length=16, trunk_length=9, rows_per_trunk=4, rows_multiple=4)
  with pytest.raises(ValueError, match="micro-batches of 2 rows"):
    to_micro_batches(host, 2)


def test_a_sequence_without_anything_to_train_on_does_not_deepen_the_trunks():
  """An unscored one is all prompt, and is not packed."""
  trained = Trajectory([1] * 30 + [2] * 5, np.arange(35) >= 30, group=0)
  unscored = dataclasses.replace(trained, tokens=np.array([1] * 30 + [2] * 60),
                                 loss_mask=np.arange(90) >= 30, behaviour_logprobs=np.zeros(90),
                                 turn_ids=np.zeros(90), tag_ids=np.zeros(90), scored=False)
  batch = pack([trained, unscored], row_length=64, trunk_length=32)
  assert batch.trunk_tokens.shape[1] == 32 and batch.tokens.shape[1] == 64
