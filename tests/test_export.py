"""A run, out to transformers and back."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers

from configs import quickstart
from jaxrl import cli
from jaxrl import config as configs
from jaxrl import data, sharding
from jaxrl.config import ConfigError
from jaxrl.models import Decoder, token_logits
from jaxrl.training import builders, inputs, pieces, run, sources
from jaxrl.training import state as states
from jaxrl.training.checkpoints import read_parameters
from jaxrl.training.export import export
from tests.models import published

PROMPTS = ("123+456=", "7+8=", "999+1=")


def config_of_run(**model):
  """A few supervised updates of a tiny model."""
  config = quickstart.get_config()
  config.compilation_cache = "off"
  config.phases = ("sft",)
  config.data.validation = ""
  config.optimizer.update(warmup_steps=0, learning_rate=1e-2)
  config.evaluate.update(problems=4, samples=0)
  config.sft.until = None
  config.sft.update(steps=3, batch=dict(examples=8))
  config.model.update(model)
  return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Workdir of a run, and what was exported of it."""
  place = tmp_path_factory.mktemp("trained")
  run.run(config_of_run(layers=2, d_model=32, d_ff=48, qkv_bias=True), place / "run", quiet=True)
  cli.main(["export", f"--workdir={place / 'run'}", f"--output={place / 'out'}"])
  return place / "run", place / "out"


def parameters_of(workdir):
  config = configs.of_run(workdir)
  decoder = inputs.decoder_config(config.model, data.load_tokenizer(workdir / "tokenizer"))
  return decoder, read_parameters(workdir / "checkpoints",
                                  states.abstract_parameters(decoder, sharding.make_mesh()))


def equal(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
      np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_transformers_says_the_same_greedy_tokens(trained):
  workdir, out = trained
  decoder, params = parameters_of(workdir)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  ours = data.load_tokenizer(workdir / "tokenizer")

  @jax.jit
  def next_logits(tokens, position):
    row = np.arange(64)[None]
    hidden, _ = Decoder(decoder).apply(params, tokens, row, (row <= position).astype(np.int32))
    return token_logits(hidden, Decoder(decoder).apply(params, method="vocabulary"))[0, position]

  for prompt in PROMPTS:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0].tolist() == [ours.bos_id, *ours.encode(prompt)]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == prompt
    expected = list(ids[0].tolist())
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, :len(expected)] = expected
    while len(expected) < 40:
      best = int(np.argmax(next_logits(tokens, len(expected) - 1)))
      tokens[0, len(expected)] = best
      expected.append(best)
    with torch.no_grad():
      found = theirs.generate(ids, max_new_tokens=40 - ids.shape[1], do_sample=False, eos_token_id=None)
    assert found[0].tolist() == expected


def test_the_card_holds_config_and_figures(trained):
  workdir, out = trained
  card = (out / "README.md").read_text()
  assert "Qwen2ForCausalLM" in card and "| sft (sft) | greedy_accuracy |" in card
  assert '"learning_rate": 0.01' in card


def test_exported_again_it_is_a_source_with_the_same_parameters(trained, tmp_path):
  workdir, out = trained
  given = config_of_run(source=str(out))
  config = sources.filled(given, tmp_path / "run")
  assert (config.model.layers, config.model.d_model, config.model.qkv_bias) == (2, 32, True)
  assert given.model.d_model == 128  # which is left alone
  parts = builders.build_parts(config, tmp_path / "run", print, fresh=True)
  rng = jax.random.key_data(jax.random.key(0))
  assert equal(sources.parameters(str(out), parts.decoder, rng, parts.mesh), parameters_of(workdir)[1])
  parts.scorer.close()


def test_a_run_with_a_source_continues_and_is_exported_without_it(trained, tmp_path):
  source = tmp_path / "source"
  shutil.copytree(trained[1], source)
  config = config_of_run(source=str(source), heads_on_top=(("value", 1),), critic=True)
  config.data.test = ""
  first = run.run(config, tmp_path / "run", quiet=True)
  shutil.rmtree(source)
  assert run.run(config, tmp_path / "run", quiet=True) == first  # the same command
  stored = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
  assert stored["source"] == str(source) and stored["d_model"] == 32

  lines = export(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
  assert any("critic" in line for line in lines) and any("'value'" in line for line in lines)
  half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  assert half.dtype == torch.bfloat16
  params = parameters_of(tmp_path / "run")[1]
  np.testing.assert_array_equal(
      half.model.embed_tokens.weight.float().detach().numpy(),
      np.asarray(params["params"]["embedding"].astype("bfloat16").astype("float32")))


def refusal(config, workdir):
  with pytest.raises(ConfigError) as error:
    run.run(config, workdir, quiet=True)
  assert not (workdir / "checkpoints").exists()
  return str(error.value)


def test_settings_that_contradict_the_source_are_refused(trained, tmp_path):
  said = refusal(config_of_run(source=str(trained[1]), d_model=64, qk_norm=True), tmp_path / "run")
  assert "config.model.d_model=64, but that model has 32" in said and "qk_norm=True" in said
  said = refusal(config_of_run(source=str(tmp_path / "absent")), tmp_path / "run")
  assert "absent" in said and "no directory" in said
  config = config_of_run(source=str(trained[1]))
  config.tokenizer.alphabet = "0123456789+= "
  assert "--config.tokenizer.kind=pretrained" in refusal(config, tmp_path / "run")


def test_files_that_do_not_fit_are_refused_before_anything_is_computed(trained, tmp_path):
  shutil.copytree(trained[1], tmp_path / "source")
  hf = json.loads((tmp_path / "source" / "config.json").read_text())
  hf["num_hidden_layers"], hf["layer_types"] = 3, ["full_attention"] * 3
  (tmp_path / "source" / "config.json").write_text(json.dumps(hf))
  said = refusal(config_of_run(source=str(tmp_path / "source")), tmp_path / "run")
  assert "model.layers.2.self_attn.q_proj.weight" in said and "are missing" in said


def test_a_foreign_model_brings_its_tokenizer(tmp_path):
  texts = [f"{a}+{b}={a + b}" for a in range(30) for b in range(30)]
  tokenizer = data.train_bpe(texts, 300)
  config = transformers.Qwen3Config(**dict(published.SHAPE, vocab_size=320), head_dim=8)
  published.model(config).save_pretrained(tmp_path / "source")
  tokenizer.save(tmp_path / "source")
  (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
  mine = config_of_run(source=str(tmp_path / "source"))
  mine.tokenizer.alphabet = ""
  mine = sources.filled(mine, tmp_path / "run")
  parts = builders.build_parts(mine, tmp_path / "run", print, fresh=True)
  assert parts.tokenizer.encode("12+3=") == tokenizer.encode("12+3=") and parts.decoder.vocab_size == 320
  assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").exists()
  assert pieces.sampling(mine.rollout, (parts.tokenizer.eos_id,)).stop_ids == (2, 7)
  parts.scorer.close()


def test_export_refuses_what_cannot_be_written(trained, tmp_path, capsys):
  with pytest.raises(SystemExit):
    cli.main(["export", f"--workdir={trained[0]}", f"--output={trained[1]}"])
  assert "is there already" in capsys.readouterr().err
  with pytest.raises(ValueError, match="dtype='int8' must be one of float32"):
    export(trained[0], tmp_path / "out", dtype="int8")
  with pytest.raises(ValueError, match="no config.json"):
    export(tmp_path, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_characters_are_the_same_ids_to_transformers(tmp_path):
  ours = data.CharacterTokenizer("ab\n +.é")
  ours.export(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  text = "a b\n\n+..é"
  assert theirs(text).input_ids == [1, *ours.encode(text)]
  assert theirs.decode(ours.encode(text)) == text
  assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
  assert data.load_tokenizer(tmp_path).alphabet == ours.alphabet
  with pytest.raises(Exception, match="(?i)unk"):
    theirs("z")
