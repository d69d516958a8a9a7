"""Models of other runs: log-probabilities as there, a resume to the bit, what a plan counts, refusals."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import compose
from jaxrl import config as configs
from jaxrl import data
from jaxrl import planning
from jaxrl import sharding
from jaxrl.batch import pack
from jaxrl.models import Decoder
from jaxrl.models import init_parameters
from jaxrl.models import model_outputs
from jaxrl.models import unbox
from jaxrl.objectives.aggregate import Aggregation
from jaxrl.training import run
from jaxrl.training import teachers
from jaxrl.training.frozen import Refresh
from jaxrl.training.learner import make_learner
from jaxrl.training.learner import to_micro_batches
from tests.checkpointed import arrays_of

READ = ("teacher_logprobs", "teacher_entropy", "reference_kl")


@compose.needs(*READ)
def distance(outputs, batch):
  """Logs all that it reads."""
  metrics = {name: outputs.get(name) if name == "reference_kl" else batch.signals[name] for name in READ}
  return (outputs.logprobs - batch.signals["teacher_logprobs"]) ** 2 + outputs.get("reference_kl"), metrics


@pytest.mark.parametrize("shape, rows", [((1, 1, 1), 8), ((1, 1, 1), 2), ((2, 2, 2), 8)], ids=str)
def test_signals_are_those_of_a_model_of_another_shape(toys, shape, rows):
  larger = dataclasses.replace(toys.decoder, layers=3, d_model=24, d_ff=40, scan_layers=True, heads_on_top=(),
                               tie_embeddings=False, logit_soft_cap=3.0)
  own = jax.tree.map(lambda x: x + 0.05, unbox(init_parameters(larger, jax.random.key(7))))
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[:np.prod(shape)])
  parts = toys.learning(terms=[distance], aggregations=[Aggregation("token_mean")], advantage=[], models={
      "reference": Refresh(source="there"), "teacher": Refresh(source="there")},
      decoders={"reference": larger, "teacher": larger})
  assert parts.kept == () and set(parts.others) == {"reference", "teacher"}
  theirs = sharding.shardings_of(jax.eval_shape(lambda: init_parameters(larger, jax.random.key(7))), mesh)
  placed = {name: jax.device_put(jax.tree.map(np.array, own), theirs) for name in parts.others}
  learner = make_learner(parts, toys.shardings(parts, mesh).replace(others=dict.fromkeys(placed, theirs)))
  host = to_micro_batches(pack(toys.rollouts(0), row_length=32, rows_multiple=8, min_rows=8), rows)
  state = toys.start(parts, mesh).replace(others=placed)
  params = jax.device_get(state.params)
  with jax.set_mesh(mesh):
    state, batch, _ = learner.prepare(state, sharding.put_batch(host, mesh))
    signals = jax.device_get(batch.signals)
    after, metrics = learner.update(state, batch)
  toys.same_bits(jax.device_get(after.others["teacher"]), jax.device_get(own))
  alone = model_outputs(larger, own, host, signals=("entropy",), temperature=parts.temperature)
  np.testing.assert_allclose(signals["teacher_logprobs"], alone.logprobs, atol=2e-5)
  np.testing.assert_allclose(signals["teacher_entropy"], alone.entropy, atol=2e-5)

  def probabilities(config, params):  # of what each token is drawn from, in float64
    decoder = Decoder(config)
    hidden, _ = decoder.apply(params, host.tokens, host.positions, host.segment_ids)
    z = np.float64(hidden) @ np.float64(decoder.apply(params, method="vocabulary")).T
    z = config.logit_soft_cap * np.tanh(z / config.logit_soft_cap) if config.logit_soft_cap else z
    return np.roll(np.float64(jax.nn.log_softmax(jnp.asarray(z / parts.temperature))), 1, axis=1)
  log_p, log_q = probabilities(toys.decoder, params), probabilities(larger, own)
  kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)[host.loss_mask]
  assert kl.min() > 0 and kl.std() > 0.01
  np.testing.assert_allclose(metrics["reference_kl"], kl.mean(), rtol=1e-3)


SMALL = {"data.task.digits": "1", "model.layers": "1", "model.d_model": "16", "model.d_ff": "32",
         "model.heads": "2", "model.kv_heads": "2", "evaluate.problems": "0", "evaluate.pairs": "0",
         "evaluate.samples": "0", "checkpoint.every": "1", "checkpoint.keep": "10",
         "optimizer.warmup_steps": "0", "compilation_cache": "off", "log.curves_every": "0"}


def student(source, **more):
  config = configs.load("configs/dpo.py")
  config.phases = ("preference",)
  config.preference.objective = [dict(name="dpo", beta=0.1), dict(name="kl", beta=0.1, model="teacher")]
  config.frozen = dict(teacher=dict(source=str(source)))
  configs.override(config, SMALL | {"preference.steps": "3", "preference.batch.examples": "4"} | more)
  return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  """A run of a larger model."""
  place = tmp_path_factory.mktemp("teacher")
  config = configs.load("configs/quickstart.py")
  config.phases, config.sft.until = ("sft",), None
  configs.override(config, SMALL | {"model.layers": "2", "model.d_model": "32", "sft.steps": "2",
                                    "sft.batch.examples": "4", "model.scan_layers": "True"})
  run.run(config, place, quiet=True)
  return place


def test_a_run_with_a_teacher_goes_on_after_a_stop_to_the_same_bits(teacher, tmp_path):
  source = shutil.copytree(teacher, tmp_path / "teacher")
  run.run(student(source), tmp_path / "whole", quiet=True)
  final, theirs = arrays_of(tmp_path / "whole", 3), arrays_of(teacher, 2)
  held = {name.replace("['others']['teacher']", "['params']"): x for name, x in final.items()
          if "others" in name}
  assert set(held) == {name for name in theirs if name.startswith("['params']")}
  for name, array in held.items():
    np.testing.assert_array_equal(array, theirs[name], err_msg=name)
  shutil.copytree(tmp_path / "whole", tmp_path / "again")
  for number in (2, 3):
    shutil.rmtree(tmp_path / "again" / "checkpoints" / str(number))
  (tmp_path / "again" / "summary.json").unlink()
  source.rename(tmp_path / "gone")  # which what continues has no need of
  run.run(student(source), tmp_path / "again", quiet=True)
  found = arrays_of(tmp_path / "again", 3)
  assert set(found) == set(final)
  for name, array in final.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)
  rows = map(json.loads, (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())
  assert all(row["kl"] > 0 for row in rows if "grad_norm" in row)


def test_a_plan_counts_it(teacher):
  theirs = sum(x.nbytes for name, x in arrays_of(teacher, 2).items() if name.startswith("['params']"))
  phase, = planning.plan(student(teacher), planning.find(devices=8)).phases
  assert phase.held["frozen models"] == phase.held["parameters"] + theirs, "beside the reference"


def test_settings_of_a_tokenizer_and_the_date_of_its_chats_make_no_other_tokens(tmp_path):
  ours = data.train_bpe(["hello world", "12+13=25"] * 9, 280)  # is saved with other settings than once loaded
  ours.fast.chat_template = "{{ strftime_now('%d') }}"
  ours.date = "2025-01-31"
  ours.save(tmp_path)
  theirs = data.load_tokenizer(tmp_path)
  theirs.date = "2025-02-01"
  assert teachers.same_tokens(ours, theirs)
  assert not teachers.same_tokens(ours, data.train_bpe(["other words"] * 9, 280))


def test_a_teacher_without_a_checkpoint_is_refused_at_once(teacher, tmp_path):
  begun = shutil.copytree(teacher, tmp_path / "begun", ignore=lambda where, names: (
      names if where.endswith("checkpoints") else []))
  with pytest.raises(ValueError, match="config.frozen.teacher.source=.*begun.* has no checkpoint yet"):
    run.run(student(begun), tmp_path / "run", quiet=True)


def test_another_reference_that_nothing_reads_is_refused(teacher, tmp_path):
  config = student(teacher, **{"reference.source": str(teacher)})
  config.preference.objective = [dict(name="simpo", beta=2.0), dict(name="kl", beta=0.1, model="teacher")]
  with pytest.raises(ValueError, match="config.reference.source=.* nothing reads"):
    run.run(config, tmp_path / "run", quiet=True)


@pytest.mark.parametrize("changes, message", [
    ({"tokenizer.alphabet": "0123456789+=x"},
     "config.frozen.teacher.source=.* has another tokenizer .of 15 tokens, and here of 16"),
    ({"frozen.teacher.source": "nowhere"}, "config.frozen.teacher.source='nowhere' has no config.json"),
    ({"reference.source": "there",
      "schedules": "[dict(of='reference.decay', schedule='linear', start=0.5, end=0.9, steps=5)]"},
     "config.schedules.*, but config.reference.source='there' is another run's policy"),
    ({"frozen.teacher.every": "1"}, "another run's policy, which stays as it is: leave every"),
    ({"frozen.other": "dict(every=1, follows='teacher')"}, "config.frozen.other.follows='teacher', but")])
def test_what_cannot_be_a_teacher_is_refused(teacher, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    run.run(student(teacher, **changes), tmp_path, quiet=True)
