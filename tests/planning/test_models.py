"""Configs of published models: their shapes are the published ones, and their variants can be planned."""

import fnmatch
import importlib
import json
import pathlib

import huggingface_hub
import jax
import pytest

from jaxrl import config as configs
from jaxrl import planning
from jaxrl.models import DecoderConfig, families, init_parameters, pretrained
from jaxrl.training import sources

ROOT = pathlib.Path(__file__).parents[2]
PARAMETERS = {  # as counted by the hub; of Gemma's 4,300,079,472 those of its text model
    "qwen2_5_1_5b": 1_543_714_304, "qwen3_4b": 4_022_468_096, "llama3_8b": 8_030_261_248,
    "gemma3_4b": 4_300_079_472 - 416_866_032 - 2_950_272}
VARIANTS = [(name, variant) for name in PARAMETERS
            for variant in importlib.import_module(f"configs.models.{name}").MACHINES]
SMALL = dict(layers=2, d_model=64, heads=4, kv_heads=2, head_dim=16, d_ff=64, vocab_size=512,
             layer_types=("sliding", "full"))


def load(name, variant=""):
  return configs.load(f"{ROOT}/configs/models/{name}.py{':' * bool(variant)}{variant}")


def decoder_of(config):
  fields = {k: v for k, v in configs.to_dict(config.model).items() if k != "source"}
  fields |= {k: tuple(map(tuple, fields[k])) for k in ("rope_scaling", "heads_on_top")}
  fields |= {k: tuple(fields[k]) for k in ("layer_types", "verdict")}
  return DecoderConfig(**fields)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_stated_shape_has_the_published_number_of_parameters(name):
  decoder = decoder_of(load(name))
  shapes = jax.eval_shape(lambda: init_parameters(decoder, jax.random.key(0)))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_stated_shape_is_checked_against_the_models_own(name, tmp_path):
  config, place = load(name), tmp_path / "model"
  place.mkdir()
  hf = dict(families.hf_config(decoder_of(config)))
  (place / "config.json").write_text(json.dumps(hf))
  config.model.source = str(place)
  assert configs.to_dict(sources.filled(config, tmp_path / "run").model) == configs.to_dict(config.model)
  (place / "config.json").write_text(json.dumps(hf | {"intermediate_size": hf["intermediate_size"] + 128}))
  with pytest.raises(ValueError, match=r"config\.model\.d_ff=\d+, but that model has"):
    sources.filled(config, tmp_path / "run")


@pytest.mark.parametrize("name, variant", VARIANTS, ids="-".join)
def test_variants_are_for_machines_whose_devices_their_mesh_divides(name, variant):
  config, (machine, count) = load(name, variant), planning.target.parse(variant)
  shares = config.mesh.fsdp * config.mesh.tensor
  assert count % shares == 0 and config.mesh.data == -1
  decoder = decoder_of(config)
  assert all(getattr(decoder, field) % config.mesh.tensor == 0 for field in ("kv_heads", "d_ff", "vocab_size"))
  assert decoder.d_model % config.mesh.fsdp == 0
  # Rows and prompts divide over the devices, so that none is idle.
  assert config.rollout.prompts * 8 % (count // config.mesh.tensor) == 0
  # Parameters and gradients of float32 alone must fit; what else there is, the plan in the docstring says.
  size = 2 if config.model.param_dtype == "bfloat16" else 4
  assert PARAMETERS[name] * (size + 4) / shares < machine.hbm_bytes


def test_an_unknown_variant_is_refused_with_those_that_there_are():
  with pytest.raises(ValueError, match="no variant 'v9' for this model; there are v5e-8"):
    load("qwen3_4b", "v9")


def test_a_config_is_planned_without_network_data_or_tokenizer(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  config = load("gemma3_4b", "h200-1")
  config.model.update(SMALL)
  config.data.max_prompt_tokens = 48
  config.rollout.update(prompts=2, episode=dict(name="group", samples=2), max_tokens=16)
  config.batch.update(row_length=64, micro_batch_rows=4)
  config.evaluate.problems = 0
  plan = planning.plan(config, planning.find("h100-1"))
  assert plan.fits and plan.mesh == dict(data=1, fsdp=1, tensor=1)
  phase, = plan.phases
  assert phase.sampling.prompt == config.data.max_prompt_tokens
  text = planning.text(plan)
  assert "google/gemma-3-4b-it is not at hand: its shape is the one that the config states" in text
  assert "no file 'gsm8k/train.jsonl'" in text and "XLA for CPUs, in place of that of GPUs" in text


def test_no_weights_are_downloaded_to_plan(monkeypatch, tmp_path):
  asked = []

  def snapshot(source, allow_patterns, **_):
    asked.append((source, allow_patterns))
    raise OSError("no network")
  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
  config = load("qwen3_4b")
  with pytest.raises(pretrained.NotHere, match="hf download Qwen/Qwen3-4B"):
    sources.filled(config, tmp_path)
  (source, patterns), = asked
  assert source == "Qwen/Qwen3-4B"
  wanted = [name for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors")
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
  assert wanted == ["config.json", "generation_config.json", "tokenizer.json"]
