"""Runs that train adapters: nothing else moves, nothing else has moments, and one base serves all."""

import dataclasses
import json
import pathlib

from flax import traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from configs import base as base_config
from jaxrl import advantages, cli, compose, data, objectives, sharding
from jaxrl import config as configs
from jaxrl.batch import pack
from jaxrl.config import ConfigError
from jaxrl.models import peft
from jaxrl.models.adapters import A, B, Adapter
from jaxrl.training import builders, inputs, run, sources
from jaxrl.training import state as states
from jaxrl.training.checkpoints import CheckpointError, read_parameters
from jaxrl.training.learner import make_learner, to_micro_batches
from jaxrl.training.stopping import Stop, Stopped

ADAPTERS = dict(first=dict(rank=2, targets="query|down", layers=(1,)),
                second=dict(rank=3, alpha=6.0, targets="attention", rank_stabilized=True))
SCALES = dict(first=16 / 2, second=6 / 3 ** 0.5)


def config_of(*phases, **fields):
  """Supervised updates, then GRPO with a KL to the reference, of a model of two layers."""
  config = base_config.get_config()
  config.compilation_cache = "off"
  config.data.update(train="task:addition", task=dict(digits=1), task_size=300, max_prompt_tokens=8,
                     max_completion_tokens=8)
  config.tokenizer.alphabet = "0123456789+="
  config.model.update(layers=2, d_model=16, heads=2, kv_heads=1, d_ff=32)
  config.batch.update(row_length=32, examples=8)
  config.rollout.update(prompts=2, episode=dict(name="group", samples=4), max_tokens=4)
  config.reward.criteria = [dict(name="overlong", max_tokens=4, buffer=4)]
  config.optimizer.learning_rate = 1e-2
  config.evaluate.update(samples=0)
  config.log.update(samples_every=0, curves_every=0)
  config.phases = phases
  config.sft = dict(kind="sft", steps=2, objective=[dict(name="cross_entropy")])
  config.rl = dict(kind="rl", steps=3, objective=[dict(name="clipped_surrogate"), dict(name="kl", beta=0.1)])
  configs.override(config, {path: repr(value) if not isinstance(value, str) else value
                            for path, value in fields.items()})
  return config


class StopAt(Stop):
  """Asks a run to stop after an update."""

  def __init__(self, update):
    super().__init__()
    self._update = update

  def agreed(self, updates):
    return updates == self._update


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A run that trains all of a model; one that starts there with two adapters, of which each phase trains
  one; and the same stopped on the way and continued."""
  place = tmp_path_factory.mktemp("adapters")
  run.run(config_of("sft"), place / "base", quiet=True)
  config = config_of("sft", "rl", **{"model.adapters": ADAPTERS, "sft.optimizer.adapters": ("first",),
                                     "rl.optimizer.adapters": ("second",)}, start=str(place / "base"))
  run.run(config, place / "tuned", quiet=True)
  with pytest.raises(Stopped):
    run.run(config, place / "stopped", quiet=True, stop=StopAt(4))
  run.run(config, place / "stopped", quiet=True)
  return place


def parameters_of(workdir, config=None):
  config = config or configs.of_run(workdir)
  decoder = inputs.decoder_config(config.model, data.load_tokenizer(workdir / "tokenizer"))
  return decoder, traverse_util.flatten_dict(jax.device_get(read_parameters(
      workdir / "checkpoints", states.abstract_parameters(decoder, sharding.make_mesh(1, 1, 1, jax.devices()[:1])))))


def test_only_adapters_change_and_a_stopped_run_comes_to_the_same_bits(runs):
  _, before = parameters_of(runs / "base")
  _, after = parameters_of(runs / "tuned")
  _, again = parameters_of(runs / "stopped")
  assert all(np.array_equal(after[path], x) for path, x in before.items())
  mine = {path for path in after if path not in before}
  assert {path[-2:] for path in mine} == {(name, half) for name in ADAPTERS for half in (A, B)}
  assert all(np.any(after[path]) for path in mine), "both have learned"
  assert after.keys() == again.keys() and all(np.array_equal(again[path], x) for path, x in after.items())


def test_the_sampler_agrees_and_the_reference_is_the_policy_of_the_phases_start(runs):
  rows = [json.loads(line) for line in (runs / "tuned" / "metrics.jsonl").read_text().splitlines()]
  rl = [row for row in rows if row["phase"] == "rl" and "kl" in row]
  assert len(rl) == 3 and all(0 <= row["logprob_gap"] < 1e-4 for row in rl)
  assert rl[0]["kl"] == 0 and rl[-1]["kl"] > 0 and rl[0]["grad_norm"] > 0


def test_an_adapter_that_the_next_run_does_not_have_is_merged_into_its_matrices(runs):
  _, tuned = parameters_of(runs / "tuned")
  decoder, _ = parameters_of(runs / "base")
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  key = jax.random.key_data(jax.random.key(0))
  first = inputs.decoder_config(dict(configs.of_run(runs / "base").model, adapters=dict(first=ADAPTERS["first"])),
                                data.load_tokenizer(runs / "base" / "tokenizer"))
  for kept, own in (((), decoder), (("first",), first)):
    found = traverse_util.flatten_dict(sources.continued(
        str(runs / "tuned"), own, states.initial_parameters(own, key, mesh), mesh))
    assert {path[-2] for path in found if path[-1] == A} == set(kept)
    for path, x in found.items():
      expected = np.asarray(tuned[path], np.float64)
      for name in ADAPTERS:
        a, b = (tuned.get((*path[:-1], name, half)) for half in (A, B))
        if path[-1] == "kernel" and name not in kept and a is not None:
          expected = expected + SCALES[name] * np.tensordot(a.astype(np.float64), b.astype(np.float64), 1)
      np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-7)
  with pytest.raises(CheckpointError, match="has the adapters first, second, without which it is another model"):
    parameters_of(runs / "tuned", configs.of_run(runs / "base"))


def test_exported_they_are_pefts_and_merged_they_are_a_model(runs, tmp_path):
  cli.main(["export", f"--workdir={runs / 'tuned'}", f"--output={tmp_path / 'two'}"])
  cli.main(["export", f"--workdir={runs / 'tuned'}", f"--output={tmp_path / 'whole'}", "--merge-adapters"])
  whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
  base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "base")
  for name, scale in SCALES.items():
    stated = json.loads((tmp_path / "two" / name / peft.CONFIG).read_text())
    assert stated["base_model_name_or_path"] == str(tmp_path / "two" / "base")
    tensors = safetensors.numpy.load_file(tmp_path / "two" / name / peft.TENSORS)
    assert len(tensors) == 2 * (2 if name == "first" else 8)
    for key, a in tensors.items():
      if ".lora_A." in key:
        weight = base.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")).weight
        change = scale * tensors[key.replace("_A.", "_B.")].astype(np.float64) @ a.astype(np.float64)
        weight.data += torch.tensor(change.astype(np.float32))
  ids = torch.tensor([[1, 5, 3, 8, 2]])
  with torch.no_grad():
    np.testing.assert_allclose(base(ids).logits, whole(ids).logits, atol=1e-5)
  with pytest.raises(SystemExit):
    cli.main(["export", f"--workdir={runs / 'base'}", f"--output={tmp_path / 'no'}", "--merge-adapters"])

  # One adapter, named as the source, and its base: it begins where the other run ended.
  (tmp_path / "one").mkdir()
  for file in (tmp_path / "two" / "second").iterdir():
    file.rename(tmp_path / "one" / file.name)
  config = config_of("sft", **{"model.source": str(tmp_path / "one")})
  config.model.update({k: v for k, v in base_config.get_config().model.items() if k in (
      "layers", "d_model", "heads", "kv_heads", "d_ff")})
  config.tokenizer.alphabet = ""
  config = sources.filled(config, tmp_path / "run")
  assert config.model.source == str(tmp_path / "two" / "base")
  parts = builders.build_parts(config, tmp_path / "run", print)
  found = traverse_util.flatten_dict(sources.parameters(
      config.model.source, parts.decoder, jax.random.key_data(jax.random.key(0)), parts.mesh,
      sources.of_adapters(config)))
  _, tuned = parameters_of(runs / "tuned")
  for path, x in found.items():
    path = tuple("second" if name == "default" else name for name in path)
    np.testing.assert_array_equal(x, tuned[path])
  params, key = traverse_util.unflatten_dict(found), jax.random.key_data(jax.random.key(0))
  started = traverse_util.flatten_dict(builders.start_state(parts, parts.phases[0], params, key).params)
  assert all((started[path] is x) == (path[-1] not in (A, B)) for path, x in found.items()), "no copy of the base"
  assert parts.decoder.adapters[0].scale == pytest.approx(SCALES["second"])
  parts.scorer.close()


@pytest.mark.parametrize("fields, message", [
    ({"model.adapters": "dict(a=dict(targets='gates'))"}, "a.targets='gates' matches no matrix; there are attention.k"),
    ({"model.adapters": "dict(a=dict(layers=[2]))"}, "adapters.a.layers names [2], but there are layers 0 to 1"),
    ({"model.adapters": "dict(a=dict(source='x'))"}, "a.source='x' is named after the tensors of a published model"),
    ({"model.adapters": "dict(style=dict())", "optimizer.adapters": "('stile',)"},
     "in phase sft: config.model.adapters has no 'stile'; did you mean 'style'"),
    ({"optimizer.adapters": "('style',)"}, "config.model.adapters is empty; name them there"),
    ({"reference.adapted": "False", "sft.objective": "[dict(name='cross_entropy'), dict(name='kl', beta=0.1)]"},
     "config.reference.adapted=False in phase sft switches adapters off, but"),
    ({"model.adapters": "dict(a=dict())", "optimizer.transforms": "[dict(name='project_onto_null_space')]"},
     "matches no matrix that is trained, so nothing would move"),
    ({"model.adapters": "dict(second=dict(rank=3))", "start": "tuned"},
     "use the same settings to train it further, or another name")])
def test_what_would_train_nothing_or_something_else_is_refused(runs, tmp_path, fields, message):
  fields = {path: str(runs / "tuned") if value == "tuned" else value for path, value in fields.items()}
  with pytest.raises(ConfigError) as error:
    run.run(config_of("sft", **fields), tmp_path / "run", quiet=True)
  assert message in str(error.value)
  assert not pathlib.Path(tmp_path / "run" / "checkpoints").exists()


# ---------------------------------------------------------------------------------------- updates


def setup(toys, mesh):
  decoder = dataclasses.replace(toys.decoder, layers=2, scan_layers=True, heads_on_top=(("value", 1),), adapters=(
      Adapter("one", rank=2, targets="query|mlp"), Adapter("other", rank=3)))
  terms = [dict(name="clipped_surrogate"), dict(name="kl", beta=0.3), dict(name="value_loss")]
  parts = toys.learning("grpo", decoder=decoder, trains=("other",), advantage=[
      compose.build(dict(name="gae"), advantages)], terms=[
      compose.build(term, objectives) for term in terms], aggregations=toys.learning().aggregations[:1] * 3)
  abstract = states.abstract_state(decoder, mesh, parts.optimizer, frozen=parts.kept, carried=parts.carried,
                                   trains=parts.trains)
  params = jax.device_get(states.initial_parameters(decoder, jax.random.key_data(jax.random.key(0)),
                                                    toys.one_device()))
  flat = traverse_util.flatten_dict(params)
  params = traverse_util.unflatten_dict({path: x if path[-1] != B else np.random.default_rng(x.size).normal(
      size=x.shape).astype(np.float32) * 0.2 for path, x in flat.items()})
  state = states.start_phase(params, jax.random.key_data(jax.random.key(0)), parts.optimizer,
                             carried=parts.carried, frozen=parts.kept, part=parts.part(params))
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  host = pack(toys.rollouts(), row_length=16, rows_multiple=8)
  return (make_learner(parts, shardings), params, jax.device_put(state, shardings),
          sharding.put_batch(to_micro_batches(host, 8), mesh))


def updated(toys, mesh):
  """Parameters on the host, the state after two updates, where its base lay after the first, and gradient
  and metrics of that."""
  learner, params, state, batch = setup(toys, mesh)
  with jax.set_mesh(mesh):
    batch = learner.prepare(state, batch)[1]
    state, metrics = learner.update(state, batch)
    found = jax.tree.map(np.array, jax.device_get((toys.gradient(state), metrics)))
    places = {path: place(x) for path, x in traverse_util.flatten_dict(state.params).items()}
    state, _ = learner.update(state, batch)
  return params, places, state, found


def place(x):
  return x.addressable_shards[0].data.unsafe_buffer_pointer()


@pytest.fixture(scope="module")
def on_one_device(toys):
  return updated(toys, toys.one_device())


def test_an_update_moves_one_adapter_and_the_head_and_leaves_the_base_in_its_buffers(toys, on_one_device):
  before, places, state, _ = on_one_device
  old, new = map(traverse_util.flatten_dict, (before, state.params))
  for path, x in new.items():
    trained = path[-2] == "other" or path[1] == "value_head"
    assert trained or place(x) == places[path], path
    assert np.array_equal(x, old[path]) != trained, path
  own = {path for path in new if path[-2] == "other" or path[1] == "value_head"}
  for tree in (toys.gradient(state), state.frozen["reference"]):
    assert traverse_util.flatten_dict(tree).keys() == own
  # The reference is the policy of the start over the very arrays of the base.
  reference = traverse_util.flatten_dict(state.reference)
  for path, x in reference.items():
    assert (x is new[path]) == (path not in own)
    np.testing.assert_array_equal(x, old[path])


def test_an_update_on_a_mesh_is_that_of_one_device_and_adapters_are_split_as_their_matrices(toys, on_one_device):
  mesh = sharding.make_mesh(2, 2, 2)
  _, _, state, found = updated(toys, mesh)
  toys.close(found, on_one_device[3])
  flat = traverse_util.flatten_dict(state.params)
  specs = {path[-1]: flat[path].sharding.spec for path in flat if path[2:5] == ("mlp", "up", "other")}
  assert specs == {A: jax.P(None, "fsdp", None), B: jax.P(None, None, "tensor")}
