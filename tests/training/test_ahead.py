"""Batches sampled ahead: the schedule is kept to the bit, whatever threads, devices or kills do."""

import contextlib
import json
import math
import pathlib
import random
import threading
import time
import types

import jax
import numpy as np
import pytest

from jaxrl import config as configs
from jaxrl import data
from jaxrl import sharding
from jaxrl.batch import Layout, Task, pack
from jaxrl.rewards import Criterion, Scored
from jaxrl.rollouts import Rollouts, group
from jaxrl.sampling import Sampler, SamplingParams
from jaxrl.training import builders, hostfile, loop, stored, transfer
from jaxrl.training import phases as phase_lib
from jaxrl.training.ahead import Ahead
from jaxrl.training.checkpoints import Checkpoints
from jaxrl.training.learner import make_learner, to_micro_batches
from jaxrl.training.shapes import Shape
from jaxrl.training.supply import GroupsOfRollouts, Supplied

ROWS, ROW_LENGTH = 8, 16
TOKENIZER = data.CharacterTokenizer("012345678")
CLOCKS = ("step_seconds", "tokens_per_second", "rollout_seconds", "wait_seconds", "wait_fraction",
          "copy_seconds")


class Tasks:
  """An endless stream of one-digit problems."""

  def __init__(self):
    self.drawn = 0

  def __next__(self):
    self.drawn += 1
    digit = self.drawn * 7 % 9
    return Task(f"task-{self.drawn}", [1, 3 + digit], question=str(digit), answer=str(8 - digit))

  def get_state(self):
    return {"drawn": self.drawn}

  def set_state(self, state):
    self.drawn = state["drawn"]


class Judge:
  """Rewards the number of different tokens."""

  has_workers = False

  def score(self, pairs, *, among=0):
    return [Scored(r, True, {"different": Criterion(r, detail=task.answer)}) for task, r in
            ((task, float(len(set(t.tokens.tolist())))) for task, t in pairs)]


async def four(ctx, task):
  return await group(ctx, task, samples=4)


def groups(parts, mesh, **options):
  rollouts = Rollouts(four, Sampler(parts.decoder, mesh=mesh), TOKENIZER, Judge(),
                      sampling=SamplingParams(max_tokens=5, temperature=parts.temperature,
                                              stop_ids=(2,)))
  return GroupsOfRollouts(Tasks(), rollouts, **dict(
      prompts=4, base_key=jax.random.key(3), key=(0, 0), filter_zero_variance=True,
      max_resample=1) | options)


class Recorder:
  """Keeps what a reporter is told; raises `Killed` at an update."""

  def __init__(self, kill_at=math.inf):
    self.rows, self.answers, self._kill_at = [], [], kill_at

  def step(self, step, phase, metrics):
    self.rows.append({k: v for k, v in metrics.items() if k not in CLOCKS})
    if step == self._kill_at:
      raise Killed

  def samples(self, phase, step, rows):
    self.answers += [dict(row, step=step) for row in rows]

  def note(self, message):
    pass


class Killed(BaseException):
  """Stands for a kill: nothing catches it."""


class World:
  """A trainer on one mesh and a sampler on another."""

  def __init__(self, toys, mesh=None, sampling_mesh=None):
    self.toys, self.mesh = toys, mesh or toys.one_device()
    self.sampling_mesh = sampling_mesh or self.mesh
    self.parts = toys.learning("grpo", optimizer=toys.gradient_keeper(0.02))
    shardings = toys.shardings(self.parts, self.mesh)
    self.learner = make_learner(self.parts, shardings)
    self.copy = transfer.copier(shardings.params, self.sampling_mesh)

  def start(self):
    return self.toys.start(self.parts, self.mesh)

  def supply(self, staleness, updates, steps, wrap=lambda supply: supply):
    return Ahead(wrap(groups(self.parts, self.sampling_mesh)), staleness=staleness,
                 updates=updates, steps=steps, copy=self.copy)

  def phase(self, supply, updates, steps, **changes):
    return loop.PhaseRun(**dict(
        name="rl", steps=steps, supply=supply, learner=self.learner, updates_per_batch=updates,
        shape=Shape(Layout(ROW_LENGTH), ROWS), mesh=self.mesh, max_bad_steps=3,
        max_logprob_gap=1e-3, validate=None, validate_every=0, until=None, checkpoint_every=0,
        samples_every=1, curves_every=0) | changes)

  def train(self, supply, updates, steps, place, *, kill_at=math.inf, **changes):
    """Starts, or continues from the newest checkpoint there -> (state, recorder)."""
    recorder, checkpoints = Recorder(kill_at), Checkpoints(place)
    state, progress, buffer = self.start(), loop.Progress(), None
    restored = checkpoints.restore_latest(jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state))
    if restored:
      state, progress, buffer = restored.state, loop.Progress(**restored.host), restored.buffer
    try:
      state = loop.train(self.phase(supply, updates, steps, **changes), state, progress, buffer,
                         reporter=recorder, checkpoints=checkpoints)
    except Killed:
      state = None
    finally:
      supply.close()
      checkpoints.close()
    assert not threads()
    return jax.device_get(state), recorder


def threads():
  return [t for t in threading.enumerate() if t.name == "jaxrl rollouts"]


@pytest.fixture(scope="module")
def world(toys):
  return World(toys)


def by_hand(world, staleness, updates, steps):
  """The schedule, written out: every batch with the parameters of so many batches ago."""
  supply, state, past, batches = groups(world.parts, world.mesh), world.start(), [], []
  length = ROW_LENGTH
  for step in range(0, steps, updates):
    past.append(jax.device_get(state.params))
    batches.append(supply.next(past[max(0, step // updates - staleness)], step))
    host = pack(batches[-1].trajectories, row_length=length, rows_multiple=ROWS)
    batch = sharding.put_batch(to_micro_batches(host, ROWS), world.mesh)
    prepared = world.learner.prepare(state, batch)[1]
    for _ in range(min(updates, steps - step)):
      state, _ = world.learner.update(state, prepared)
  return jax.device_get(state), batches


@pytest.mark.parametrize("staleness, updates, steps", [(1, 1, 5), (2, 1, 5), (1, 2, 7), (9, 1, 3)])
def test_every_batch_is_of_the_parameters_of_so_many_batches_ago(
    toys, world, tmp_path, staleness, updates, steps):
  expected, batches = by_hand(world, staleness, updates, steps)
  supply = world.supply(staleness, updates, steps)
  state, recorder = world.train(supply, updates, steps, tmp_path)
  toys.same_bits(state, expected)
  on_policy, _ = by_hand(world, 0, updates, steps)
  assert any((x != y).any() for x, y in
             zip(jax.tree.leaves(state.params), jax.tree.leaves(on_policy.params)))
  assert [row["staleness"] for row in recorder.rows] == [
      min(step // updates, staleness) * updates for step in range(steps)]
  assert [row["reward"] for row in recorder.rows] == [
      batches[step // updates].metrics["reward"] for step in range(steps)]


def test_other_devices_for_sampling_change_nothing_but_rounding(toys, world, tmp_path):
  devices = jax.devices()
  apart = World(toys, sharding.make_mesh(2, 2, 1, devices=devices[:4]),
                sharding.make_mesh(2, 1, 2, devices=devices[4:]))
  found, mine = apart.train(apart.supply(1, 1, 4), 1, 4, tmp_path / "apart")
  expected, theirs = world.train(world.supply(1, 1, 4), 1, 4, tmp_path / "together")
  toys.close(found, expected)
  assert [a["completion"] for a in mine.answers] == [a["completion"] for a in theirs.answers]
  assert all(row["logprob_gap"] < 1e-4 for row in mine.rows[:1])


class Dawdling:
  """A supply that takes its time now and then."""

  def __init__(self, supply, seed):
    self._supply, self._random, self.sampled = supply, random.Random(seed), True
    self.get_state, self.set_state = supply.get_state, supply.set_state
    self.close = supply.close

  def next(self, params, step, reference=None):
    time.sleep(self._random.choice([0, 0, 0.05]))
    supplied = self._supply.next(params, step)
    time.sleep(self._random.choice([0, 0, 0.05]))
    return supplied


def test_time_decides_nothing(toys, world, tmp_path):
  runs = []
  for seed in range(3):
    supply = world.supply(2, 1, 6, lambda s: Dawdling(s, seed))
    validate = Dawdling(groups(world.parts, world.mesh), 10 * seed)  # at the same time

    def look(state, step):
      return {"reward": validate.next(state.params, step).metrics["reward"]}
    runs.append(world.train(supply, 1, 6, tmp_path / str(seed), validate=look, validate_every=2))
  for state, recorder in runs[1:]:
    toys.same_bits(state, runs[0][0])
    assert recorder.rows == runs[0][1].rows and recorder.answers == runs[0][1].answers


@pytest.mark.parametrize("staleness, updates", [(2, 1), (1, 2)])
def test_a_kill_after_any_update_changes_no_bit(toys, world, tmp_path, staleness, updates):
  steps = 6
  expected, whole = world.train(world.supply(staleness, updates, steps), updates, steps,
                                tmp_path / "whole")
  place, rows, answers, kill_at = tmp_path / "killed", [], [], 2
  while len(rows) < steps:
    state, part = world.train(world.supply(staleness, updates, steps), updates, steps, place,
                              kill_at=kill_at, checkpoint_every=1 + kill_at % 2)
    done = part.rows[0]["phase_step"] - 1
    rows = rows[:done] + part.rows
    answers = [a for a in answers if a["step"] <= done] + part.answers
    kill_at = kill_at + 1 if kill_at < steps - 1 else math.inf
  toys.same_bits(state, expected)
  assert rows == whole.rows and answers == whole.answers


def test_a_stored_batch_is_the_batch(toys):
  batch = Supplied(toys.rollouts(), {"reward": 0.5, "odd": float("inf")},
                   {"a": Task("a", [1, 2], question="q", answer="\ud800")})
  for number, t in enumerate(batch.trajectories):
    t.columns, t.signals = {"length": number / 3}, {"hint": t.behaviour_logprobs * 2}
    t.text, t.evidence = f"text {number}", {"right": Criterion(1.0, detail="why")}
  for one in (batch, Supplied([])):
    state, arrays = stored.take_arrays([stored.to_state(one)], "supply")
    assert arrays and all(name.startswith("supply/0/") for name in arrays)
    read = json.loads(json.dumps(hostfile.plain(state)))
    found = stored.from_state(stored.put_arrays(read, arrays)[0])
    assert (found.metrics, found.tasks) == (one.metrics, one.tasks)
    assert len(found.trajectories) == len(one.trajectories)
    for mine, theirs in zip(found.trajectories, one.trajectories):
      for name, value in vars(theirs).items():
        np.testing.assert_equal(getattr(mine, name), value, name)


class Failing(Dawdling):
  """Fails at one update."""

  def __init__(self, supply, at):
    super().__init__(supply, 0)
    self._at, self.asked = at, []

  def next(self, params, step, reference=None):
    self.asked.append(step)
    if step == self._at:
      raise ArithmeticError(f"no batch for update {step}")
    return self._supply.next(params, step)


def test_a_failure_surfaces_at_its_batch(world, tmp_path):
  supply = world.supply(2, 1, 6, lambda s: Failing(s, 3))
  recorder = Recorder()
  with contextlib.closing(Checkpoints(tmp_path)) as checkpoints, contextlib.closing(supply):
    with pytest.raises(ArithmeticError, match="no batch for update 3"):
      loop.train(world.phase(supply, 1, 6), world.start(), loop.Progress(), None,
                 reporter=recorder, checkpoints=checkpoints)
  assert len(recorder.rows) == 3 and not threads()


def test_a_failing_batch_ahead_costs_no_checkpoint(world, tmp_path):
  supply = world.supply(2, 1, 6, lambda s: Failing(s, 3))
  with pytest.raises(ArithmeticError, match="no batch for update 3"):
    world.train(supply, 1, 6, tmp_path, checkpoint_every=1)
  again = []

  def keep(supply):
    again.append(Failing(supply, None))
    return again[0]
  whole, recorder = world.train(world.supply(2, 1, 6, keep), 1, 6, tmp_path, checkpoint_every=1)
  assert len(recorder.rows) == 3  # updates 3 to 5: the first three were saved
  assert again[0].asked == [3, 4, 5]
  assert int(whole.step) == 6


def test_no_batch_is_sampled_that_no_update_would_use(world, tmp_path):
  made = []

  def keep(supply):
    made.append(Failing(supply, None))
    return made[0]
  world.train(world.supply(3, 2, 5, keep), 2, 5, tmp_path)
  assert made[0].asked == [0, 2, 4]


class Endless:
  """A supply of rollouts whose episode never ends of itself."""

  def __init__(self, world):
    self._began = threading.Event()

    async def forever(ctx, task):
      while True:
        await ctx.sample(task.prompt)
        self._began.set()
    self._rollouts = Rollouts(forever, Sampler(world.parts.decoder), TOKENIZER, Judge(),
                              sampling=SamplingParams(max_tokens=1))
    self.supply = GroupsOfRollouts(Tasks(), self._rollouts, prompts=2, key=(0,),
                                   base_key=jax.random.key(0), filter_zero_variance=False,
                                   max_resample=0)

  def wait(self):
    assert self._began.wait(60)


def test_closing_ends_the_batch_that_is_being_sampled(world):
  endless = Endless(world)
  supply = Ahead(endless.supply, staleness=1, updates=1, steps=9, copy=world.copy)
  supply._order(world.start().params, None, 2)
  endless.wait()
  supply.close()
  assert not threads()


def test_an_early_end_discards_what_is_under_way(world, tmp_path):
  supply = world.supply(2, 1, 50)
  state, recorder = world.train(supply, 1, 50, tmp_path, validate=lambda *_: {"reward": 1.0},
                                validate_every=3, until=("reward", 0.5))
  assert len(recorder.rows) == 3 and int(state.step) == 3


MESHES = [((4, 1, 1), (4, 1, 1)), ((2, 2, 1), (4, 1, 1)), ((1, 4, 1), (2, 1, 1)),
          ((1, 2, 2), (1, 2, 1)), ((1, 1, 1), (1, 1, 1)), ((1, 2, 2), (1, 4, 1))]


@pytest.mark.parametrize("home, away", MESHES, ids=str)
def test_parameters_go_from_device_to_device_and_outlive_their_originals(
    toys, monkeypatch, home, away):
  count = math.prod(home)
  mesh = sharding.make_mesh(*home, devices=jax.devices()[:count])
  target = sharding.make_mesh(*away, devices=jax.devices()[count:count + math.prod(away)])
  parts = toys.learning("grpo")
  state = toys.start(parts, mesh)
  expected = jax.device_get(state.params)
  state = jax.tree.map(lambda x: x + 0, state)  # buffers without a copy on the host
  copy = transfer.copier(jax.tree.map(lambda x: x.sharding, state.params), target)

  def detour(_):
    raise AssertionError("parameters went through the host")
  with monkeypatch.context() as patch:
    patch.setattr(type(state.step), "_value", property(detour))
    copied = copy(state.params)
  wanted = toys.shardings(parts, target).params
  jax.tree.map(lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)), copied,
               wanted)
  jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)(state.params)
  toys.same_bits(jax.device_get(copied), expected)


def test_parameters_are_copied_where_sampling_shares_the_devices(toys):
  state = toys.start(toys.learning("grpo"))
  expected = jax.device_get(jax.tree.map(lambda x: x + 0, state.params))
  shardings = jax.tree.map(lambda x: x.sharding, state.params)
  copied = transfer.copier(shardings, toys.one_device())(state.params)
  jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)(state.params)
  toys.same_bits(jax.device_get(copied), expected)


def test_meshes_that_cannot_be_cut_alike_are_refused(toys):
  source = toys.shardings(toys.learning("grpo"),
                          sharding.make_mesh(1, 4, 1, devices=jax.devices()[:4])).params
  mesh = sharding.make_mesh(1, 3, 1, devices=jax.devices()[4:7])
  with pytest.raises(ValueError, match="4 pieces, which do not divide the 3 devices of config"):
    transfer.copier(source, mesh)


def test_the_last_devices_sample():
  settings = dict(data=-1, fsdp=2, tensor=1, sampling=dict(data=2, fsdp=1, tensor=1))
  train, sample = transfer.make_meshes(settings)
  assert tuple(train.shape.values()) == (3, 2, 1) and tuple(sample.shape.values()) == (2, 1, 1)
  assert [*train.devices.flat, *sample.devices.flat] == jax.devices()
  settings["sampling"]["data"] = 0
  assert transfer.make_meshes(settings)[0] == transfer.make_meshes(settings)[1]


@pytest.mark.parametrize("axes, message", [
    (dict(data=8), "takes 8 of 8 devices and leaves none to train"),
    (dict(data=-1), "every axis is a number of devices, at least 1"),
    (dict(data=3), r"does not divide 5 devices.*of 8 devices, 3 only sample"),
])
def test_devices_that_cannot_be_shared_out_are_refused(axes, message):
  settings = dict(data=-1, fsdp=2, tensor=1, sampling=dict(fsdp=1, tensor=1) | axes)
  with pytest.raises(ValueError, match=message):
    transfer.make_meshes(settings)


def config(staleness, **sampling):
  """The quickstart, too small to take time, with settings of asynchronous rollouts."""
  config = configs.load(str(pathlib.Path(__file__).parents[2] / "configs/quickstart.py"))
  config.model.update(layers=1, d_model=16, heads=2, kv_heads=2, d_ff=16, vocab_size=16)
  config.evaluate.problems = 2
  config.rl.rollout = dict(staleness=staleness)
  config.mesh.sampling.update(sampling)
  return config


@pytest.mark.parametrize("staleness, sampling, message", [
    (0, dict(data=4), "config.mesh.sampling keeps 4 devices .* --config.rollout.staleness=1"),
    (1, dict(), "config.rollout.staleness=1 in phase rl needs devices that only sample, .*"
     "--config.mesh.sampling.data=4"),
    (-1, dict(), "config.rollout.staleness=-1 in phase rl; it must be at least 0"),
    (1, dict(data=1, tensor=4), "heads=2 does not divide over mesh.sampling.tensor=4: use "
     "--config.mesh.sampling.tensor=2"),
])
def test_settings_that_cannot_work_are_refused(
    monkeypatch, tmp_path, staleness, sampling, message):
  monkeypatch.setattr(phase_lib, "rehearse", lambda *_: None)
  with pytest.raises(ValueError, match=message):
    builders.build_parts(config(staleness, **sampling), tmp_path, print)


def test_several_processes_are_refused(monkeypatch, tmp_path):
  monkeypatch.setattr(phase_lib, "rehearse", lambda *_: None)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="use --config.rollout.staleness=0 or one process"):
    builders.build_parts(config(1, data=4), tmp_path, print)


def test_a_config_makes_phases_that_sample_on_devices_of_their_own(monkeypatch, tmp_path):
  monkeypatch.setattr(phase_lib, "rehearse", lambda *_: types.SimpleNamespace(learner=None))
  parts = builders.build_parts(config(1, data=2, tensor=2), tmp_path, print)
  with contextlib.closing(parts.scorer):
    sft, rl = (builders.phase_run(parts, phase).supply for phase in parts.phases)
  assert isinstance(rl, Ahead) and not isinstance(sft, Ahead) and not threads()
  assert parts.mesh.size == 4 and tuple(parts.sampling_mesh.shape.values()) == (2, 1, 2)
