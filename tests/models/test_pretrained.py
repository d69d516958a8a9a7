"""Directories that transformers wrote are read, and what is written transformers reads."""

import json
import subprocess
import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from jaxrl import sharding
from jaxrl.models import Decoder, pretrained
from jaxrl.training import state as states
from tests.models import published
from tests.models.published import abstract, config_of, decoder_of


def load(directory, **choices):
  decoder = decoder_of(directory, **choices)
  return decoder, pretrained.load_parameters(directory, decoder, abstract(decoder))


def save(params, decoder, directory, **options):
  pretrained.save(params, decoder, directory, **{**dict(
      dtype="float32", tokenizer=published.NoTokenizer(), card="# a card\n"), **options})


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  return all(np.array_equal(np.asarray(x), np.asarray(y)) and x.dtype == y.dtype
             for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


# In a config of ours fused tensors become separate ones, and gelu_new becomes gelu_pytorch_tanh.
ROUNDED = ("phi3_fused", "neox_sequential_tied")


@pytest.mark.parametrize("name", published.CONFIGS)
def test_logits_equal_and_export_gives_them_back(name, tmp_path):
  theirs = published.saved(name, tmp_path / "in")
  expected = published.logits_of(theirs)
  decoder, params = load(tmp_path / "in")
  assert np.std(expected) > 0.3
  np.testing.assert_allclose(published.our_logits(decoder, params), expected, atol=2e-4, rtol=0)

  save(params, decoder, tmp_path / "own", max_positions=128)  # as if the model were from here
  save(params, decoder, tmp_path / "kept", imported=config_of(tmp_path / "in"))
  for place in ("own", "kept"):
    assert equal(load(tmp_path / place)[1], params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / place, attn_implementation="eager")
    np.testing.assert_allclose(published.logits_of(again.eval()), expected, rtol=0,
                               atol=2e-6 if place == "own" and name in ROUNDED else 0)
  read = config_of(tmp_path / "in")
  assert {k: v for k, v in config_of(tmp_path / "kept").items() if k in read} == read


@pytest.mark.parametrize("name", published.SCORES)
def test_score_of_a_reward_model_equals(name, tmp_path):
  theirs = published.saved(name, tmp_path / "in", scores=True)
  decoder, params = load(tmp_path / "in")
  with torch.no_grad():
    expected = theirs(torch.tensor(published.tokens())).logits.numpy()  # of the last token
  hidden = published.hidden_of(decoder, params)
  scores = Decoder(decoder).apply(params, "score", hidden, method="head")
  assert np.std(expected) > 0.004
  np.testing.assert_allclose(scores[:, -1], expected, atol=2e-4, rtol=0)

  save(params, decoder, tmp_path / "out", max_positions=128)
  again = transformers.AutoModelForSequenceClassification.from_pretrained(
      tmp_path / "out", attn_implementation="eager").eval()
  with torch.no_grad():
    np.testing.assert_array_equal(again(torch.tensor(published.tokens())).logits.numpy(), expected)


def test_a_score_may_have_no_bias_as_published_ones(tmp_path):
  published.saved("llama", tmp_path / "in", scores=True)
  decoder, params = load(tmp_path / "in", score_bias=False)
  assert list(params["params"]["score_head"]) == ["kernel"]
  save(params, decoder, tmp_path / "out")
  assert equal(load(tmp_path / "out", score_bias=False)[1], params)
  with_bias = load(tmp_path / "out")[1]["params"]["score_head"]
  assert np.asarray(with_bias["bias"]).tolist() == [0.0]


def test_score_with_a_bias_is_not_exported(tmp_path):
  published.saved("llama", tmp_path / "in", scores=True)
  decoder, params = load(tmp_path / "in")
  params["params"]["score_head"]["bias"] = params["params"]["score_head"]["bias"] + 0.5
  with pytest.raises(ValueError, match="bias of 0.5.*config.model.score_bias=False"):
    save(params, decoder, tmp_path / "out")
  assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["llama_linear_biases", "gemma3", "phi3_fused", "neox", "qwen3_moe"])
def test_stacked_layers_hold_the_same(name, tmp_path):
  theirs = published.saved(name, tmp_path / "in")
  decoder, params = load(tmp_path / "in", scan_layers=True)
  np.testing.assert_allclose(published.our_logits(decoder, params), published.logits_of(theirs),
                             atol=2e-4, rtol=0)
  save(params, decoder, tmp_path / "out")
  assert equal(load(tmp_path / "out")[1], load(tmp_path / "in")[1])


def test_shards_are_written_and_read(tmp_path):
  theirs = published.saved("qwen3", tmp_path / "in")
  decoder, params = load(tmp_path / "in")
  save(params, decoder, tmp_path / "out", max_shard_bytes=20_000)
  files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
  assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
  sizes = [(tmp_path / "out" / f).stat().st_size for f in files]
  assert max(sizes) < 20_000 + 4_000  # headers
  assert equal(load(tmp_path / "out")[1], params)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
  np.testing.assert_array_equal(published.logits_of(again.eval()), published.logits_of(theirs))

  (tmp_path / "out" / files[1]).unlink()
  with pytest.raises(ValueError, match=f"{files[1]}.*download is incomplete"):
    pretrained.check(tmp_path / "out", decoder)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_parameters_lie_as_training_wants_them(scan_layers, tmp_path):
  published.saved("llama_linear_biases", tmp_path / "in")
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  # 61 tokens do not divide over tensor=2, so this one has 62.
  torch.manual_seed(0)
  config = transformers.LlamaConfig(**dict(published.SHAPE, vocab_size=62))
  published.model(config).save_pretrained(tmp_path / "even")
  decoder = decoder_of(tmp_path / "even", scan_layers=scan_layers)
  params = pretrained.load_parameters(tmp_path / "even", decoder, states.abstract_parameters(decoder, mesh))
  wanted = states.parameter_shardings(decoder, mesh)
  for leaf, where in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
    assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
  assert equal(params, load(tmp_path / "even", scan_layers=scan_layers)[1])
  save(params, decoder, tmp_path / "out")
  assert equal(load(tmp_path / "out", scan_layers=scan_layers)[1], params)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_host_holds_little_more_than_a_tensor_at_a_time(scan_layers, tmp_path):
  """Beside the pages of a shard, which the system may take back: it is mapped, not read."""
  config = transformers.LlamaConfig(**{**published.SHAPE, "vocab_size": 2048, "hidden_size": 256,
                                       "intermediate_size": 1024, "num_hidden_layers": 8})
  published.model(config).save_pretrained(tmp_path, max_shard_size="10MB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  decoder = decoder_of(tmp_path, scan_layers=scan_layers)
  wanted = states.abstract_parameters(decoder, mesh)
  pretrained.load_parameters(tmp_path, decoder, wanted)  # compiles, for which memory is taken too
  tracemalloc.start()
  try:
    params = pretrained.load_parameters(tmp_path, decoder, wanted)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  largest = params["params"]["embedding"].nbytes
  assert sum(x.nbytes for x in jax.tree.leaves(params)) > 15 * largest
  assert peak < 2.5 * largest  # as it lies in the file, and turned for the devices


def test_bfloat16_is_stored_and_read_bit_for_bit(tmp_path):
  theirs = published.model(published.CONFIGS["qwen2"]()).to(torch.bfloat16)
  theirs.save_pretrained(tmp_path / "in")
  decoder, params = load(tmp_path / "in", param_dtype="bfloat16")
  assert params["params"]["embedding"].dtype == ml_dtypes.bfloat16
  save(params, decoder, tmp_path / "out", dtype="bfloat16", max_positions=128)
  for name, tensor in safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors").items():
    assert np.array_equal(tensor.astype(np.float32), theirs.state_dict()[name].float().numpy()), name
  # Read as float32, they are the same numbers.
  wide = load(tmp_path / "out")[1]
  assert wide["params"]["embedding"].dtype == np.float32
  narrow = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32,
                                                             attn_implementation="eager").eval()
  np.testing.assert_allclose(published.our_logits(decoder_of(tmp_path / "out"), wide),
                             published.logits_of(narrow), atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["qwen2", "olmo2", "neox"])
def test_in_bfloat16_logits_differ_by_rounding_a_few_times_over(name, tmp_path):
  """Experts are left out: a rounding may send a token to another one, in transformers as here."""
  expected = published.logits_of(published.saved(name, tmp_path))
  decoder, params = load(tmp_path, dtype="bfloat16", param_dtype="bfloat16")
  error = published.our_logits(decoder, params) - expected  # numbers of 8 bits
  assert np.abs(error).max() < 0.06 * np.std(expected) and np.std(error) < 0.015 * np.std(expected)


def test_the_text_part_of_a_model_that_reads_images_is_read_and_exported(tmp_path):
  theirs = published.model_of_images()
  theirs.save_pretrained(tmp_path / "in")
  expected = published.logits_of(theirs)
  decoder, params = load(tmp_path / "in")
  np.testing.assert_allclose(published.our_logits(decoder, params), expected, atol=2e-4, rtol=0)
  left = pretrained.check(tmp_path / "in", decoder)
  stored = safetensors.numpy.load_file(tmp_path / "in" / "model.safetensors")
  assert sorted(left) == sorted(name for name in stored if not name.startswith("language_model."))
  assert {name.split(".")[0] for name in left} == {"vision_tower", "multi_modal_projector"}

  save(params, decoder, tmp_path / "out", imported=config_of(tmp_path / "in"))
  assert config_of(tmp_path / "out")["architectures"] == ["Gemma3ForCausalLM"]
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
  np.testing.assert_array_equal(published.logits_of(again.eval()), expected)
  assert equal(load(tmp_path / "out")[1], params)

  altered(tmp_path / "in", lambda t: t.update({"audio_tower.weight": np.ones(3, np.float32)}))
  with pytest.raises(ValueError, match="audio_tower.weight would not be used"):
    load(tmp_path / "in")


def test_masks_in_files_of_the_first_pythia_models_are_not_read(tmp_path):
  published.saved("neox", tmp_path)
  params, at = load(tmp_path)[1], "gpt_neox.layers.0.attention."
  altered(tmp_path, lambda t: t.update({at + "bias": np.ones((1, 1, 4, 4), bool), at + "masked_bias": np.ones(()),
                                        at + "rotary_emb.inv_freq": np.ones(2)}))
  assert equal(load(tmp_path)[1], params)


def altered(directory, change):
  """Changes tensors of a model in place."""
  path = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


NORM, QUERY = "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop(NORM), f"{NORM} is missing"),
    (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.ones(8)}),
     "q_norm.weight would not be used"),
    (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.ones(8)}),
     "layers.2.mlp.up_proj.weight would not be used"),
    (lambda t: t.update({QUERY: np.ones((40, 32), np.float32)}),
     rf"{QUERY} has shape \[40, 32\], but config.json means \[48, 32\]"),
    (lambda t: t.update({QUERY: np.ones((48, 32), np.int8)}), f"{QUERY} has numbers of type I8"),
])
def test_tensors_that_do_not_fit_are_named(change, says, tmp_path):
  published.saved("llama", tmp_path)
  altered(tmp_path, change)
  with pytest.raises(ValueError, match=says):
    load(tmp_path)


def test_stored_copies_of_the_embedding_are_no_harm_and_buffers_are_not_read(tmp_path):
  published.saved("llama3_scaled_tied", tmp_path)
  params = load(tmp_path)[1]
  embedding = safetensors.numpy.load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
  altered(tmp_path, lambda t: t.update({"lm_head.weight": embedding,
                                        "model.rotary_emb.inv_freq": np.ones(4)}))
  assert equal(load(tmp_path)[1], params)
  altered(tmp_path, lambda t: t.update({"lm_head.weight": embedding + 1}))
  with pytest.raises(ValueError, match="tie_word_embeddings, but lm_head.weight is stored and differs"):
    load(tmp_path)


def test_one_file_goes_before_the_index_of_what_lay_there_before(tmp_path):
  published.saved("llama", tmp_path)
  params = load(tmp_path)[1]
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
      {"metadata": {}, "weight_map": {NORM: "model-00001-of-00002.safetensors"}}))
  assert equal(load(tmp_path)[1], params)
  transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # which reads it so, too


def test_an_export_names_no_code_that_it_does_not_hold(tmp_path):
  """As the config of Phi-3 does, and whoever trusts it would look for the files."""
  published.saved("phi3_fused", tmp_path / "in")
  decoder, params = load(tmp_path / "in")
  code = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
  save(params, decoder, tmp_path / "out", imported={**config_of(tmp_path / "in"), "auto_map": code})
  assert "auto_map" not in config_of(tmp_path / "out")
  transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


def test_directories_that_hold_no_model_say_what_is_missing(tmp_path):
  published.saved("llama", tmp_path)
  decoder = decoder_of(tmp_path)
  (tmp_path / "model.safetensors").write_bytes(b"cut off")
  with pytest.raises(ValueError, match="model.safetensors is damaged or incomplete"):
    pretrained.check(tmp_path, decoder)
  (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
  with pytest.raises(ValueError, match="has no model.safetensors.*not downloaded.*must be converted"):
    pretrained.check(tmp_path, decoder)
  (tmp_path / "config.json").unlink()
  with pytest.raises(ValueError, match="it has no config.json"):
    pretrained.check(tmp_path, decoder)


def test_a_directory_that_is_taken_stays_as_it_is(tmp_path):
  published.saved("llama", tmp_path / "in")
  decoder, params = load(tmp_path / "in")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("mine")
  with pytest.raises(ValueError, match="is there already"):
    save(params, decoder, tmp_path / "out")
  (tmp_path / "out" / "mine").unlink()
  save(params, decoder, tmp_path / "out")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
  assert (tmp_path / "out" / "README.md").read_text() == "# a card\n"


def test_hub_ids_without_a_network_say_what_to_fetch(monkeypatch, tmp_path):
  with pytest.raises(ValueError) as refusal:
    pretrained.resolve("nobody/never-published")
  for part in ("hf download nobody/never-published", "tokenizer.json", "model.safetensors.index.json",
               "config.model.source"):
    assert part in str(refusal.value)
  with pytest.raises(ValueError, match="no directory.*no id of the form OWNER/NAME"):
    pretrained.resolve(str(tmp_path / "absent"))


def test_hub_ids_come_from_the_cache(monkeypatch, tmp_path):
  snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
  published.saved("llama", snapshot)
  (tmp_path / "models--some--model" / "refs").mkdir()
  (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
  from huggingface_hub import constants
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
  assert pretrained.resolve("some/model").resolve() == snapshot.resolve()


def test_pytorch_is_imported_neither_in_nor_out(tmp_path):
  published.saved("llama", tmp_path / "in")
  code = f"""
import json, pathlib, sys
import jax
from jaxrl.models import DecoderConfig, families, init_parameters, pretrained, unbox
place = pathlib.Path({str(tmp_path)!r})
decoder = DecoderConfig(**families.settings(json.loads((place / "in/config.json").read_text())))
abstract = jax.eval_shape(lambda: unbox(init_parameters(decoder, jax.random.key(0))))
params = pretrained.load_parameters(place / "in", decoder, abstract)
from jaxrl.data import CharacterTokenizer
pretrained.save(params, decoder, place / "out", dtype="bfloat16", tokenizer=CharacterTokenizer(), card="")
assert "torch" not in sys.modules
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
