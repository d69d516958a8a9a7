"""Layouts that follow what was sampled: the cheapest of all, worth its compilation, the same after a kill."""

import dataclasses
import functools
import json
import types

import jax
import numpy as np
import pytest

from configs import base
from jaxrl import sharding
from jaxrl.batch import Layout
from jaxrl.batch import Trajectory
from jaxrl.training import fitting
from jaxrl.training import run as runs
from jaxrl.training import shapes
from jaxrl.training.stopping import Stop
from jaxrl.training.stopping import Stopped

STEPS = 9
LENGTHS = {
    "full": lambda rng: np.full(8, 64), "half": lambda rng: rng.integers(16, 33, 8),
    "short": lambda rng: rng.integers(1, 9, 8), "long tail": lambda rng: np.minimum(64, np.ceil(
        4 * np.exp(rng.normal(size=8)))).astype(int)}


def settings(prompt=32, **rollout):
  config = base.get_config()
  config.kind = "rl"
  config.data.max_prompt_tokens = prompt
  config.rollout.update(**{"prompts": 16, "max_tokens": 64, "episode": dict(name="group", samples=8)} | rollout)
  return config


def batch_of(lengths, prompt=32, prompts=16):
  rng, found = np.random.default_rng(0), []
  for group in range(prompts):
    tokens = rng.integers(3, 50, prompt)
    for size in lengths(rng):
      mask = np.arange(prompt + size) >= prompt
      found.append(Trajectory(tokens=np.concatenate([tokens, rng.integers(3, 50, size)]), loss_mask=mask,
                              behaviour_logprobs=np.zeros(len(mask)), group=group, reward=0.0,
                              task_id=str(group), prompt_length=prompt))
  return found


def fitter(prompt=32, d_model=128, devices=1, **rollout):
  decoder = types.SimpleNamespace(d_model=d_model, mlp_width=384, heads=4)
  mesh = sharding.make_mesh(devices, 1, 1, devices=jax.devices()[:devices])
  return shapes.Fitter(settings(prompt, **rollout), decoder, mesh, prompt)


def begun(found):
  """The shape that a phase begins with."""
  return shapes.shape_of(found.settings, found.decoder, found.mesh, [found.prompt])


def best(found, shape, trajectories):
  return found.best(shape, trajectories, shapes.longest_of(trajectories))


def places(shape, trajectories):
  """Tokens of the micro-batches in use, counted in the batch that is packed."""
  host = shape.pack(trajectories)
  used = (host.segment_ids != 0).any(axis=1).reshape(-1, shape.micro_batch_rows).any(axis=1).sum()
  rows = used * shape.micro_batch_rows
  return int(rows * host.tokens.shape[1] + rows // host.rows_per_trunk * host.trunk_tokens.shape[1])


def unscored(trajectories, share):
  rng = np.random.default_rng(1)
  return [dataclasses.replace(t, scored=rng.random() >= share) for t in trajectories]


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("prompt", [4, 32, 200])
@pytest.mark.parametrize("devices, prompts, share", [(1, 16, 0), (8, 16, 0), (8, 4, 0), (1, 16, 0.4), (1, 16, 0.9)])
def test_the_best_shape_is_that_whose_batch_computes_least(name, prompt, devices, prompts, share):
  trajectories = unscored(batch_of(LENGTHS[name], prompt, prompts), share)
  wide = fitter(prompt, d_model=1 << 40, devices=devices, prompts=prompts)  # attention costs nothing beside the rest
  first = begun(wide)
  found, saved = best(wide, first, trajectories)
  now = places(first, trajectories)
  assert saved == pytest.approx(1 - places(found, trajectories) / now, abs=1e-9)
  assert saved >= -1e-9
  layouts = [Layout(row, -(-prompt // 16) * 16, n) for row in (64, 128, 256, 512) for n in (1, 2, 4, 8, 16, 32)]
  for layout in (*layouts, first.layout):
    rows = -(-len(trajectories) // layout.rows_per_trunk) * layout.rows_per_trunk
    other = shapes.Shape(layout, max(found.micro_batch_rows, devices * layout.rows_per_trunk), rows)
    if other.micro_batch_rows % layout.rows_per_trunk == 0:
      left = max(found.tokens_at_a_time, other.tokens_at_a_time)  # of the last micro-batch
      assert places(found, trajectories) < places(other, trajectories) + left
  assert best(wide, found, trajectories)[1] == pytest.approx(0, abs=1e-9)


def test_responses_longer_than_the_limit_are_given_rows_that_hold_them():
  trajectories = batch_of(lambda rng: np.array([100, 300, 20, 20]))  # as in episodes of several turns
  shape = best(fitter(), shapes.Shape(Layout(512, 32, 4), 4, 64), trajectories)[0]
  assert shape.pack(trajectories).tokens.shape[1] == shape.layout.row_length >= 304
  assert fitter().best(shape, [], (0, 0, 0)) == (shape, 0)
  small = fitter().best(shape, batch_of(LENGTHS["short"]), shapes.longest_of(trajectories))[0]
  assert small.layout.row_length >= 300  # such a response may come again
  longest = shapes.longest_of(trajectories, (40, 20, 900))
  assert longest == (40, 300, 900)
  assert shapes.longest_of(unscored(trajectories, 1)) == (0, 0, 332)


def test_rows_at_a_time_that_a_config_says_hold_no_more_tokens_afterwards():
  found = fitter()
  found.settings.batch.micro_batch_rows = 8
  first = begun(found)
  for name in LENGTHS:
    assert best(found, first, batch_of(LENGTHS[name]))[0].tokens_at_a_time <= first.tokens_at_a_time


def look(found, trajectories=None, **changes):
  """What a `Fitting` says of short responses, and the shapes that it has begun to compile."""
  compiled = []

  def rehearse(shape):
    compiled.append(shape)
    return types.SimpleNamespace(compile=lambda: None, learner="another")
  shape = begun(found)
  fit = fitting.Fitting(shape, "first", found, rehearse)
  trajectories = trajectories or batch_of(LENGTHS["short"])
  arguments = dict(longest=shapes.longest_of(trajectories), batch=1, left=1000) | changes
  return fit, shape, fit.look(trajectories, shape, **arguments), compiled


def test_only_what_saves_more_than_it_costs_is_compiled():
  fit, shape, (fitted, saved), compiled = look(fitter())
  assert saved > 0.3 and not compiled
  least = (1, 1, 200, 32)
  found, learner = fit.now(json.loads(json.dumps(fitted)), least)  # as a checkpoint holds it
  assert learner == "another" and compiled == [found]
  assert dataclasses.astuple(found.layout) == fitted[:3] and found.sequences == 200
  assert fit.now((), (1, 1, 1, 0)) == (shape, "first")
  assert fit.now(fitted, (1, 1, 300, 48))[0].layout.trunk_length == 48
  assert len(compiled) == 1
  assert look(fitter(), left=int(fitting.WORTH / saved) - 1)[2] is None
  assert look(fitter(), left=int(fitting.WORTH / saved) + 1)[2] == (fitted, saved)


def test_a_shape_is_rehearsed_with_the_rows_that_were_seen():
  trajectories = batch_of(LENGTHS["full"], prompts=64)  # four times what the config lets expect
  shape = best(fitter(), begun(fitter()), trajectories)[0]
  assert shape.pack(trajectories).tokens.shape == shape.pack([]).tokens.shape


def test_a_shape_serves_the_devices_of_whoever_continues():
  fitted = look(fitter())[2][0]
  fit, *_ = look(fitter(devices=8))
  shape, _ = fit.now(fitted, (1, 1, 1, 0))
  assert shape.micro_batch_rows % (8 * shape.layout.rows_per_trunk) == 0


def test_batches_are_looked_at_ever_more_rarely():
  looked = [batch for batch in range(1, 70) if look(fitter(), batch=batch)[2]]
  assert looked == [1, 2, 4, 8, 16, 32, 64]


def test_what_goes_wrong_in_a_rehearsal_is_raised_where_its_programs_are_wanted():
  def rehearse(shape):
    raise ValueError(f"no room for {shape.layout.row_length}")
  fit = fitting.Fitting(begun(fitter()), "first", fitter(), rehearse)
  with pytest.raises(ValueError, match="no room for 128"):
    fit.now((128, 32, 1, 4, 16), (1, 1, 1, 0))


def config_of():
  config = base.get_config()
  config.data.update(train="task:addition", task=dict(digits=2), max_prompt_tokens=8, max_completion_tokens=8)
  config.data.validation = config.data.test = ""
  config.tokenizer.alphabet = "0123456789+="
  config.model.update(layers=1, d_model=16, heads=2, kv_heads=1, d_ff=32)
  config.rollout.update(prompts=8, episode=dict(name="group", samples=8), max_tokens=160)
  config.reward.workers = 0
  config.checkpoint.every = 0
  config.log.update(samples_every=0, curves_every=0)
  config.phases = ("rl",)
  config.rl = dict(kind="rl", steps=STEPS, objective=[dict(name="clipped_surrogate"), dict(name="kl", beta=0.1)],
                   optimizer=dict(learning_rate=1e-4))
  return config


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Runs a config in a directory on one device; another layout is worth as many updates as said."""
  monkeypatch.setattr(sharding, "make_mesh",
                      functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))

  def begin(name, worth, config=None, stop=None):
    monkeypatch.setattr(fitting, "WORTH", worth)
    runs.run(config or config_of(), tmp_path / name, quiet=True, stop=stop)
    return rows_of(tmp_path / name)
  return begin


def rows_of(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()
          if "grad_norm" in line]


def test_a_run_is_the_same_in_another_layout_and_computes_less_padding(run, capfd):
  plain, fitted = run("plain", 10 ** 9), run("fitted", 0.1)
  assert "from the next batch on; that saves" in "".join(capfd.readouterr())
  for name in ("reward", "tokens", "loss_tokens", "response_tokens"):
    assert [row[name] for row in fitted] == [row[name] for row in plain]
  for name in ("loss", "kl", "entropy", "grad_norm"):
    np.testing.assert_allclose([row[name] for row in fitted], [row[name] for row in plain], rtol=1e-3, atol=1e-6)
  assert fitted[0]["packing_efficiency"] == plain[0]["packing_efficiency"]
  assert min(row["packing_efficiency"] for row in fitted[2:]) > 1.2 * max(
      row["packing_efficiency"] for row in plain[2:])


def test_a_layout_stays_where_it_is_to_stay(run):
  config = config_of()
  config.batch.fit_layout = False
  config.rl.steps = 3
  assert max(row["packing_efficiency"] for row in run("fixed", 0.1, config)) < 0.5


def test_the_next_phase_begins_with_a_layout_of_its_own(run):
  config = config_of()
  config.phases = ("rl", "again")
  config.again = dict(config.rl.to_dict(), steps=3)
  rows = run("two", 0.1, config)
  again = [row for row in rows if row["phase"] == "again"]
  assert again[0]["packing_efficiency"] < 0.5 < min(row["packing_efficiency"] for row in (*rows[1:STEPS], *again[1:]))


class After(Stop):
  """Asks to stop after so many updates."""

  def __init__(self, updates):
    super().__init__()
    self._updates = updates

  def agreed(self, updates):
    return updates >= self._updates


@pytest.mark.parametrize("updates, last", [(1, 1), (1, 3), (2, 3)])
def test_a_run_that_was_stopped_continues_in_its_layout(run, updates, last):
  def config():
    found = config_of()
    found.rollout.updates = updates
    return found
  whole = run("whole", 0.1, config())
  with pytest.raises(Stopped):
    run("stopped", 0.1, config(), After(last))
  continued = run("stopped", 0.1, config())
  own = {"step_seconds", "tokens_per_second", "rollout_seconds", "compilations", "compile_seconds"}
  assert [{k: x for k, x in row.items() if k not in own} for row in continued] == [
      {k: x for k, x in row.items() if k not in own} for row in whole]
  assert len({row["packing_efficiency"] for row in whole}) > 1
