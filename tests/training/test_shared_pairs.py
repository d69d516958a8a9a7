"""Pairs may share one copy of their prompt too, and remain in one row: losses and gradients are the same."""

import jax
import numpy as np
import pytest

from configs import base
from jaxrl import config as configs
from jaxrl.batch import Layout, Trajectory, pack, shared_length
from jaxrl.models import DecoderConfig, init_parameters, model_outputs, unbox
from jaxrl.objectives import bradley_terry, dpo
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms
from jaxrl.training.shapes import shape_of

MODEL = DecoderConfig(vocab_size=12, layers=1, d_model=16, heads=2, kv_heads=1, d_ff=16,
                      heads_on_top=(("score", 1),))


def sequences():
  """Three pairs, of which one has prompts that part after two tokens, and a sequence nobody scored."""
  rng, found = np.random.default_rng(0), []
  for group, (prompt, parts) in enumerate(((6, False), (3, False), (5, True))):
    head = rng.integers(0, 12, prompt)
    for side in (1.0, 0.0):
      n = int(rng.integers(2, 8))
      own = head if not parts or side else np.concatenate([head[:2], (head[2:] + 1) % 12])
      found.append(Trajectory(
          np.concatenate([own, rng.integers(0, 12, n)]), np.arange(prompt + n) >= prompt, group=group,
          columns=dict(preference=side), signals=dict(reference_logprobs=rng.uniform(-3, 0, prompt + n))))
  stray = found[0]
  found.append(Trajectory(stray.tokens, stray.loss_mask, group=9, scored=False, columns=stray.columns,
                          signals=stray.signals))
  return found


def packed(**trunks):
  return pack(sequences(), row_length=24, together=True, rows_multiple=2, **trunks)


def test_a_group_shares_what_all_of_it_begins_with():
  found = sequences()
  assert [shared_length(found[i:i + 2]) for i in (0, 2, 4)] == [6, 3, 2]
  batch = packed(trunk_length=8)
  assert sorted(batch.trunk_lengths[batch.trunk_lengths > 0].tolist()) == [2, 3, 6]
  for i in (0, 2, 4):
    rows = [set(np.nonzero(batch.sequence_ids == item)[0]) for item in (i, i + 1)]
    assert rows[0] == rows[1] and len(rows[0]) == 1
  assert (batch.segment_ids != 0).sum() == sum(len(t.tokens) for t in found) - 2 * (6 + 3 + 2) - 6
  assert (batch.sequence_ids == 6).sum() == len(found[6].tokens) - 6  # unscored, and stored


@pytest.mark.parametrize("length", [8, 4, 24])
def test_the_rows_of_a_trunk_hold_a_group_together(length):
  """Answers in rows of their own, side by side, or where they are too long in longer rows: in one unit."""
  found = sequences()
  batch = pack(found, row_length=length, together=True, rows_multiple=4, trunk_length=8, rows_per_trunk=2)
  assert batch.rows_per_trunk == 2
  answers = [len(t.tokens) for t in found]
  for items, head in (((0, 1), 6), ((2, 3), 3), ((4, 5), 2), ((6,), 6)):
    places = [np.nonzero(batch.sequence_ids == item) for item in items]
    rows = [set(rows) for rows, _ in places]
    assert all(len(own) == 1 for own in rows) and len({row // 2 for own in rows for row in own}) == 1
    [unit] = {row // 2 for own in rows for row in own}
    assert batch.trunk_lengths[unit] == head
    for item, at in zip(items, places):
      assert batch.tokens[at].tolist() == found[item].tokens[head:].tolist()
      assert batch.positions[at].tolist() == list(range(head, answers[item]))


def test_a_group_that_does_not_fit_the_rows_of_a_trunk_makes_them_longer():
  three = [Trajectory(np.arange(1, 3 + n), np.arange(n + 2) >= 2, group=0, columns=dict(preference=0.0))
           for n in (9, 9, 9)]
  batch = pack(three, row_length=12, together=True, rows_multiple=2, trunk_length=2, rows_per_trunk=2)
  assert batch.tokens.shape == (2, 32) and (batch.segment_ids != 0).sum(axis=1).tolist() == [27, 0]


def test_without_trunks_a_group_fills_one_row():
  pair = [Trajectory(np.arange(1, 10), np.arange(9) > 0, group=0, columns=dict(preference=0.0)) for _ in range(2)]
  batch = pack(pair, row_length=12, together=True, rows_multiple=2, rows_per_trunk=2)
  assert batch.tokens.shape == (2, 32) and (batch.segment_ids != 0).sum(axis=1).tolist() == [18, 0]


@pytest.mark.parametrize("term", [dpo, bradley_terry])
def test_losses_and_gradients_are_those_of_whole_sequences(term):
  params = unbox(init_parameters(MODEL, jax.random.key(0)))
  found = {}
  in_rows = pack(sequences(), row_length=12, together=True, rows_multiple=4, trunk_length=8, rows_per_trunk=2)
  for name, batch in (("whole", packed()), ("shared", packed(trunk_length=8)), ("in rows", in_rows)):
    weights, means = loss_weights(batch, "sequence_mean"), mean_weights(batch, by_sequence=True)

    def loss(params):
      outputs = model_outputs(MODEL, params, batch, signals=("scores",), vocabulary_chunk=5)
      return sum_of_terms([term])(outputs, batch, weights, means)[0]
    found[name] = jax.device_get(jax.value_and_grad(loss)(params))
  for name in ("shared", "in rows"):
    for one, other in zip(*map(jax.tree.leaves, (found["whole"], found[name])), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
  assert found["whole"][0] > 0


def settings(**batch):
  config = base.get_config()
  config.phases = ("it",)
  config.it = dict(kind="preference", steps=1)
  config.batch.update(examples=8, **batch)
  return configs.phase_config(config, "it")


@pytest.mark.parametrize("heads, answers, row, wanted", [
    ([32] * 8, [(64, 64)] * 8, 192, (64, 32, 2)),  # equal pairs: 160 tokens each instead of 192
    ([32] * 8, [(112, 16), (16, 112)] * 4, 192, (128, 32, 1)),  # one answer is short, the pair is not
    ([32] * 8, [(n, n) for n in (10, 30, 50, 70, 90, 110, 120, 15)], 384, (392, 0, 1)),  # would be padded
    ([4] * 8, [(64, 64)] * 8, 136, (136, 0, 1)),  # short prompts
    ([0] * 8, [(64, 64)] * 8, 192, (192, 0, 1))])  # pairs that have no prompt in common
def test_prompts_are_shared_where_that_takes_less(toys, heads, answers, row, wanted):
  sizes = [2 * head + sum(pair) for head, pair in zip(heads, answers)]

  def shape(**batch):
    return shape_of(settings(row_length=row, **batch), DecoderConfig(vocab_size=50), toys.one_device(), sizes,
                    shared=list(zip(heads, answers)))
  found = shape()
  assert found.layout == Layout(*wanted)
  assert found.rows >= 8 * found.layout.rows_per_trunk if found.layout.trunk_length else found.rows > 0
  assert shape(share_prompts=False).layout.trunk_length == 0
