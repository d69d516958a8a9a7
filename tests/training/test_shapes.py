"""Shapes of batches, decided in advance: cheap for typical batches, large enough for the largest."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from configs import base
from jaxrl import config as configs
from jaxrl import sharding
from jaxrl.batch import Layout, Task, Trajectory
from jaxrl.models import DecoderConfig
from jaxrl.training.shapes import shape_of

DECODER = DecoderConfig(vocab_size=50)


def settings(kind="rl", prompts=4, samples=8, max_tokens=64, **batch):
  config = base.get_config()
  config.phases = ("it",)
  config.it = dict(kind=kind, steps=1)
  config.rollout.update(prompts=prompts, episode=dict(name="group", samples=samples),
                        max_tokens=max_tokens)
  config.batch.update(batch)
  return configs.phase_config(config, "it")


def tasks(*lengths):
  return [Task(id=str(i), prompt=[1 + i] * n) for i, n in enumerate(lengths)]


def rollouts(prompts, responses):
  """Samples of given lengths of each prompt."""
  return [Trajectory([*task.prompt, *[2] * n], np.arange(len(task.prompt) + n) >= len(task.prompt),
                     group=group)
          for group, (task, lengths) in enumerate(zip(prompts, responses)) for n in lengths]


def test_a_long_prompt_is_computed_once_for_its_samples(toys):
  shape = shape_of(settings(), DECODER, toys.one_device(), [512])
  assert shape.layout.trunk_length == 512
  batch = shape.pack(rollouts(tasks(512), [[64] * 8]))
  trunks = int((batch.trunk_lengths > 0).sum())
  assert trunks * 512 + (batch.segment_ids != 0).sum() <= 2 * 512 + 8 * 64  # of 8 * 576 = 4608


@pytest.mark.parametrize("changes", [dict(share_prompts=False), dict(samples=1)], ids=str)
def test_nothing_is_shared_where_it_is_not_wanted_or_of_no_use(toys, changes):
  shape = shape_of(settings(row_length=1024, **changes), DECODER, toys.one_device(), [512])
  assert shape.layout == Layout(1024)


def test_short_prompts_before_long_answers_are_not_worth_a_trunk(toys):
  shape = shape_of(settings(max_tokens=1000, row_length=1024), DECODER, toys.one_device(), [8])
  assert shape.layout == Layout(1024)


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.lists(st.integers(1, 40), min_size=4, max_size=4),
                  st.lists(st.lists(st.integers(1, 24), min_size=5, max_size=5), min_size=4,
                           max_size=4), st.booleans())
def test_no_batch_within_the_limits_is_larger_than_expected(toys, prompts, responses, share):
  """Whatever lengths are drawn, all batches are of one shape, so nothing compiles twice."""
  drawn = tasks(*prompts)
  shape = shape_of(settings(samples=5, max_tokens=24, share_prompts=share, row_length=64), DECODER,
                   toys.one_device(), prompts)
  largest = shape.pack(rollouts(drawn, [[24] * 5] * 4))
  batch = shape.pack(rollouts(drawn, responses))
  assert batch.tokens.shape == largest.tokens.shape
  assert batch.trunk_tokens.shape == largest.trunk_tokens.shape
  assert batch.num_sequences == largest.num_sequences == 32


def test_rows_at_a_time_are_whole_trunks_on_every_device(toys):
  mesh = toys.one_device()
  for wanted in (0, 3, 8):
    shape = shape_of(settings(micro_batch_rows=wanted), DECODER, mesh, [512])
    assert shape.micro_batch_rows % shape.layout.rows_per_trunk == 0
    assert shape.micro_batch_rows >= max(wanted, 1)


def test_a_wider_model_takes_fewer_rows_at_a_time(toys):
  wide = DecoderConfig(vocab_size=50, d_model=512, d_ff=2048)
  narrow, wide = (shape_of(settings(kind="sft", row_length=64), decoder, toys.one_device(), [])
                  for decoder in (DECODER, wide))
  assert wide.micro_batch_rows < narrow.micro_batch_rows


def test_unknown_prompts_are_taken_to_be_as_long_as_they_may_be(toys):
  """All first rows of the data may have been skipped."""
  shape = shape_of(settings(), DECODER, toys.one_device(), [])
  assert shape.layout.trunk_length == 256


@pytest.mark.parametrize("examples", [1, 3, 12, 16, 17, 31, 32, 40, 100])
@pytest.mark.parametrize("cores", [1, 2, 4])
def test_loops_over_micro_batches_compute_few_rows_beside_those_expected(toys, monkeypatch, examples, cores):
  """10 rows at a time would make two micro-batches for each of two loops of 32 rows, 40 in all."""
  monkeypatch.setattr("jaxrl.sharding.streams", lambda mesh: cores)
  these = settings(kind="sft", row_length=96)
  these.data.update(max_prompt_tokens=2, max_completion_tokens=94)
  these.batch.examples = examples
  found = shape_of(these, DECODER, toys.one_device(), []).micro_batch_rows
  these.data.max_completion_tokens = 0  # rows unknown
  most = shape_of(these, DECODER, toys.one_device(), []).micro_batch_rows
  assert 1 <= found <= most == 10
  computed = {each: -(-examples // (each * cores)) * each * cores for each in range(1, most + 1)}
  assert all(computed[found] <= computed[each] for each in range(most // 2 + 1, most + 1))
  assert found > most // 2 or found * cores >= examples, "smaller ones do not use a core well"
  if (examples, cores) == (32, 2):
    assert found == 8


def test_tokens_that_see_more_keys_are_fewer_at_a_time(toys):
  def tokens(length):
    these = settings(kind="sft", row_length=length)
    these.data.max_completion_tokens = 0  # rows unknown
    return length * shape_of(these, DECODER, toys.one_device(), []).micro_batch_rows
  assert tokens(96) > tokens(192) >= tokens(384)


@pytest.mark.parametrize("lengths, row, wanted", [
    ([192] * 8, 192, 192),  # nothing to gain
    ([100, 200] * 4, 384, 400),
    ([30] * 8, 128, 128), ([], 128, 128),
    ([300] * 8, 128, 608)])  # 512 hold one
def test_rows_of_pairs_are_as_long_as_fills_them_best(toys, lengths, row, wanted):
  these = settings("preference", row_length=row, share_prompts=False, examples=8)
  assert shape_of(these, DECODER, toys.one_device(), lengths).layout == Layout(wanted)


@pytest.mark.parametrize("kind, data, expected", [
    ("sft", {}, 24), ("reward", {}, 24), ("reward", dict(critique="why"), 40), ("rl", {}, 0),
    ("sft", dict(max_prompt_tokens=0), 0), ("sft", dict(max_completion_tokens=0), 0)])
def test_limits_of_the_data_are_limits_of_sequences(kind, data, expected):
  s = settings(kind)
  s.data.update({**dict(max_prompt_tokens=8, max_completion_tokens=16), **data})
  shape = shape_of(s, DECODER, sharding.make_mesh(), [8])
  assert shape.longest == expected == shape.pack([]).longest
