"""Pairs may share one copy of their prompt too, and remain in one row: losses and gradients are the same."""

import jax
import numpy as np
import pytest

from configs import base
from jaxrl import config as configs
from jaxrl.batch import Trajectory, pack, shared_length
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


@pytest.mark.parametrize("term", [dpo, bradley_terry])
def test_losses_and_gradients_are_those_of_whole_sequences(term):
  params = unbox(init_parameters(MODEL, jax.random.key(0)))
  found = {}
  for name, batch in (("whole", packed()), ("shared", packed(trunk_length=8))):
    weights, means = loss_weights(batch, "sequence_mean"), mean_weights(batch, by_sequence=True)

    def loss(params):
      outputs = model_outputs(MODEL, params, batch, signals=("scores",), vocabulary_chunk=5)
      return sum_of_terms([term])(outputs, batch, weights, means)[0]
    found[name] = jax.device_get(jax.value_and_grad(loss)(params))
  for one, other in zip(*map(jax.tree.leaves, found.values()), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
  assert found["whole"][0] > 0


def settings(**batch):
  config = base.get_config()
  config.phases = ("it",)
  config.it = dict(kind="preference", steps=1)
  config.batch.update(examples=8, **batch)
  return configs.phase_config(config, "it")


@pytest.mark.parametrize("heads, answers, row, wanted", [
    ([32] * 8, [128] * 8, 192, 32),  # equal pairs: 160 tokens each instead of 192
    ([32] * 8, [20, 60, 100, 140, 180, 220, 240, 30], 384, 0),  # ragged ones would be padded
    ([4] * 8, [128] * 8, 136, 0)])  # short prompts
def test_prompts_are_shared_where_that_takes_less(toys, heads, answers, row, wanted):
  sizes = [2 * head + rest for head, rest in zip(heads, answers)]

  def shape(**batch):
    return shape_of(settings(row_length=row, **batch), DecoderConfig(vocab_size=50), toys.one_device(), sizes,
                    shared=[(head, (rest // 2, rest - rest // 2)) for head, rest in zip(heads, answers)])
  assert shape().layout.trunk_length == wanted
  assert shape(share_prompts=False).layout.trunk_length == 0
