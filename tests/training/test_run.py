"""A whole run: what it learns, what it leaves behind, where it may be stopped."""

import functools
import json
import math

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest

from configs import base
from jaxrl import config as configs
from jaxrl import sharding
from jaxrl.training import builders
from jaxrl.training import run as runs
from jaxrl.training.reporting import Reporter

LETTERS = "abcdefgh"
PHASES = ("first", "sft", "middle", "rl", "last")
RL_STEPS = 50
EVALUATED = {"greedy_accuracy", "sampled_accuracy", "pass_at_8"}


def copy_a_letter(directory, *, sft_steps, rl_steps):
  """Evaluations around two phases that learn `a=` -> `a` for eight letters."""
  problems = directory / "letters.jsonl"
  problems.write_text("".join(json.dumps({"question": f"{x}=", "answer": x}) + "\n"
                              for x in LETTERS))
  config = base.get_config()
  config.data.train = config.data.validation = config.data.test = str(problems)
  config.data.update(solution="answer", max_prompt_tokens=8, max_completion_tokens=8)
  config.tokenizer.alphabet = LETTERS + "="
  config.model.update(layers=1, d_model=32, heads=2, kv_heads=1, d_ff=32)
  config.batch.update(row_length=32, micro_batch_rows=4, examples=8)
  config.optimizer.update(learning_rate=0.0123456789012, warmup_steps=2)
  config.rollout.update(prompts=8, episode=dict(name="group", samples=8), max_tokens=4)
  config.evaluate.problems = 8
  config.checkpoint.every = 0
  config.log.update(samples_every=5, curves_every=0)
  config.phases = PHASES
  for name in ("first", "middle", "last"):
    config[name] = dict(kind="evaluate", steps=0)
  config.sft = dict(kind="sft", steps=sft_steps, objective=[dict(name="cross_entropy")],
                    until=dict(metric="greedy_accuracy", at_least=0.3, every=3))
  config.rl = dict(kind="rl", steps=rl_steps, evaluate=dict(every=10))
  return config


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
  """Runs use one of the virtual devices, and what one of them compiled is not compiled again."""
  settings = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
              "jax_persistent_cache_min_compile_time_secs": 0}
  before = {name: getattr(jax.config, name) for name in settings}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh",
                  functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def learned(one_device, tmp_path_factory):
  """A run to its end: (directory, summary, compilations after each update)."""
  directory, compilations = tmp_path_factory.mktemp("learned"), []
  step = Reporter.step

  def counting(reporter, number, phase, metrics):
    compilations.append((phase, reporter.compiles.count))
    step(reporter, number, phase, metrics)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Reporter, "step", counting)
    summary = runs.run(copy_a_letter(directory, sft_steps=60, rl_steps=RL_STEPS), directory / "run",
                       quiet=True)
  return directory / "run", summary, compilations


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_phases_learn(learned):
  phases = {phase["name"]: phase for phase in learned[1]["phases"]}
  sft, rl = phases["sft"], phases["rl"]
  assert sft["before"]["greedy_accuracy"] < 0.3 <= sft["after"]["greedy_accuracy"]
  assert rl["before"]["sampled_accuracy"] < 0.6 and rl["after"]["sampled_accuracy"] > 0.8
  assert rl["after"]["greedy_accuracy"] > max(0.8, rl["before"]["greedy_accuracy"])


def test_summary_has_the_structure_that_readers_rely_on(learned):
  directory, returned, _ = learned
  summary = json.loads((directory / "summary.json").read_text())
  assert summary == returned
  assert [(p["name"], p["kind"]) for p in summary["phases"]] == list(
      zip(PHASES, ("evaluate", "sft", "evaluate", "rl", "evaluate")))
  for phase, following in zip(summary["phases"], [*summary["phases"][1:], None]):
    assert set(phase) == {"name", "kind", "seconds", "before", "after"}
    assert EVALUATED <= set(phase["before"]) and EVALUATED <= set(phase["after"])
    assert phase["seconds"] > 0
    assert following is None or following["before"] == phase["after"]
    if phase["kind"] == "evaluate":  # greedily, the same policy answers the same
      assert phase["before"]["greedy_accuracy"] == phase["after"]["greedy_accuracy"]
  assert summary["compile"]["count"] > 0 and summary["compile"]["seconds"] > 0
  assert summary["peak_memory"]["host_mb"] > 0
  assert summary["versions"]["jax"] == jax.__version__
  assert summary["device"]["platform"] == "cpu"


def test_metrics_hold_one_row_per_update_and_per_evaluation(learned):
  found = rows(learned[0] / "metrics.jsonl")
  assert [r["phase"] for r in found if "evaluation" in r] == ["start", *PHASES]
  updates = [r for r in found if "evaluation" not in r]
  assert [r["step"] for r in updates] == list(range(1, len(updates) + 1))
  sft, rl = ([r for r in updates if r["phase"] == name] for name in ("sft", "rl"))
  assert len(rl) == RL_STEPS and [r["phase_step"] for r in rl] == list(range(1, RL_STEPS + 1))
  for row in sft:
    assert {"loss", "tokens_per_second", "learning_rate", "grad_norm"} <= set(row)
  for row in rl:
    assert {"loss", "reward", "kl", "entropy", "clip_fraction", "logprob_gap", "tokens_per_second",
            "effective_group_fraction", "criteria/exact_match"} <= set(row)
    assert row["logprob_gap"] < 1e-4
    assert all(math.isfinite(v) for v in row.values() if not isinstance(v, str))


def test_a_phase_ends_with_its_condition_and_validation_is_logged(learned):
  updates = [r for r in rows(learned[0] / "metrics.jsonl") if "evaluation" not in r]
  name = "validation/greedy_accuracy"
  sft = [r for r in updates if r["phase"] == "sft"]
  assert len(sft) < 60 and [r["phase_step"] for r in sft if name in r] == list(
      range(3, len(sft) + 1, 3))
  assert [r[name] >= 0.3 for r in sft if name in r] == [False] * (len(sft) // 3 - 1) + [True]
  assert [r["phase_step"] for r in updates if r["phase"] == "rl" and name in r] == [
      10, 20, 30, 40, 50]


def test_samples_show_what_was_asked_said_and_rewarded(learned):
  directory = learned[0] / "samples"
  assert {p.stem for p in directory.iterdir()} == {"rl", *(f"evaluation_{m}"
                                                           for m in ("start", *PHASES))}
  found = rows(directory / "rl.jsonl")
  assert len(found) == RL_STEPS // 5 * 64
  for row in found:
    correct = row["completion"] == row["prompt"][0]
    assert row["answer"] == row["prompt"][0]
    assert row["criteria"]["exact_match"]["score"] == row["reward"] == float(correct)
  first = found[:64]
  for task in {r["task"] for r in first}:
    group = [r for r in first if r["task"] == task]
    rewards = np.array([r["reward"] for r in group])
    spread = rewards.std(ddof=1)
    expected = (rewards - rewards.mean()) / (spread + 1e-4) if spread else 0 * rewards
    np.testing.assert_allclose([r["advantage"] for r in group], expected, rtol=1e-4, atol=1e-6)


def test_curves_events_and_config_are_there(learned):
  directory, config = learned[0], json.loads((learned[0] / "config.json").read_text())
  assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
  assert sum(p.stat().st_size for p in (directory / "tensorboard").iterdir()) > 1000
  expected = copy_a_letter(directory.parent, sft_steps=60, rl_steps=RL_STEPS)
  assert configs.differences(config, configs.to_dict(expected)) == []


def test_nothing_is_compiled_after_the_first_updates(learned):
  for phase in ("sft", "rl"):
    counts = [count for name, count in learned[2] if name == phase]
    assert counts[-1] == counts[len(counts) // 3]


class Killed(BaseException):
  """Stands for a kill: nothing catches it."""


def test_a_run_stopped_during_an_evaluation_goes_on_to_the_same_end(
    one_device, tmp_path, monkeypatch):
  config = copy_a_letter(tmp_path, sft_steps=3, rl_steps=3)
  config.rl.evaluate.every = 0
  whole = runs.run(config, tmp_path / "whole", quiet=True)
  evaluate, moments = builders.evaluate, [(1, 3), (2, 3), (4, 6)]  # phase index, updates

  def killed_once_each(parts, phase, params, tasks, key, *, step):
    if key in moments:
      moments.remove(key)
      raise Killed
    return evaluate(parts, phase, params, tasks, key, step=step)
  monkeypatch.setattr(builders, "evaluate", killed_once_each)
  while moments:
    with pytest.raises(Killed):
      runs.run(config, tmp_path / "killed", quiet=True)
  result = runs.run(config, tmp_path / "killed", quiet=True)

  def timeless(phases):
    return [{k: v for k, v in phase.items() if k != "seconds"} for phase in phases]
  assert timeless(result["phases"]) == timeless(whole["phases"])
  for name in ("killed", "whole"):
    found = rows(tmp_path / name / "metrics.jsonl")
    assert [r["phase"] for r in found] == ["start", "first", *["sft"] * 4, "middle", *["rl"] * 4,
                                           "last"]

  summary = tmp_path / "killed" / "summary.json"  # as a kill before the last summary leaves it
  summary.write_text(json.dumps(result | {"phases": result["phases"][:-1]}))
  again = runs.run(config, tmp_path / "killed", quiet=True)
  assert timeless(again["phases"]) == timeless(whole["phases"])


def test_a_directory_belongs_to_one_config(one_device, tmp_path):
  config = copy_a_letter(tmp_path, sft_steps=3, rl_steps=3)
  config.phases = ("first",)
  runs.run(config, tmp_path / "run", quiet=True)
  config.log.samples_every = 7  # how often something is written may change
  runs.run(config, tmp_path / "run", quiet=True)
  config.optimizer.learning_rate = 0.0123456789013
  with pytest.raises(configs.ConfigError) as refusal:
    runs.run(config, tmp_path / "run", quiet=True)
  assert "config.optimizer.learning_rate: 0.0123456789012 -> 0.0123456789013" in str(refusal.value)
