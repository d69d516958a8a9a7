"""Settings that change over the updates of a phase: what they are then, and what is refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from jaxrl import sharding
from jaxrl.schedule import Schedule
from jaxrl.training import frozen, optimizers, pieces, run
from jaxrl.training.machine import CompileCounter

TEMPERATURE = dict(of="rollout.temperature", schedule="linear", start=1.5, end=0.5, steps=5)
RATE = dict(of="optimizer.learning_rate", schedule="stair-cycle", start=1e-3, end=3e-3, steps=4)


def letters(directory):
  """`a=` -> `a`, with two updates on each batch."""
  problems = directory / "letters.jsonl"
  problems.write_text("".join(json.dumps({"question": f"{x}=", "answer": x}) + "\n" for x in "abcdefgh"))
  config = base.get_config()
  config.data.train = str(problems)
  config.tokenizer.alphabet = "abcdefgh="
  config.model.update(layers=1, d_model=32, heads=2, kv_heads=1, d_ff=32)
  config.batch.row_length = 32
  config.rollout.update(prompts=8, max_tokens=4, updates=2, max_logprob_gap=1e-4,
                        episode=dict(name="group", samples=4))
  config.optimizer.warmup_steps = 1
  config.schedules = [TEMPERATURE, RATE]
  config.checkpoint.every = 0
  config.log.update(samples_every=0, curves_every=0)
  config.compilation_cache = "off"
  config.phases = ("rl",)
  config.rl = dict(kind="rl", steps=6)
  return config


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """Metrics of each update, and compilations after the first batch."""
  directory = tmp_path_factory.mktemp("letters")
  counter, compiled = CompileCounter(), []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    from jaxrl.training.reporting import Reporter
    step = Reporter.step
    patch.setattr(Reporter, "step", lambda self, *args: (compiled.append(counter.count), step(self, *args)))
    run.run(letters(directory), directory / "run", quiet=True)
  counter.close()
  found = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
  return [row for row in found if "loss" in row], compiled


def test_samples_are_drawn_and_read_at_the_temperature_of_their_batch(rows):
  """Otherwise log-probabilities of sampler and trainer would differ by far more than 1e-4."""
  metrics, _ = rows
  assert [row["temperature"] for row in metrics] == pytest.approx([1.5, 1.5, 1.1, 1.1, 0.7, 0.7])
  fresh = [row["logprob_gap"] for row in metrics[::2]]
  assert len(fresh) == 3 and max(fresh) < 1e-4


def test_the_learning_rate_follows_its_schedule_after_the_warm_up(rows):
  metrics, _ = rows
  assert [row["learning_rate"] for row in metrics] == pytest.approx(
      [3e-3 / 2, 3e-3, 1e-3, 1e-3, 3e-3, 3e-3], rel=1e-5)


def test_what_a_batch_drew_is_logged_once_for_both_of_its_updates(rows):
  metrics, _ = rows
  assert [row.get("sampled_sequences") for row in metrics] == [32, None] * 3


def test_no_temperature_needs_a_program_of_its_own(rows):
  _, compiled = rows
  assert len(compiled) == 6 and compiled[2] == compiled[-1]


def test_a_reference_keeps_the_share_of_itself_that_is_scheduled():
  share = Schedule("linear", start=0.9, end=0.1, steps=4)
  models = frozen.read({"every": 2}, {}, share)
  kept, expected = {"reference": {"w": jnp.float32(10.0)}}, 10.0
  for step in range(1, 7):
    policy = {"w": jnp.float32(step)}
    kept = frozen.refresh(models, kept, policy, policy, jnp.int32(step))
    if step % 2 == 0:
      decay = 0.9 - 0.8 * min(step - 1, 4) / 4
      expected = decay * expected + (1 - decay) * step
    np.testing.assert_allclose(kept["reference"]["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("specs,message", [
    ([{"of": "rollout.temperature"}], r"schedules\[0\].*needs a setting and a schedule"),
    ([dict(TEMPERATURE, of="rollout.temprature")], r"\[0\].of='rollout.temprature' cannot be scheduled"
     r".*'rollout.temperature'"),
    ([dict(TEMPERATURE, of="rollout.prompts")], "cannot be scheduled.*arguments of a piece can"),
    ([RATE, RATE], r"schedules\[1\].of='optimizer.learning_rate' has a schedule already"),
    ([dict(TEMPERATURE, end=0.0)], "rollout.temperature would be 0; it must be above 0"),
    ([dict(TEMPERATURE, of="reference.decay", end=0.5)], "reference.decay would be 1.5; it must be.*below 1"),
    ([dict(TEMPERATURE, stop=3)], r"schedules\[0\] has no field 'stop'")])
def test_what_cannot_be_scheduled_is_refused_with_its_place(specs, message):
  config = base.get_config()
  config.schedules = specs
  with pytest.raises(ValueError, match=message):
    pieces.schedules(config)


def test_two_schedules_of_the_learning_rate_are_refused():
  config = dict(base.get_config().optimizer, schedule="cosine")
  with pytest.raises(ValueError, match="leave one of them out"):
    optimizers.learning_rate(config, 10, Schedule("linear", start=1e-3, end=0.0, steps=10))
