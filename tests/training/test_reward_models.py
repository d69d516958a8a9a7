"""From a trained reward model to the rewards of rollouts."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxrl import config as configs
from jaxrl import data
from jaxrl import sharding
from jaxrl.batch import Task, Trajectory, pack
from jaxrl.evaluation.reward_model import evaluate
from jaxrl.models import model_outputs
from jaxrl.objectives import reward_model
from jaxrl.rewards import Scorer
from jaxrl.training import reward_models
from jaxrl.training import run

SMALL = {"data.task.digits": "1", "model.layers": "1", "model.d_model": "32", "model.d_ff": "64",
         "model.heads": "2", "model.kv_heads": "2", "evaluate.problems": "8", "evaluate.samples": "0",
         "optimizer.warmup_steps": "0", "compilation_cache": "off", "log.curves_every": "0"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A model with two score heads, after a few updates."""
  place = tmp_path_factory.mktemp("reward") / "run"
  config = configs.load("configs/dpo.py")
  config.model.heads_on_top = (("score", 2), ("value", 1), ("more", 1))
  config.phases = ("preference",)
  config.preference.kind, config.preference.steps = "reward", 5
  config.preference.batch.examples = 8
  config.preference.objective = [dict(name="bradley_terry", head=1)]
  config.preference.optimizer.learning_rate = 1e-2
  configs.override(config, SMALL | {"evaluate.problems": "0"})
  run.run(config, place, quiet=True)
  return place


def asked(count=30, seed=0):
  rng = np.random.default_rng(seed)
  found = []
  for i in range(count):
    a, b = rng.integers(0, 10, 2)
    row = {"question": f"{a}+{b}=", "answer": str(a + b), "chosen": "", "rejected": ""}
    text = "".join(map(str, rng.integers(0, 10, rng.integers(0, 9))))
    found.append((Task(f"t{i}", [1], row["question"], row=row), text, bool(rng.integers(2))))
  return found


def test_scores_do_not_depend_on_batch_devices_or_packing(trained):
  questions = asked()
  model = reward_models.RewardModel.load(trained, sharding.make_mesh())
  together = np.array(model.scores(questions))
  assert together.shape == (30, 3) and together.dtype == np.float32 and together.std() > 0.01
  alone = np.array([model.scores([one])[0] for one in questions[:6]])
  np.testing.assert_allclose(alone, together[:6], rtol=1e-5, atol=1e-5)
  back = np.array(model.scores(questions[::-1]))[::-1]
  np.testing.assert_allclose(back, together, rtol=1e-5, atol=1e-5)

  one = reward_models.RewardModel.load(trained, sharding.make_mesh(devices=jax.devices()[:1]))
  np.testing.assert_allclose(np.array(one.scores(questions)), together, rtol=1e-5, atol=1e-5)

  sequences = [model.sequence(*question) for question in questions]
  batch = pack([Trajectory(ids, np.arange(len(ids)) == len(ids) - 1) for ids in sequences],
               row_length=48)
  outputs = model_outputs(one.decoder, one.params, batch, signals=("scores",), logprobs=False)
  packed = [reward_model.sequence_scores(outputs, batch, head)[:30] for head in range(3)]
  np.testing.assert_allclose(np.stack(packed, -1), together, rtol=1e-5, atol=1e-5)


def test_a_model_reads_what_it_was_trained_on(trained):
  model = reward_models.RewardModel.load(trained)
  row = {"question": "1+2=", "answer": "3"}
  task = Task("x", [5, 5, 5], "other", row=row)
  ids = model.sequence(task, "3", True)
  assert model.tokenizer.decode(ids[1:-1]) == "1+2=3" and ids[-1] == model.tokenizer.eos_id
  assert model.sequence(task, "3", False) == ids[:-1]
  lacking, unwritable = model.scores([(Task("y", [5], row={"answer": "3"}), "3", True),
                                      (task, "\u4e09", True)])
  assert "question" in str(lacking) and isinstance(unwritable, ValueError)
  assert reward_models.RewardModel.load(trained) is model


def test_ratings_follow_the_equation():
  heads = np.array([0.3, -1.0, 2.0, 0.5], np.float32)
  assert reward_models.rating(heads, 2, 0) == 2.0
  expected = 1 + sum(1 / (1 + np.exp(-np.float64(z))) for z in heads[1:4])
  np.testing.assert_allclose(reward_models.rating(heads, 1, 4), expected, rtol=1e-12)


def test_a_criterion_scores_all_samples_at_once_beside_a_verifier(trained):
  questions = asked(5)
  spec = dict(criteria=[dict(name="exact_match"),
                        dict(label="rm", name="reward_model", run=str(trained), head=1)],
              aggregate=dict(name="weighted_sum", weights=dict(exact_match=2.0, rm=0.5)), workers=0,
              max_failure_rate=1.0)
  pairs = [(dataclasses.replace(task, answer=task.row["answer"]),
            Trajectory([1, 1], [False, True], text=text, finish="stop" if whole else "length"))
           for task, text, whole in questions]
  pairs.append((Task("bad", [1], "?", "1", row={"nothing": 1}), pairs[0][1]))
  with Scorer.from_config(spec) as scorer:
    assert not scorer.has_workers
    scored = scorer.score(pairs)
  expected = [x[1] for x in reward_models.RewardModel.load(trained).scores(questions)]
  for one, wanted in zip(scored[:5], expected):
    np.testing.assert_allclose(one.evidence["rm"].score, wanted, rtol=1e-5)
    right = one.evidence["exact_match"].score
    np.testing.assert_allclose(one.reward, 2 * right + 0.5 * wanted, rtol=1e-5)
  assert not scored[5].scored and "cannot read" in scored[5].evidence["rm"].detail


@pytest.mark.parametrize("change, message", [
    (dict(run="/nowhere"), "has no config.json"), (dict(head=3), "gives 3"),
    (dict(head=-1), "head=-1"), (dict(levels=5), "numbers 0 to 3"), (dict(levels=1), "at least 2")])
def test_impossible_criteria_are_refused(trained, change, message):
  spec = dict(name="reward_model", run=str(trained)) | change
  with pytest.raises(ValueError, match=message):
    Scorer.from_config(dict(criteria=[spec], workers=0))


def test_an_evaluation_finds_what_the_run_itself_measured(trained, tmp_path):
  """Rows of one sequence each, in float64 margins, against packed batches under the loss of training."""
  found = evaluate(trained, tmp_path, head=1, quiet=True)
  after = json.loads((trained / "summary.json").read_text())["phases"][-1]["after"]
  assert found["pairs"] == 256
  np.testing.assert_allclose(found["calibration"]["nll"], after["pairs/loss/bradley_terry"], rtol=1e-5)


def test_a_run_without_heads_is_no_reward_model(trained, tmp_path):
  shutil.copytree(trained, tmp_path / "run")
  path = tmp_path / "run" / "config.json"
  plain = json.loads(path.read_text())
  plain["model"]["heads_on_top"] = [["value", 1]]
  path.write_text(json.dumps(plain))
  with pytest.raises(ValueError, match="no head beside the value"):
    reward_models.check(tmp_path / "run")


def test_rollouts_learn_from_a_reward_model(trained, tmp_path):
  config = configs.load("configs/quickstart.py")
  config.phases = ("rl",)
  configs.override(config, SMALL | {"rl.steps": "2"})
  config.reward = dict(config.reward.to_dict(), criteria=[
      dict(name="exact_match"), dict(name="reward_model", run=str(trained), head=1)],
      aggregate=dict(name="weighted_sum", weights=dict(reward_model=1.0)))
  run.run(config, tmp_path / "rl", quiet=True)
  rows = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
  updates = [row for row in rows if "grad_norm" in row]
  assert len(updates) == 2 and updates[0]["grad_norm"] > 0
  for row in updates:
    np.testing.assert_allclose(row["reward"], row["criteria/reward_model"], rtol=1e-4)
  assert data.load_tokenizer(tmp_path / "rl" / "tokenizer").vocab_size
