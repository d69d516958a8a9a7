"""Reward models with other inputs and heads: scores are those of training, alone or together, anywhere."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from jaxrl import config as configs
from jaxrl import data
from jaxrl import sharding
from jaxrl.batch import CRITIQUE, Task, Trajectory, pack
from jaxrl.evaluation import representation
from jaxrl.models import model_outputs
from jaxrl.objectives import reward_model
from jaxrl.rewards import Scorer
from jaxrl.sampling import Likelihood
from jaxrl.training import inputs
from jaxrl.training import reward_models
from jaxrl.training import run
from jaxrl.training import state as states

SMALL = {"model.layers": "1", "model.d_model": "16", "model.vocab_size": "16", "model.d_ff": "32",
         "model.heads": "2", "model.kv_heads": "2", "data.task.shortest": "2", "data.task.longest": "3",
         "data.task_size": "64", "evaluate.pairs": "8", "comparisons.steps": "1",
         "comparisons.optimizer.warmup_steps": "0", "comparisons.batch.examples": "8",
         "compilation_cache": "off", "log.curves_every": "0", "log.samples_every": "0"}


def small_config():
  config = configs.load("configs/bradley_terry.py")
  config.data.train = config.data.validation = config.data.test = "task:worked_sums"
  config.model.verdict = ("1", "0")
  return config


@pytest.fixture(scope="module")
def joint():
  """With a reference in the prompt, a question behind the answer, critiques, a head and a verdict."""
  config = small_config()
  config.data.prompt_template = "{question}{answer}={question}"
  config.data.solution_template, config.data.critique = "{solution}+{answer}", "critique"
  config.data.task = dict(critiques=0.5)
  configs.override(config, SMALL)
  tokenizer = data.CharacterTokenizer(config.tokenizer.alphabet)
  decoder = inputs.decoder_config(config.model, tokenizer)

  @functools.cache
  def on(data=1, fsdp=1, tensor=1):
    mesh = sharding.make_mesh(data, fsdp, tensor, devices=jax.devices()[:data * fsdp * tensor])
    params = states.initial_parameters(decoder, jax.random.key_data(jax.random.key(0)), mesh)
    head = params["params"]["score_head"]  # as if it had been trained
    head["kernel"] = 100 * head["kernel"]
    return reward_models.RewardModel(pathlib.Path("nowhere"), config, tokenizer, inputs.builder(config, tokenizer),
                                     decoder, params, Likelihood(decoder, mesh=mesh))
  return on


@pytest.fixture(scope="module")
def stepwise(tmp_path_factory):
  """The --workdir of a run that has learnt to label steps."""
  place, config = tmp_path_factory.mktemp("steps") / "run", small_config()
  config.data.update(answers="answers", chosen="steps", rejected="", step_labels="labels", step_end="=")
  config.comparisons.objective = [dict(name="label_steps")]
  configs.override(config, SMALL)
  run.run(config, place, quiet=True)
  return place


def asked(model, whole=True):
  return [(Task(row["id"], [1], row=row), text, whole) for row in rows_of(model)
          for text in (row["chosen"], row["rejected"])]


def rows_of(model, count=8):
  source = inputs.open_split(model.config, "test")
  return [source[i] for i in range(count)]


def trained_on(model):
  """The sequences of training for the same rows."""
  builder = inputs.pair_builder(model.config, model.builder)
  return [t for group, row in enumerate(rows_of(model))
          for t in data.compared(builder.to_comparison(row, "here"), model.tokenizer, group=group)]


def packed(model, trajectories, *signals):
  """A batch with many sequences to a row, and what the model says of its tokens."""
  batch = pack(trajectories, row_length=64)
  read = jax.jit(lambda params, batch: model_outputs(model.decoder, params, batch, signals=signals, logprobs=False))
  return batch, read(model.params, batch)


def test_scores_do_not_depend_on_batch_devices_or_packing(joint):
  model = joint()
  questions = asked(model)
  together = np.array(model.scores(questions))
  assert together.shape == (16, 2) and (together.std(axis=0) > 1e-3).all()
  alone = np.array([model.scores([one])[0] for one in questions[:3]])
  np.testing.assert_allclose(alone, together[:3], rtol=1e-5, atol=1e-5)
  for mesh in (dict(data=4), dict(data=2, fsdp=2, tensor=2)):
    np.testing.assert_allclose(np.array(joint(**mesh).scores(questions)), together, rtol=1e-5, atol=1e-5)


def test_scores_are_those_of_training_whatever_critique_follows(joint):
  model = joint()
  found = trained_on(model)
  having = [(t.tag_ids == CRITIQUE).any() for t in found]
  assert any(having) and not all(having)
  batch, outputs = packed(model, found, "scores")
  own = np.stack([reward_model.sequence_scores(outputs, batch, head)[:16] for head in range(2)], -1)
  np.testing.assert_allclose(own, np.array(model.scores(asked(model))), rtol=1e-5, atol=1e-5)
  row, first = rows_of(model)[0], found[0]
  text = model.tokenizer.decode(first.tokens[first.tag_ids != CRITIQUE])
  assert text == f"{row['question']}{row['answer']}={row['question']}{row['chosen']}+{row['answer']}"


def test_the_verdict_is_the_log_odds_of_two_tokens(joint):
  model = joint()
  questions = asked(model)[:6]
  yes, no = (model.tokenizer.encode(text)[0] for text in "10")
  sequences = [model.sequence(*question) for question in questions]
  said = [[x[-1] for x in model.reader.logprobs(model.params["params"], [s + [token] for s in sequences])]
          for token in (yes, no)]
  found = np.array(model.scores(questions))[:, 1]
  np.testing.assert_allclose(found, np.subtract(*said), rtol=1e-4, atol=1e-5)
  batch, outputs = packed(model, [Trajectory(s, np.arange(len(s)) == len(s) - 1) for s in sequences],
                          "yes_logprobs")
  np.testing.assert_allclose(reward_model.at_ends(batch, outputs.yes_logprobs)[:6], said[0], rtol=1e-4,
                             atol=1e-5)


def test_what_a_template_writes_ends_an_answer_that_was_cut_off(joint):
  task, text, _ = asked(joint())[0]
  assert joint().sequence(task, text, False) == joint().sequence(task, text, True)


def test_states_of_a_model_are_those_that_scores_are_read_from(joint):
  model = joint()
  states = representation.states_of(model)
  head = model.params["params"]["score_head"]
  found = states @ np.asarray(head["kernel"])[:, 0] + np.asarray(head["bias"])[0]
  np.testing.assert_allclose(found, np.array(model.scores(asked(model)))[:, 0], rtol=1e-4, atol=1e-5)


def judged(place, questions, **spec):
  pairs = [(task, Trajectory([1, 1], [False, True], text=text, finish="stop")) for task, text, _ in questions]
  with Scorer.from_config(dict(criteria=[dict(label="rm", run=str(place), **spec)], workers=0,
                               max_failure_rate=1.0)) as scorer:
    return [one.evidence["rm"] for one in scorer.score(pairs)]


def test_step_scores_are_those_of_training(stepwise):
  model = reward_models.RewardModel.load(stepwise)
  batch, outputs = packed(model, trained_on(model), "scores")
  each = model.step_scores(asked(model))
  assert [len(x) for x in each] == [len(row["terms"]) for row in rows_of(model) for _ in range(2)]
  for item, steps in enumerate(each):
    at = (batch.sequence_ids == item) & batch.loss_mask
    np.testing.assert_allclose(steps, np.asarray(outputs.scores)[at], rtol=1e-5, atol=1e-5)
  alone = model.step_scores(asked(model)[:1])[0]
  np.testing.assert_allclose(alone, each[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(model.scores(asked(model)[:1])[0], alone[-1])
  assert representation.of_reward_model(stepwise)["effective_rank"] >= 1


def test_criteria_name_their_head_and_reduce_steps(stepwise):
  model = reward_models.RewardModel.load(stepwise)
  questions = asked(model)
  each = model.step_scores(questions)
  for name, number in (("score", 0), ("yes_no", 1)):
    found = [x.score for x in judged(stepwise, questions, name="reward_model", head=name)]
    np.testing.assert_allclose(found, [x[-1, number] for x in each], rtol=1e-5, atol=1e-5)
  p = [1 / (1 + np.exp(-np.float64(x[:, 1]))) for x in each]
  for name, reduce in (("min", min), ("product", np.prod), ("mean", np.mean), ("last", lambda x: x[-1])):
    found = judged(stepwise, questions, name="process_reward", reduce=name, head="yes_no")
    np.testing.assert_allclose([x.score for x in found], [reduce(x) for x in p], rtol=1e-5)
  assert found[0].detail.split() == [f"{x:.4f}" for x in p[0]]
  empty = judged(stepwise, [(questions[0][0], "", True)], name="process_reward")
  assert empty[0].status == "failed" and "no whole step" in empty[0].detail


@pytest.mark.parametrize("spec, message", [
    (dict(name="process_reward", reduce="max"), "reduce='max'"),
    (dict(name="reward_model", head="yes"), "has no head 'yes'; did you mean 'yes_no'"),
    (dict(name="reward_model", head=2), "gives 2")])
def test_impossible_criteria_are_refused(stepwise, spec, message):
  with pytest.raises(ValueError, match=message):
    judged(stepwise, [], **spec)


@pytest.mark.parametrize("verdict, message", [
    (("yes", "0"), "'yes', which is 3 tokens"), (("1", "1"), "two different tokens"),
    (("1",), "two different tokens")])
def test_impossible_verdicts_are_refused(verdict, message):
  config = configs.load("configs/bradley_terry.py")
  config.model.verdict = verdict
  with pytest.raises(ValueError, match=message):
    inputs.decoder_config(config.model, data.CharacterTokenizer("01esy"))
