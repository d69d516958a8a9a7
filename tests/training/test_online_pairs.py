"""Phases of rollouts with preference losses: pairs from rewards, packed together, to the same bits."""

import json
import shutil

import numpy as np
import pytest

from jaxrl import config as configs
from jaxrl.batch import Trajectory
from jaxrl.rollouts import edits
from jaxrl.training import run
from jaxrl.training.shapes import shape_of
from tests.checkpointed import arrays_of

SMALL = {"data.task.digits": "1", "model.layers": "1", "model.d_model": "16", "model.d_ff": "32",
         "model.heads": "2", "model.kv_heads": "2", "evaluate.problems": "0", "evaluate.samples": "0",
         "checkpoint.every": "1", "checkpoint.keep": "10", "optimizer.warmup_steps": "0",
         "compilation_cache": "off", "log.curves_every": "0", "rollout.prompts": "6",
         "rollout.max_tokens": "5", "rl.optimizer.learning_rate": "1e-2",
         "rollout.filter_zero_variance": "False"}
# A model that has learnt nothing ends early or late, so lengths are what can be compared.
LENGTHS = [dict(name="overlong", max_tokens=5, buffer=5)]
STEPS = 2


def small(**more):
  config = configs.load("configs/online_dpo.py")
  config.phases, config.rl.steps = ("rl",), STEPS
  config.reward.criteria = LENGTHS
  configs.override(config, SMALL | {key: str(value) for key, value in more.items()})
  return config


def updates_of(place):
  rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
  return [row for row in rows if "grad_norm" in row]


# ------------------------------------------------------------------------------------------- edits


def answer(reward, group, length=4, scored=True, columns=None):
  return Trajectory(np.arange(length), np.arange(length) > 1, group=group, reward=reward,
                    scored=scored, columns=columns or {}, prompt_length=2, task_id=str(group))


def edited(trajectories, edit=edits.best_and_worst, **arguments):
  step = edits.Step(list(trajectories), {}, 0, {}, {})
  return edit(step, **arguments), step.metrics


def test_ends_of_random_groups():
  rng = np.random.default_rng(0)
  made = [answer(float(rng.integers(0, 3)), group, scored=rng.random() < 0.7)
          for group in range(60) for _ in range(rng.integers(1, 5))]
  expected, rewards = [], []
  for group in range(60):
    found = [t.reward for t in made if t.group == group and t.scored]
    if len(set(found)) > 1:
      expected += [(group, max(found), 1.0), (group, min(found), 0.0)]
      rewards.append(max(found) - min(found))
  pairs, metrics = edited(made)
  assert [(t.group, t.reward, t.columns["preference"]) for t in pairs] == expected
  assert all(t.scored for t in pairs) and 0 < len(rewards) < 60
  assert metrics["pairs"] == len(rewards) and metrics["dropped_groups"] == 1 - len(rewards) / 60
  np.testing.assert_allclose(metrics["reward_gap"], np.mean(rewards))
  wide, _ = edited(made, gap=1.0)
  assert [(t.group, t.reward) for t in wide] == [
      x[:2] for a, b in zip(expected[::2], expected[1::2]) if a[1] - b[1] > 1 for x in (a, b)]
  assert all("preference" not in t.columns for t in made)


@pytest.mark.parametrize("ties, lengths", [("first", (5, 4)), ("shortest", (3, 4)), ("longest", (7, 9))])
def test_ties(ties, lengths):
  group = [answer(r, 0, n) for r, n in [(1, 5), (0, 4), (1, 3), (0, 9), (1, 7)]]
  assert tuple(len(t.tokens) for t in edited(group, ties=ties)[0]) == lengths


def test_known_pairs_stay_and_a_batch_without_pairs_trains_on_nothing():
  known = [answer(0.0, 0, columns={"preference": p}) for p in (0.8, 0.2)]
  pairs, metrics = edited([*known, answer(1.0, 1), answer(0.0, 1)])
  assert [t.columns["preference"] for t in pairs] == [0.8, 0.2, 1.0, 0.0] and metrics["pairs"] == 1
  pairs, metrics = edited([answer(1.0, 0), answer(1.0, 0), answer(2.0, 1), answer(0.0, 1, scored=False)])
  assert [t.scored for t in pairs] == [False, False] and metrics["pairs"] == 0
  assert all(t.columns == {"preference": 0.5} for t in pairs) and metrics["dropped_groups"] == 1


def test_mismatched_answers_are_those_of_the_next_prompt():
  made = [Trajectory([9, group, *[10 * group + i] * 2], [False, False, True, True], group=group,
                     reward=1.0, columns={"preference": float(i)}, prompt_length=2)
          for group in range(3) for i in range(2)]
  found, _ = edited(made, edits.mismatch_answers)
  assert all(not t.signals["mismatched"].any() and t.scored for t in found[:6])
  assert [t.tokens.tolist() for t in found[6:]] == [
      [9, g, *[10 * ((g + 1) % 3) + i] * 2] for g in range(3) for i in range(2)]
  assert all(not t.scored and t.signals["mismatched"].tolist() == [0, 0, 1, 1] for t in found[6:])
  assert len({t.group for t in found}) == 3 + 6


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  place = tmp_path_factory.mktemp("online") / "run"
  run.run(small(), place, quiet=True)
  return place


def test_pairs_are_made_of_rollouts_and_learnt_from(finished):
  updates = updates_of(finished)
  assert len(updates) == STEPS
  np.testing.assert_allclose(updates[0]["loss/dpo"], np.log(2), rtol=1e-6)
  assert updates[0]["preference_margin"] == 0 and updates[0]["grad_norm"] > 0
  for row in updates:
    assert row["pairs"] == 6 * (1 - row["dropped_groups"]) > 0
    assert row["sequences"] == 2 * row["pairs"] and row["reward_gap"] > 0
    assert row["logprob_gap"] < 1e-4
  assert updates[-1]["loss/dpo"] != updates[0]["loss/dpo"]


def test_a_resume_ends_in_the_same_bits(finished, tmp_path):
  shutil.copytree(finished, tmp_path / "run")
  for number in range(2, STEPS + 1):
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(number))
  run.run(small(), tmp_path / "run", quiet=True)
  wanted, found = arrays_of(finished, STEPS), arrays_of(tmp_path / "run", STEPS)
  assert wanted.keys() == found.keys()
  for name, array in wanted.items():
    np.testing.assert_array_equal(array, found[name], err_msg=name)


def test_pairs_share_rows_and_groups_of_other_losses_share_prompts(toys):
  config = small(**{"rollout.prompts": 40, "rollout.episode.samples": 8, "rollout.max_tokens": 60})
  settings = configs.phase_config(config, "rl")
  ask = lambda compares: shape_of(settings, toys.decoder, toys.one_device(), [40], compares=compares)
  shared, together = ask(False), ask(True)
  assert shared.layout.trunk_length and not shared.together
  assert together.together and not together.layout.trunk_length
  rng = np.random.default_rng(0)
  made = [answer(0.0, i // 2, int(rng.integers(42, 101))) for i in range(80)]
  batch = together.pack(made)
  assert batch.tokens.shape[0] == together.pack([]).tokens.shape[0] and batch.num_sequences == 128
  for group in range(40):  # as no micro-batch tears a row apart, none tears a pair apart
    members = np.isin(batch.sequence_ids, (2 * group, 2 * group + 1))
    assert members.any(axis=1).sum() == 1


def test_kto_gets_answers_to_other_prompts(tmp_path):
  config = small()
  config.rl.objective = [dict(name="kto")]
  config.rl.rollout.edits = [dict(name="best_and_worst"), dict(name="mismatch_answers")]
  config.rl.steps = 2
  run.run(config, tmp_path, quiet=True)
  updates = updates_of(tmp_path)
  np.testing.assert_allclose(updates[0]["loss/kto"], 0.5, rtol=1e-6)
  assert updates[0]["kto_kl"] == 0 and updates[0]["sequences"] == 4 * updates[0]["pairs"]
  assert updates[1]["loss/kto"] != 0.5


@pytest.mark.parametrize("changes, message", [
    ({"rl.rollout.edits": "()"}, "reads the column 'preference'.*best_and_worst"),
    ({"rollout.episode.samples": 1}, "best_and_worst compares the samples.*draws one"),
    ({"rl.aggregation.kind": "token_mean"}, "dpo compares sequences.*sequence_mean"),
    ({"rl.rollout.edits[0].tie": "first"}, "no argument 'tie'"),
])
def test_what_cannot_work_is_refused_before_anything_is_computed(tmp_path, changes, message):
  config = small()
  if "rl.rollout.edits[0].tie" in changes:
    config.rl.rollout.edits, changes = [dict(name="best_and_worst", tie="first")], {}
  configs.override(config, {key: str(value) for key, value in changes.items()})
  with pytest.raises((configs.ConfigError, ValueError), match=message):
    run.run(config, tmp_path / "run", quiet=True)
  assert not (tmp_path / "run" / "metrics.jsonl").exists()
