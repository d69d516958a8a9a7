"""Frozen models against copies kept by hand: averages, a shift register, lag, resumes, meshes, refusals."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxrl import compose
from jaxrl import config as configs
from jaxrl import objectives
from jaxrl import sharding
from jaxrl.batch import pack
from jaxrl.objectives.aggregate import Aggregation
from jaxrl.training import frozen
from jaxrl.training import run
from jaxrl.training.frozen import Refresh
from jaxrl.training.learner import make_learner
from jaxrl.training.learner import to_micro_batches
from tests.checkpointed import arrays_of

UPDATES = 5
MODELS = {"reference": Refresh(), "average": Refresh(every=1, decay=0.7), "previous": Refresh(every=2),
          "before": Refresh(every=2, follows="previous"), "lagging": Refresh(every=2, lag=True),
          "slow": Refresh(every=3, decay=0.5, follows="average"), "unread": Refresh(every=1),
          "start": Refresh()}
READ = ("average", "before", "lagging", "slow", "start")  # and so previous is kept


@compose.needs(*(f"{name}_logprobs" for name in READ))
def spread(outputs, batch):
  """Distance to all that it reads, which are logged as metrics by name."""
  metrics = {f"gap_{name}": abs(outputs.logprobs - batch.signals[f"{name}_logprobs"]) for name in READ}
  return 0.1 * sum(metrics.values()), metrics


def learning(toys):
  terms = [compose.build("clipped_surrogate", objectives), spread]
  return toys.learning(terms=terms, aggregations=[Aggregation("token_mean")] * 2,
                       optimizer=toys.gradient_keeper(0.2), models=MODELS)


def trained(toys, mesh, updates=UPDATES):
  """The states before and after each update, and the metrics of each."""
  parts = learning(toys)
  learner, state = make_learner(parts, toys.shardings(parts, mesh)), toys.start(parts, mesh)
  states, rows = [jax.device_get(state)], []
  for update in range(updates):
    host = pack(toys.rollouts(update), row_length=32, rows_multiple=8, min_rows=8)
    with jax.set_mesh(mesh):
      state, batch, _ = learner.prepare(state, sharding.put_batch(to_micro_batches(host, 8), mesh))
      assert {f"{name}_logprobs" for name in READ} <= set(batch.signals)
      assert "previous_logprobs" not in batch.signals, "it is only followed"
      state, metrics = learner.update(state, batch)
    states.append(jax.device_get(state))
    rows.append({k: float(v) for k, v in metrics.items()})
  return states, rows, state


@pytest.fixture(scope="module")
def history(toys):
  return trained(toys, toys.one_device())[:2]


def mix(decay, old, new):
  return jax.tree.map(lambda x, y: decay * x + (1 - decay) * y, old, new)


def test_each_follows_as_it_says(toys, history):
  states, _ = history
  assert set(states[0].frozen) == {*READ, "previous"}, "nothing is kept that nothing reads"
  policies = [jax.tree.map(lambda x: np.asarray(x, np.float64), s.params) for s in states]
  own = jax.tree.map(lambda x: np.asarray(x, np.float64), states[0].frozen)
  for update in range(1, UPDATES + 1):
    old, now = dict(own), policies[update]
    own["average"] = mix(0.7, old["average"], now)
    if update % 2 == 0:
      own["before"], own["previous"], own["lagging"] = old["previous"], now, policies[update - 1]
    if update % 3 == 0:
      own["slow"] = mix(0.5, old["slow"], old["average"])  # as it was before this update
    toys.close(states[update].frozen, own, rtol=1e-6)
  toys.same_bits(states[4].frozen["before"], states[2].params)
  toys.same_bits(states[4].frozen["lagging"], states[3].params)
  toys.same_bits(states[5].frozen["start"], states[0].frozen["start"])


def test_a_copy_is_what_the_policy_was_when_a_batch_is_read(history):
  """Read in the update after a copy, only what moved since tells them apart."""
  states, rows = history
  for update, row in enumerate(rows):
    for name in READ:
      model, policy = states[update].frozen[name], states[update].params
      equal = all((x == y).all() for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(policy)))
      assert (row[f"gap_{name}"] < 1e-6) == equal, (update, name)


def test_eight_devices_hold_the_models_of_one(toys, history):
  mesh = sharding.make_mesh(2, 2, 2)
  states, rows, state = trained(toys, mesh, updates=4)
  toys.close(states[4].frozen, history[0][4].frozen, rtol=1e-4)
  for name in READ:
    np.testing.assert_allclose(rows[3][f"gap_{name}"], history[1][3][f"gap_{name}"], rtol=1e-3, atol=1e-6)
  wanted = toys.shardings(learning(toys), mesh)
  jax.tree.map(lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)), state.frozen,
               wanted.frozen)


def small(**more):
  config = configs.load("configs/dpo.py")
  config.phases = ("preference",)
  config.preference.objective = [dict(name="dpo", beta=0.1), dict(name="kl", beta=0.1, model="before")]
  config.preference.optimizer.learning_rate = 3e-3
  config.frozen = dict(previous=dict(every=2), before=dict(every=2, follows="previous"))
  settings = {"data.task.digits": "1", "model.layers": "1", "model.d_model": "16", "model.d_ff": "32",
              "model.heads": "2", "model.kv_heads": "2", "evaluate.problems": "0", "evaluate.pairs": "0",
              "evaluate.samples": "0", "checkpoint.every": "1", "checkpoint.keep": "10",
              "optimizer.warmup_steps": "0", "compilation_cache": "off", "log.curves_every": "0",
              "preference.steps": "5", "preference.batch.examples": "4"}
  configs.override(config, settings | more)
  return config


def test_a_run_goes_on_after_a_stop_to_the_same_bits(tmp_path):
  run.run(small(), tmp_path / "whole", quiet=True)
  final = arrays_of(tmp_path / "whole", 5)
  assert {name.split("'")[3] for name in final if "frozen" in name} == {"reference", "previous", "before"}
  shutil.copytree(tmp_path / "whole", tmp_path / "again")
  for number in (4, 5):
    shutil.rmtree(tmp_path / "again" / "checkpoints" / str(number))
  (tmp_path / "again" / "summary.json").unlink()
  run.run(small(), tmp_path / "again", quiet=True)
  found = arrays_of(tmp_path / "again", 5)
  assert set(found) == set(final)
  for name, array in final.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)
  kl = [row["kl"] for row in map(json.loads, (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())
        if "grad_norm" in row]
  assert kl[0] == 0 and min(kl[1:]) > 0, "what lies two refreshes back is never the policy again"


@pytest.mark.parametrize("changes, message", [
    ({"frozen.other": "{'every': 1}"}, "config.frozen.other describes a model that nothing reads"),
    ({"frozen.previous.evry": "1"}, "config.frozen.previous has no field 'evry'; did you mean 'every'"),
    ({"frozen.before.follows": "preevious"}, "follows='preevious' is no model; did you mean 'previous'"),
    ({"frozen.previous.follows": "before"}, "-> previous -> before.* never comes to the policy"),
    ({"frozen.previous.decay": "1.0"}, "config.frozen.previous.decay=1.0 must be at least 0 and below 1"),
    ({"frozen.previous.every": "-1"}, "config.frozen.previous.every=-1 must be a number of updates"),
    ({"frozen.before.decay": "0.9", "model.param_dtype": "bfloat16"}, "moving average .* too small"),
    ({"frozen.before.lag": "True"}, "config.frozen.before.lag=True is about the policy"),
    ({"frozen.action": "{'every': 1}"}, "'action_values' is a signal of the policy"),
    ({"frozen.old": "{'every': 1}"}, "cannot be called 'old'"),
    ({"frozen.reference": "{'every': 1}"}, "config.reference has its settings"),
    ({"frozen.my_model": "{'every': 1}"}, "one word of small letters"),
    ({"reference.every": "-1"}, "config.reference.every=-1 must be a number of updates"),
    ({"preference.objective[1].model": "befor"},
     r"config.objective\[1\] \(kl\) needs 'befor_logprobs'.*no frozen model 'befor'; did you mean 'before'"),
])
def test_mistakes_are_refused_before_anything_is_computed(tmp_path, changes, message):
  config = small(**changes)
  if "preference.objective[1].model" in changes:
    config.frozen = dict(before=dict())
    config.preference.objective += [dict(name="mnpo", rho=0.0, models=["before"])]
  with pytest.raises(ValueError, match=f"(?s){message}"):
    run.run(config, tmp_path, quiet=True)


def test_followed_models_are_kept_with_those_that_follow():
  assert frozen.kept(MODELS, ["before"]) == ("previous", "before")
  assert frozen.kept(MODELS, ["slow"]) == ("average", "slow")
  assert frozen.kept(MODELS, []) == ()
