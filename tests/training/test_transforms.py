"""Transformations in the learner: gradients of losses of their own, on any mesh, resumed to the same bits."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxrl import compose
from jaxrl import config as configs
from jaxrl import objectives
from jaxrl import sharding
from jaxrl.batch import pack
from jaxrl.objectives.aggregate import Aggregation
from jaxrl.training import optimizers
from jaxrl.training import run
from jaxrl.training.learner import make_learner
from jaxrl.training.learner import to_micro_batches
from jaxrl.training.references import Reference

ROWS, NAME = 8, "0_project_out_references"
SGD = dict(name="sgd", learning_rate=0.5, schedule="constant", warmup_steps=0, final_fraction=0.1, b1=0.0,
           b2=0.95, epsilon=1e-8, weight_decay=0.0, clip_norm=0.0,
           transforms=[dict(name="project_out_references", references=[], every=2)])


def packed(trajectories):
  return pack(trajectories, row_length=16, rows_multiple=ROWS, min_rows=16, min_sequences=16)


def reference_of(trajectories, micro_batch_rows):
  return Reference([compose.build("cross_entropy", objectives)], [Aggregation("sequence_mean")],
                   [packed(trajectories).replace(micro_batch_rows=micro_batch_rows)])


def projected(toys, mesh, *, micro_batch_rows=16, updates=1):
  """States after each update with the projection in the optimiser."""
  pieces = optimizers.read_transforms(
      SGD, lambda specs, where: [reference_of(toys.rollouts(seed=5), micro_batch_rows)])
  parts = toys.learning("sft", optimizer=optimizers.build(SGD, 10, pieces), transforms=pieces)
  shardings = toys.shardings(parts, mesh)
  learner = make_learner(parts, shardings)
  state = toys.start(parts, mesh)
  opt_state = jax.device_put(optimizers.begin(pieces, state.opt_state, None), shardings.opt_state)
  state = state.replace(opt_state=opt_state)
  batch = sharding.put_batch(to_micro_batches(packed(toys.rollouts()), ROWS), mesh)
  found = []
  with jax.set_mesh(mesh):
    for _ in range(updates):
      state, _ = learner.update(state, learner.prepare(state, batch)[1])
      found.append(jax.device_get(state))
  return found


def gradient_on(toys, trajectories, kind, params=None):
  """The gradient of a loss by an update of the learner on that batch alone."""
  parts = toys.learning("sft", aggregations=[Aggregation(kind)])
  state = toys.start(parts)
  if params is not None:
    state = state.replace(params=jax.device_put(params, jax.tree.map(lambda x: x.sharding, state.params)))
  learner = make_learner(parts, toys.shardings(parts, toys.one_device()))
  batch = sharding.put_batch(to_micro_batches(packed(trajectories), ROWS), toys.one_device())
  return toys.gradient(learner.update(state, learner.prepare(state, batch)[1])[0])


def unit(tree):
  return jax.tree.map(lambda x: x / np.linalg.norm(x), jax.device_get(tree))


def test_the_basis_is_the_reference_gradient_and_the_update_is_orthogonal_to_it(toys):
  before = toys.parameters(0)
  first, second, third = projected(toys, toys.one_device(), updates=3)
  for state, params in ((first, before), (second, before), (third, second.params)):  # every second update
    expected = unit(gradient_on(toys, toys.rollouts(seed=5), "sequence_mean", params))
    toys.close(state.opt_state[NAME].basis[0], expected, rtol=2e-4)
  gradient = jax.device_get(gradient_on(toys, toys.rollouts(), "token_mean"))
  u = unit(gradient_on(toys, toys.rollouts(seed=5), "sequence_mean"))

  def expected(p, g, e):
    return np.float64(p) - 0.5 * (np.float64(g) - np.sum(np.float64(g) * e) * e)
  toys.close(first.params, jax.tree.map(expected, before, gradient, u), rtol=1e-5)


def test_eight_devices_and_other_micro_batches_give_the_same_update(toys):
  mesh = sharding.make_mesh(2, 2, 2)
  expected = projected(toys, toys.one_device(), updates=2)[-1]
  found = projected(toys, mesh, micro_batch_rows=4, updates=2)[-1]
  toys.close((found.params, found.opt_state[NAME].basis), (expected.params, expected.opt_state[NAME].basis),
             rtol=2e-5)


def test_states_are_sharded_like_the_parameters(toys):
  mesh = sharding.make_mesh(2, 2, 2)
  transforms = [dict(name="project_onto_null_space", clip=1.0)]
  pieces = optimizers.read_transforms(SGD | dict(transforms=transforms), None)
  parts = toys.learning("sft", optimizer=optimizers.build(SGD, 10, pieces), transforms=pieces)
  shardings = toys.shardings(parts, mesh)
  kernel = shardings.params["params"]["blocks_0"]["mlp"]["up"]["kernel"]
  state = shardings.opt_state["0_project_onto_null_space"]
  for tree in (state.taken, state.moved):
    assert tree["params.blocks_0.mlp.up.kernel"].spec == kernel.spec != jax.P()


def small(**more):
  """Two phases of preferences, the second off what the first has moved."""
  config = configs.load("configs/methods/orthalign.py")
  configs.override(config, {
      "data.task_size": "200", "model.layers": "1", "model.d_model": "16", "model.d_ff": "32",
      "model.heads": "2", "model.kv_heads": "2", "evaluate.problems": "0", "evaluate.pairs": "8",
      "evaluate.samples": "0", "checkpoint.every": "1", "checkpoint.keep": "20", "first.steps": "2",
      "second.steps": "2", "optimizer.warmup_steps": "0", "compilation_cache": "off",
      "log.curves_every": "0", "batch.row_length": "32", "first.batch.examples": "8",
      "second.batch.examples": "8"} | more)
  return config


def kernels(place, number):
  with ocp.PyTreeCheckpointer() as checkpointer:
    params = checkpointer.restore(place / "checkpoints" / str(number) / "state")["params"]["params"]
  return {jax.tree_util.keystr(path): np.asarray(x, np.float64)
          for path, x in jax.tree_util.tree_leaves_with_path(params)}


def test_a_second_phase_leaves_the_outputs_of_the_first_and_a_metric_may_set_the_width(tmp_path):
  config = small(**{"second.optimizer.transforms[0].metric": "pairs/preference_margin",
                    "second.optimizer.transforms[0].tolerance": "1e9"})
  run.run(config, tmp_path / "run", quiet=True)
  parts_after = kernels(tmp_path / "run", 2), kernels(tmp_path / "run", 4)
  name = "['blocks_0']['mlp']['up']['kernel']"
  with ocp.PyTreeCheckpointer() as checkpointer:
    state = checkpointer.restore(tmp_path / "run" / "checkpoints" / "4" / "state")["opt_state"]
  taken = state["0_project_onto_null_space"]["taken"]["params.blocks_0.mlp.up.kernel"]
  assert (np.linalg.norm(taken, axis=1) > 0.5).sum() == 1  # with any tolerance all but 1/64 is free
  move = parts_after[1][name] - parts_after[0][name]
  assert np.linalg.norm(move) > 1e-6
  assert np.linalg.norm(move @ taken.T) < 1e-3 * np.linalg.norm(move)  # parameters round
  np.testing.assert_array_equal(parts_after[0]["['final_norm']['scale']"],
                                parts_after[1]["['final_norm']['scale']"])


@pytest.mark.parametrize("changes, message", [
    ({"phases": "('second',)"}, "first of a run without config.start"),
    ({"second.optimizer.transforms": "[dict(name='project_out')]"}, "did you mean"),
    ({"second.optimizer.transforms": "[dict(name='project_out_references', references=[dict(exampels=2)])]"},
     r"references\[0\] has no field 'exampels'; did you mean 'examples'"),
    ({"second.optimizer.transforms": "[dict(name='project_out_references', references=[dict("
      "data=dict(train='task:nothing'))])]"}, "config.data.train='task:nothing'"),
    ({"second.optimizer.transforms": "[dict(name='project_out_references', references=[dict("
      "examples=4, parts=5)])]"}, r"parts=5 must be 1 to examples=4"),
    ({"second.optimizer.transforms": "[dict(name='project_out_references', references=[dict("
      "objective=[dict(name='bco')])])]"}, "bco remembers something"),
])
def test_bad_settings_are_refused_before_anything_is_computed(tmp_path, changes, message):
  config = small()
  for path, value in changes.items():
    if path == "phases":
      config.phases = eval(value)
    else:
      config.second.optimizer.transforms = eval(value)
  with pytest.raises(configs.ConfigError, match=message):
    run.run(config, tmp_path / "run", quiet=True)
