"""Phases that compare answers: pairs in, held-out metrics out, resumed to the same bits."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxrl import config as configs
from jaxrl.training import builders
from jaxrl.training import run
from tests.checkpointed import arrays_of

SMALL = {"data.task.digits": "1", "model.layers": "1", "model.d_model": "32", "model.d_ff": "64",
         "model.heads": "2", "model.kv_heads": "2", "evaluate.problems": "0", "evaluate.pairs": "10",
         "evaluate.samples": "0", "checkpoint.every": "1", "checkpoint.keep": "10",
         "optimizer.warmup_steps": "0", "compilation_cache": "off", "log.curves_every": "0"}
STEPS = 4


def small(**more):
  config = configs.load("configs/dpo.py")
  config.phases = ("preference",)
  config.preference.steps, config.preference.batch.examples = STEPS, 4
  config.preference.objective = [dict(name="dpo", beta=0.1)]
  config.preference.optimizer.learning_rate = 3e-3
  configs.override(config, SMALL | more)
  return config


def rows_of(place):
  return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  place = tmp_path_factory.mktemp("comparing") / "run"
  summary = run.run(small(), place, quiet=True)
  return place, summary


def test_the_policy_begins_as_its_reference_and_leaves_it(finished):
  place, summary = finished
  before, after = summary["phases"][0]["before"], summary["phases"][0]["after"]
  np.testing.assert_allclose(before["pairs/loss/dpo"], np.log(2), rtol=1e-6)
  assert before["pairs/preference_margin"] == before["pairs/chosen_reward"] == 0
  assert before["pairs/preference_accuracy"] == 0.5  # ties count as half
  assert after["pairs/preference_margin"] != 0
  updates = [row for row in rows_of(place) if "grad_norm" in row]
  assert len(updates) == STEPS
  np.testing.assert_allclose(updates[0]["loss"], np.log(2), rtol=1e-6)
  assert updates[-1]["loss"] < np.log(2)  # the reference of later updates is still the first policy


def test_a_resume_ends_in_the_same_bits(finished, tmp_path):
  place, _ = finished
  shutil.copytree(place, tmp_path / "run")
  for number in (3, 4):
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(number))
  run.run(small(), tmp_path / "run", quiet=True)
  wanted, found = arrays_of(place, STEPS), arrays_of(tmp_path / "run", STEPS)
  assert wanted.keys() == found.keys()
  for name, array in wanted.items():
    np.testing.assert_array_equal(array, found[name], err_msg=name)


def test_held_out_metrics_do_not_depend_on_how_pairs_are_batched(tmp_path):
  found = []
  for number, (examples, rows) in enumerate([(4, 0), (3, 8), (10, 16)]):
    config = small(**{"batch.micro_batch_rows": str(rows)})
    config.preference.batch.examples = examples
    parts = builders.build_parts(config, tmp_path / str(number), print)
    phase, rng = parts.phases[0], jax.random.key_data(jax.random.key(0))
    params = builders.states.initial_parameters(parts.decoder, rng, parts.mesh)
    state = builders.start_state(parts, phase, params, rng)
    # Another policy than the reference, so that there is something to measure.
    state = state.replace(params=jax.tree.map(lambda x: 1.5 * x, state.params))
    found.append(builders.measure(parts, phase, state, "test"))
    assert builders.measure(parts, phase, state, "validation") != found[-1]
    parts.scorer.close()
  assert abs(found[0]["pairs/preference_margin"]) > 1e-4
  for other in found[1:]:
    assert other.keys() == found[0].keys()
    for name, value in found[0].items():
      np.testing.assert_allclose(other[name], value, rtol=2e-5, atol=1e-7, err_msg=name)


def test_a_phase_may_wait_for_a_metric_of_pairs(tmp_path):
  config = small()
  config.preference.until = dict(metric="pairs/loss", at_least=0.1, every=2)  # so at the first look
  summary = run.run(config, tmp_path / "run", quiet=True)
  assert summary["updates"] == 2


@pytest.mark.parametrize("changes, message", [
    ({"preference.aggregation.kind": "token_mean"}, "dpo compares sequences.*sequence_mean"),
    ({"data.chosen": "choosen"}, "data.chosen names.*missing; did you mean 'chosen'"),
    ({"data.chosen": "rejected"}, "config.data: chosen='rejected' and rejected='rejected'"),
    ({"data.columns": "('margins',)"}, "'margins', which data.columns names, is missing"),
    ({"data.columns": "('preference',)"}, "config.data: columns="),
    ({"data.preference": "answer"}, "'answer', which data.preference names, holds|needs a finite"),
    ({"evaluate.pairs": "-1"}, "config.evaluate.pairs=-1"),
])
def test_bad_settings_are_refused_before_anything_is_computed(tmp_path, changes, message):
  with pytest.raises(configs.ConfigError, match=message):
    run.run(small(**changes), tmp_path / "run", quiet=True)
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_constants_of_pairs_reach_the_loss(tmp_path):
  config = small(**{"data.columns": "('a',)"})
  config.preference.objective = [dict(name="dpo", beta=0.1, margin="a")]
  config.preference.steps = 1
  summary = run.run(config, tmp_path / "run", quiet=True)
  before = summary["phases"][0]["before"]
  # h is 0 at the start, so the loss is softplus(margin), and the metric is minus the mean margin.
  assert before["pairs/preference_margin"] < 0
  assert before["pairs/loss"] > np.log(2)


SCORING = [("bradley_terry", dict(centre=0.01), 1), ("beta_preference", {}, 2),
           ("plackett_luce", dict(rank="a"), 1), ("regress_attributes", dict(labels=("a", "b")), 2)]
WHOLE = [("kto", {}), ("bco", {}), ("aot", {}), ("aot", dict(unpaired=True)),
         ("dpo", dict(weigh_by_policy=True))]


@pytest.mark.parametrize("kind, name, arguments, heads", [
    *[("reward", *case) for case in SCORING], *[("preference", *case, 0) for case in WHOLE]])
def test_updates_do_not_depend_on_micro_batches(tmp_path, kind, name, arguments, heads):
  metrics = []
  for rows in (8, 24):
    config = small(**{"batch.micro_batch_rows": str(rows), "evaluate.pairs": "0",
                      "batch.row_length": "32", "data.columns": "('a', 'b')"})
    config.model.heads_on_top = (("score", heads),) if heads else ()
    config.preference.kind = kind
    config.preference.steps, config.preference.batch.examples = 3, 24
    config.preference.objective = [dict(name=name, **arguments)]
    run.run(config, tmp_path / str(rows), quiet=True)
    metrics.append([row for row in rows_of(tmp_path / str(rows)) if "grad_norm" in row])
  assert len(metrics[0]) == 3 and metrics[0][0]["grad_norm"] > 0
  assert metrics[0][0]["loss"] != metrics[0][-1]["loss"]
  for one, other in zip(*metrics):
    for key in ("loss", "grad_norm", *[k for k in one if k.startswith(("preference_", "kto", "bco"))]):
      np.testing.assert_allclose(one[key], other[key], rtol=1e-4, atol=1e-6, err_msg=key)


def test_what_a_term_remembers_is_resumed(tmp_path):
  config = small()
  config.preference.objective = [dict(name="bco")]
  run.run(config, tmp_path / "run", quiet=True)
  wanted = arrays_of(tmp_path / "run", STEPS)
  assert any("bco" in name and array != 0 for name, array in wanted.items())
  for number in (3, 4):
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(number))
  run.run(config, tmp_path / "run", quiet=True)
  for name, array in arrays_of(tmp_path / "run", STEPS).items():
    np.testing.assert_array_equal(array, wanted[name], err_msg=name)
