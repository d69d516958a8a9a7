"""Adapters written by hand in PEFT's format: read, computed with, written and read again.

PEFT itself is not needed: its matrices are defined by `W + scale * lora_B lora_A`, which NumPy makes here, and
transformers computes with.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

from jaxrl.models import adapters, families, peft, pretrained
from tests.models import published

SEEDS = np.random.default_rng(3)
CONFIG = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path="base", r=3, lora_alpha=6,
              lora_dropout=0.1, target_modules=["q_proj", "o_proj", "down_proj"], bias="none", use_rslora=False)
MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def written(directory, made, *, at="model.layers", layers=(0, 1), scale=2.0, dtype=np.float32, modules=MODULES,
            **changes):
  """An adapter with random matrices, and the model as it is with them."""
  tensors, rank = {}, CONFIG["r"]
  for layer in layers:
    for name in modules:
      module = f"{at}.{layer}.{name}"
      weight = made.get_submodule(module).weight
      a = SEEDS.normal(size=(rank, weight.shape[1])).astype(dtype)
      b = SEEDS.normal(size=(weight.shape[0], rank)).astype(dtype)
      tensors[f"base_model.model.{module}.lora_A.weight"] = a
      tensors[f"base_model.model.{module}.lora_B.weight"] = b
      changed = weight.detach().numpy().astype(np.float64) + scale * (b.astype(np.float64) @ a.astype(np.float64))
      weight.data = torch.tensor(changed.astype(np.float32))
  directory.mkdir()
  safetensors.numpy.save_file(tensors, directory / peft.TENSORS)
  (directory / peft.CONFIG).write_text(json.dumps({**CONFIG, **changes}))
  return tensors


def read(base, directory, **choices):
  """Decoder and parameters of a base with an adapter."""
  decoder, architecture = published.decoder_of(base, **choices), families.architecture_of(published.config_of(base))
  found = peft.settings(directory, decoder, architecture)
  decoder = dataclasses.replace(decoder, adapters=adapters.read({"mine": found}))
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=None), published.abstract(decoder))
  params = pretrained.load_parameters(base, decoder, abstract)
  return decoder, architecture, adapters.joined(params, peft.load(directory, decoder, architecture, "mine", abstract))


@pytest.mark.parametrize("family, scan, how", [
    ("qwen2", False, dict()), ("qwen2", True, dict(layers=(1,), layers_to_transform=[1])),
    ("gemma2", False, dict(scale=6 / 3 ** 0.5, use_rslora=True, dtype=np.float16))])
def test_it_computes_what_transformers_does_with_the_sum_and_comes_out_as_it_came_in(tmp_path, family, scan, how):
  base = tmp_path / "base"
  made = published.saved(family, base)
  before = published.logits_of(made)
  tensors = written(tmp_path / "adapter", made, **how)
  decoder, architecture, params = read(base, tmp_path / "adapter", scan_layers=scan)
  expected = published.logits_of(made)
  np.testing.assert_allclose(published.our_logits(decoder, params), expected, atol=2e-3 * np.abs(expected).max())
  assert np.abs(expected - before).max() > 0.05 * np.abs(expected).max()

  adapter, dtype = decoder.adapters[0], how.get("dtype", np.float32).__name__
  (tmp_path / "again").mkdir()
  peft.check_exportable(decoder, adapter, architecture)
  peft.save(params, decoder, adapter, architecture, tmp_path / "again", base=str(base), dtype=dtype)
  again = safetensors.numpy.load_file(tmp_path / "again" / peft.TENSORS)
  assert again.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(again[name], tensor)
    assert again[name].dtype == tensor.dtype
  stated = json.loads((tmp_path / "again" / peft.CONFIG).read_text())
  assert stated["target_modules"] == sorted(CONFIG["target_modules"])
  for key in ("peft_type", "task_type", "r", "lora_alpha", "bias", "use_rslora", "layers_to_transform"):
    assert stated[key] == {**CONFIG, "layers_to_transform": None, **how}[key], key
  third = read(base, tmp_path / "again", scan_layers=scan)
  assert third[0] == decoder
  jax.tree.map(np.testing.assert_array_equal, third[2], params)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
  place = tmp_path_factory.mktemp("qwen")
  return place, published.saved("qwen2", place / "base")


def drop(tensors):
  tensors.pop("base_model.model.model.layers.1.mlp.down_proj.lora_A.weight")


def drop_module(tensors):
  drop(tensors)
  tensors.pop("base_model.model.model.layers.1.mlp.down_proj.lora_B.weight")


def misname(tensors):
  tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((3, 32), np.float32)


def widen(tensors):
  tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"] = np.zeros((3, 47), np.float32)


@pytest.mark.parametrize("changes, spoil, message", [
    (dict(use_dora=True), None, "has use_dora=True, which is not supported: it must be False or absent"),
    (dict(peft_type="IA3"), None, "has peft_type='IA3', which is not supported: it must be 'LORA'"),
    (dict(modules_to_save=["lm_head"]), None, "has modules_to_save=['lm_head'], which is not supported"),
    (dict(rank_pattern={"q_proj": 4}), None, "has rank_pattern={'q_proj': 4}"),
    (dict(init_lora_weights="pissa"), None, "has init_lora_weights='pissa'"),
    (dict(layer_replication=[[0, 1], [0, 1]]), None, "has layer_replication=[[0, 1], [0, 1]]"),
    (dict(), drop, "layer 1 has one half only of mlp.down"),
    (dict(), drop_module, "layers differ in what is adapted: 5 matrices"),
    (dict(), misname, "base_model.model.lm_head.lora_A.weight would not be used"),
    (dict(), widen, "layers.0.mlp.down_proj.lora_A.weight is F32[3, 47], but [3, 48]")])
def test_what_is_not_supported_is_refused_by_name(qwen, tmp_path, changes, spoil, message):
  base, made = qwen
  tensors = written(tmp_path / "adapter", made, **changes)
  if spoil:
    spoil(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "adapter" / peft.TENSORS)
  with pytest.raises(ValueError) as error:
    read(base / "base", tmp_path / "adapter")
  assert message in str(error.value)


def test_one_tensor_that_is_several_matrices_here_has_no_adapter(tmp_path):
  made = published.saved("phi3_fused", tmp_path / "base")
  written(tmp_path / "adapter", made, modules=("self_attn.qkv_proj",))
  with pytest.raises(ValueError, match="qkv_proj.lora_A.weight would not be used, for that is several matrices here"):
    read(tmp_path / "base", tmp_path / "adapter")
  decoder = published.decoder_of(tmp_path / "base")
  peft.check_exportable(decoder, adapters.Adapter("a", targets="output|down"), "Phi3ForCausalLM")
  with pytest.raises(ValueError, match="gate_up_proj.weight is one tensor of Phi3ForCausalLM and several"):
    peft.check_exportable(decoder, adapters.Adapter("a", targets="up"), "Phi3ForCausalLM")


def test_an_adapter_of_a_model_that_reads_images_is_one_of_its_text_part(tmp_path):
  made = published.model_of_images()
  made.save_pretrained(tmp_path / "base")
  before = published.logits_of(made)
  written(tmp_path / "adapter", made, at="model.language_model.layers")
  decoder, _, params = read(tmp_path / "base", tmp_path / "adapter")
  expected = published.logits_of(made)
  assert np.abs(expected - before).max() > 0.05 * np.abs(expected).max()
  np.testing.assert_allclose(published.our_logits(decoder, params), expected, atol=2e-3 * np.abs(expected).max())
