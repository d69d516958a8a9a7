"""Layouts that follow what was sampled: the cheapest of all, worth its compilation, the same after a kill."""

import functools
import json
import pathlib
import types

import jax
import numpy as np
import pytest

from configs import base
from jaxrl import sharding
from jaxrl.batch import Layout
from jaxrl.batch import pack
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


def fitter(prompt=32, d_model=128, **rollout):
  decoder = types.SimpleNamespace(d_model=d_model, mlp_width=3 * d_model, heads=4)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  return shapes.Fitter(settings(prompt, **rollout), decoder, mesh, prompt)


def places(layout, trajectories):
  """Tokens of the rows and trunks in use, counted in the batch that is packed."""
  host = pack(trajectories, row_length=layout.row_length, trunk_length=layout.trunk_length,
              rows_per_trunk=layout.rows_per_trunk, rows_multiple=layout.rows_per_trunk)
  trunks = int((host.trunk_lengths > 0).sum())
  if trunks:
    return trunks * (host.trunk_tokens.shape[1] + host.rows_per_trunk * host.tokens.shape[1])
  return int((host.segment_ids != 0).any(axis=1).sum()) * host.tokens.shape[1]


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("prompt", [4, 32, 200])
def test_the_best_layout_is_that_whose_batch_is_smallest(name, prompt):
  trajectories = batch_of(LENGTHS[name], prompt)
  wide = fitter(prompt, d_model=1 << 20)  # attention costs nothing beside all other work
  begun = shapes.shape_of(wide.settings, wide.decoder, wide.mesh, [prompt])
  best, saved = wide.best(begun.layout, trajectories, 64)
  rows = [64, 128, 256, 512]
  others = [Layout(row, -(-prompt // 16) * 16, n) for row in rows for n in (1, 2, 4, 8, 16, 32)]
  least = min(places(layout, trajectories) for layout in (*others, begun.layout))
  found = places(best, trajectories)
  assert found <= 1.01 * least  # whole sequences, of which no count is needed to know the cost, may be fewer
  assert saved == pytest.approx(1 - found / places(begun.layout, trajectories), abs=0.02)
  assert wide.best(best, trajectories, 64) == (best, 0)


def test_responses_longer_than_the_limit_are_given_rows_that_hold_them():
  trajectories = batch_of(lambda rng: np.array([100, 300, 20, 20]))  # as in episodes of several turns
  layout, _ = fitter().best(Layout(64, 32, 4), trajectories, 300)
  assert layout.row_length >= 304
  assert fitter().best(Layout(64, 32, 4), [], 0) == (Layout(64, 32, 4), 0)
  assert layout.row_length == pack(trajectories, row_length=layout.row_length, trunk_length=layout.trunk_length,
                                   rows_per_trunk=layout.rows_per_trunk,
                                   rows_multiple=layout.rows_per_trunk).tokens.shape[1]


@pytest.mark.parametrize("layout", [Layout(64, 32, 8), Layout(128, 32, 1), Layout(128)])
def test_a_shape_holds_the_longest_batch_in_whole_micro_batches(layout):
  shape = fitter().shape(layout, 128)
  host = shape.pack(batch_of(LENGTHS["full"]))
  assert shape.micro_batch_rows % layout.rows_per_trunk == 0
  assert host.tokens.shape == shape.pack([]).tokens.shape  # nothing longer makes it larger
  assert (host.num_sequences, host.rows_per_trunk) == (128, layout.rows_per_trunk)


def look(found, **changes):
  """What a `Fitting` says of short responses, and the layouts that it has begun to compile."""
  begun = []

  def rehearse(shape):
    begun.append(shape.layout)
    return types.SimpleNamespace(compile=lambda: None, learner=shape.layout)
  shape = shapes.shape_of(found.settings, found.decoder, found.mesh, [32])
  fit = fitting.Fitting(shape, "first", found, rehearse)
  arguments = dict(longest=8, batch=1, left=1000) | changes
  layout = fit.look(batch_of(LENGTHS["short"]), shape.layout, **arguments)
  return fit, shape, layout, begun


def test_only_what_saves_more_than_it_costs_is_compiled():
  fit, shape, (layout, saved), begun = look(fitter())
  assert saved > 0.3
  assert fit.now(layout) == (fitter().shape(layout, shape.sequences), layout)
  assert begun == [layout]
  assert fit.now(shape.layout) == (shape, "first")
  assert fit.now(layout)[1] == layout and begun == [layout]  # known by now
  assert look(fitter(), left=int(fitting.WORTH / saved) - 1)[2:] == (None, [])
  assert look(fitter(), left=int(fitting.WORTH / saved) + 1)[2] == (layout, saved)


def test_batches_are_looked_at_ever_more_rarely():
  looked = [batch for batch in range(1, 70) if look(fitter(), batch=batch)[2]]
  assert looked == [1, 2, 4, 8, 16, 32, 64]


def test_what_goes_wrong_in_a_rehearsal_is_raised_where_its_programs_are_wanted():
  found = fitter()
  shape = shapes.shape_of(found.settings, found.decoder, found.mesh, [32])

  def rehearse(shape):
    raise ValueError(f"no room for {shape.layout.row_length}")
  fit = fitting.Fitting(shape, "first", found, rehearse)
  with pytest.raises(ValueError, match="no room for 128"):
    fit.now(Layout(128, 32, 1))


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
  assert "of the work; so they are laid out from the next batch on" in "".join(capfd.readouterr())
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
