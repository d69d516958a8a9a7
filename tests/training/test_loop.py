"""The loop: stopping anywhere and going on is the same as never stopping; what ends a phase."""

import dataclasses
import math
import weakref

import jax
import numpy as np
import pytest

from jaxrl import sharding
from jaxrl.batch import Layout
from jaxrl.batch import pack
from jaxrl.models import model_outputs
from jaxrl.training import loop
from jaxrl.training import streams
from jaxrl.training.checkpoints import Checkpoints
from jaxrl.training.learner import make_learner
from jaxrl.training.shapes import Shape
from jaxrl.training.supply import Supplied

STEPS, ROWS = 7, 4


class Supply:
  """Random trajectories that the current policy has (as good as) sampled; counts its batches."""

  sampled = True

  def __init__(self, toys, parts, edit=lambda number, trajectories: None):
    self.made, self.prefetched, self._rollouts, self._edit = 0, [], toys.rollouts, edit

    def logprobs(params, batch):
      return model_outputs(parts.decoder, params, batch, temperature=parts.temperature).logprobs
    self._logprobs = jax.jit(logprobs)

  def next(self, params, step, reference=None):
    trajectories = self._rollouts(1000 * self.made)
    for t in trajectories:
      batch = pack([t], row_length=16)
      found = np.asarray(self._logprobs(params, batch))[0, :len(t.tokens)]
      t.behaviour_logprobs = np.where(t.loss_mask, found, 0).astype(np.float32)
    self._edit(self.made, trajectories)
    self.made += 1
    return Supplied(trajectories, {"reward": float(self.made), "made_at": step})

  def prefetch(self):
    self.prefetched.append(self.made)

  def get_state(self):
    return {"made": self.made}

  def set_state(self, state):
    self.made = state["made"]


class Killed(BaseException):
  """Stands for a kill: nothing catches it."""


class Recorder:
  """Keeps what a reporter is told; dies at the update `kill_at`, after recording it."""

  def __init__(self, kill_at=math.inf):
    self.rows, self.notes, self.drawn, self._kill_at = [], [], 0, kill_at

  def step(self, step, phase, metrics):
    self.rows.append({"step": step, "phase": phase, **metrics})
    if step == self._kill_at:
      raise Killed

  def note(self, message):
    self.notes.append(message)

  def draw(self):
    self.drawn += 1

  def samples(self, *_):
    raise AssertionError("samples_every is 0")


@pytest.fixture(scope="module")
def phase_of(toys):
  """`phase_of(edit, **changes)`: a phase of seven updates, two on each batch."""
  parts = toys.learning("grpo", optimizer=toys.gradient_keeper(0.1))
  learner = make_learner(parts, toys.shardings(parts, toys.one_device()))

  def make(edit=lambda number, trajectories: None, **changes):
    return loop.PhaseRun(**{**dict(
        name="rl", steps=STEPS, supply=Supply(toys, parts, edit), learner=learner,
        updates_per_batch=2, shape=Shape(Layout(32), ROWS), mesh=toys.one_device(), max_bad_steps=3,
        max_logprob_gap=0.01,
        validate=None, validate_every=0, until=None, checkpoint_every=3, samples_every=0,
        curves_every=0), **changes})
  make.start = lambda: toys.start(parts)
  return make


def train(phase, checkpoints, start, kill_at=math.inf):
  """Continues from the newest checkpoint, or starts -> (state or None if killed, recorder)."""
  recorder = Recorder(kill_at)
  restored = checkpoints.restore_latest(jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), start))
  progress, state, buffer = loop.Progress(), start, None
  if restored:
    progress, state, buffer = loop.Progress(**restored.host), restored.state, restored.buffer
  try:
    state = loop.train(phase, state, progress, buffer, reporter=recorder, checkpoints=checkpoints)
  except Killed:
    state = None
  finally:
    checkpoints.wait()
  return state, recorder, progress


def without_times(rows):
  return [{k: v for k, v in row.items() if k not in ("step_seconds", "tokens_per_second")}
          for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(phase_of, tmp_path_factory):
  checkpoints = Checkpoints(tmp_path_factory.mktemp("whole"))
  state, recorder, progress = train(phase_of(), checkpoints, phase_of.start())
  checkpoints.close()
  return jax.device_get(state), recorder.rows, progress


@pytest.mark.parametrize("kill_at", range(1, STEPS + 1))
def test_a_kill_after_any_update_changes_no_bit(toys, phase_of, uninterrupted, tmp_path, kill_at):
  checkpoints = Checkpoints(tmp_path)
  killed, first, _ = train(phase_of(), checkpoints, phase_of.start(), kill_at)
  state, second, _ = train(phase_of(), checkpoints, phase_of.start())
  checkpoints.close()
  assert killed is None
  toys.same_bits(state, uninterrupted[0])
  rows = [r for r in first.rows if r["step"] < second.rows[0]["step"]] + second.rows
  assert without_times(rows) == without_times(uninterrupted[1])
  assert kill_at - second.rows[0]["step"] < 3  # since the last checkpoint


def test_batches_are_used_twice_and_only_then_replaced(uninterrupted):
  rows = uninterrupted[1]
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  assert [row["made_at"] for row in rows] == [0, 0, 2, 2, 4, 4, 6]
  assert [row["reward"] for row in rows] == [1, 1, 2, 2, 3, 3, 4]


def test_the_next_batch_is_prefetched_while_the_last_update_on_one_runs(phase_of, tmp_path):
  """Once for each batch but the last; and what waits for an update is not kept beyond it."""
  phase, waiting = phase_of(), []

  class Held:
    """Stands for what the parts of an update hold."""

  class Update:
    def begin(self, state, batch):
      had, held = len(phase.supply.prefetched), Held()
      alive, finish = weakref.ref(held), streams.begin(learner.update, state, batch)

      def wait(held=held):
        waiting.append((len(phase.supply.prefetched) - had, alive))
        return finish()
      return wait

  def validate(state, step):
    assert waiting[-1][1]() is None
    return {}
  learner = phase.learner
  phase = dataclasses.replace(phase, learner=dataclasses.replace(learner, update=Update()), validate=validate,
                              validate_every=1)
  checkpoints = Checkpoints(tmp_path)
  train(phase, checkpoints, phase_of.start())
  checkpoints.close()
  assert [made for made, _ in waiting] == [0, 1, 0, 1, 0, 1, 0]
  assert phase.supply.prefetched == [1, 2, 3] and phase.supply.made == 4


def test_the_gap_to_the_sampler_is_only_reported_before_the_policy_has_moved(uninterrupted):
  rows = uninterrupted[1]
  assert ["logprob_gap" in row for row in rows] == [True, False] * 3 + [True]
  assert all(row["logprob_gap"] < 1e-4 for row in rows[::2])
  assert all(abs(row["ratio"] - 1) < 1e-5 for row in rows[::2])
  assert all(abs(row["ratio"] - 1) > 1e-5 for row in rows[1::2])


def test_every_row_has_what_the_curves_and_the_readers_need(uninterrupted):
  for row in uninterrupted[1]:
    assert {"step", "phase", "phase_step", "loss", "reward", "kl", "entropy", "clip_fraction",
            "tokens_per_second", "grad_norm", "learning_rate", "tokens", "loss_tokens"} <= set(row)
    assert 0 < row["packing_efficiency"] <= 1
    assert all(math.isfinite(v) for v in row.values() if not isinstance(v, str))
  assert uninterrupted[2].seconds["rl"] > 0


def test_a_buffer_is_the_batch(toys, phase_of):
  batch = pack(toys.rollouts(), row_length=32)
  batch = batch.replace(columns={"length": batch.rewards + 1}).with_signals(advantages=batch.tokens)
  found = loop.from_buffer(loop.to_buffer(batch))
  assert jax.tree.structure(found) == jax.tree.structure(batch)
  toys.same_bits(found, batch)


def test_no_trajectories_are_an_update_without_gradient(toys, phase_of, tmp_path):
  def lose_all(number, trajectories):
    if number == 1:
      trajectories.clear()
  checkpoints = Checkpoints(tmp_path)
  state, recorder, _ = train(phase_of(lose_all, steps=4), checkpoints, phase_of.start())
  checkpoints.close()
  assert [row["grad_norm"] > 0 for row in recorder.rows] == [True, True, False, False]
  assert recorder.rows[2]["tokens"] == 0 and int(state.step) == 4


def test_gradients_that_stay_bad_stop_the_run_and_the_last_checkpoint_is_named(
    toys, phase_of, tmp_path):
  def spoil(number, trajectories):
    if number >= 2:  # from update 5 on
      trajectories[0].weight = math.nan
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(loop.TrainingFailure) as failure:
    train(phase_of(spoil), checkpoints, phase_of.start())
  checkpoints.close()
  message = str(failure.value)
  assert "3 updates in a row" in message and "up to update 7" in message
  assert "the last good checkpoint is that of update 3" in message


def test_a_few_bad_gradients_are_survived(phase_of, tmp_path):
  def spoil(number, trajectories):
    if number == 1:
      trajectories[0].weight = math.nan
  checkpoints = Checkpoints(tmp_path)
  _, recorder, _ = train(phase_of(spoil), checkpoints, phase_of.start())
  checkpoints.close()
  assert [row["bad_steps"] for row in recorder.rows] == [0, 0, 1, 2, 0, 0, 0]
  assert [row["skipped_steps"] for row in recorder.rows] == [0, 0, 1, 2, 2, 2, 2]


def test_a_sampler_that_disagrees_stops_the_first_update(phase_of, tmp_path):
  def shift(number, trajectories):
    trajectories[1].behaviour_logprobs = trajectories[1].behaviour_logprobs - 0.02
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(loop.TrainingFailure, match="disagree.*by 0.02.*max_logprob_gap=0.01"):
    train(phase_of(shift), checkpoints, phase_of.start())
  checkpoints.close()


def test_a_phase_ends_when_validation_is_good_enough(phase_of, tmp_path):
  seen = []

  def validate(params, step):
    seen.append(step)
    return {"greedy_accuracy": step / 10}
  phase = phase_of(validate=validate, validate_every=2, until=("greedy_accuracy", 0.35))
  checkpoints = Checkpoints(tmp_path)
  state, recorder, progress = train(phase, checkpoints, phase_of.start())
  assert seen == [2, 4] and int(state.step) == 4 and progress.ended
  assert [row.get("validation/greedy_accuracy") for row in recorder.rows] == [None, 0.2, None, 0.4]
  assert "greedy_accuracy reached 0.400 at update 4" in recorder.notes[0]
  again, recorder, _ = train(phase, checkpoints, phase_of.start())  # a phase that ended stays so
  checkpoints.close()
  assert int(again.step) == 4 and not recorder.rows


def test_curves_are_drawn_and_checkpoints_saved_as_often_as_asked(phase_of, tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=10)
  _, recorder, _ = train(phase_of(curves_every=3), checkpoints, phase_of.start())
  checkpoints.close()
  assert recorder.drawn == 2
  assert sorted(int(p.name) for p in tmp_path.iterdir()) == [3, 6, 7]


def test_a_batch_between_two_updates_says_which_meshes_it_continues_on(toys, phase_of, tmp_path):
  phase = dataclasses.replace(phase_of(), mesh=sharding.make_mesh(8))
  progress = loop.Progress(updates=1, updates_left=1)
  buffer = loop.to_buffer(pack(toys.rollouts()[:2], row_length=32))  # one row
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(ValueError, match=r"of 1 x 1 rows, .* = 8 devices: continue on a mesh"):
    loop.train(phase, phase_of.start(), progress, buffer, reporter=None, checkpoints=checkpoints)
  checkpoints.close()
