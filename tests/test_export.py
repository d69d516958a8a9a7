"""A run, out to transformers and back."""

import json
import shutil
import types

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
from jaxrl.inference import served
from jaxrl.models import Decoder, token_logits
from jaxrl.sampling import SamplingParams
from jaxrl.training import builders, inputs, pieces, refusals, run, sources
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


def three_grpo_updates(**changes):
  config = config_of_run(layers=2, d_model=32, d_ff=48, qkv_bias=True)
  config.phases = ("rl",)
  config.data.test, config.rl.until = "", None
  config.rl.update(steps=3, optimizer=dict(learning_rate=1e-3))
  config.rollout.update(prompts=4, episode=dict(name="group", samples=4), filter_zero_variance=False)
  config.reward.criteria = [dict(name="jaxrl.rewards.verifiers:matches_format", pattern=".*1.*")]
  config.objective = [dict(name="clipped_surrogate"), dict(name="kl", beta=0.1)]
  config.update_from_flattened_dict(changes)
  return config


def updates_of(workdir):
  """What was logged of every update, without what a clock says."""
  clocks = ("seconds", "per_second", "compil", "time", "memory")
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [{k: v for k, v in line.items() if not any(clock in k for clock in clocks)} for line in lines]


def test_training_goes_on_from_an_export_as_from_the_run_itself(trained, tmp_path):
  workdir, out = trained
  run.run(three_grpo_updates(start=str(workdir)), tmp_path / "whole", quiet=True)
  run.run(three_grpo_updates(**{"model.source": str(out)}), tmp_path / "exported", quiet=True)
  expected = updates_of(tmp_path / "whole")
  assert [line["step"] for line in expected if "loss" in line] == [1, 2, 3]
  assert all(line["grad_norm"] > 0 for line in expected if "loss" in line)
  assert updates_of(tmp_path / "exported") == expected
  assert equal(parameters_of(tmp_path / "exported")[1], parameters_of(tmp_path / "whole")[1])
  assert not equal(parameters_of(tmp_path / "whole")[1], parameters_of(workdir)[1])


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


def test_a_tokenizer_may_have_a_token_for_images_that_the_model_has_not(tmp_path):
  """As that of Gemma 3 1B."""
  _, config = of_chats(tmp_path / "source")
  size = data.load_tokenizer(tmp_path / "source").vocab_size - 1  # all but <|im_end|>, which stands for it
  shape = dict(published.SHAPE, vocab_size=size)
  published.model(transformers.Qwen3Config(**shape, head_dim=8)).save_pretrained(tmp_path / "source")
  mine = sources.filled(config, tmp_path / "run")
  tokenizer = data.load_tokenizer(tmp_path / "source")
  assert inputs.decoder_config(mine.model, tokenizer).vocab_size == tokenizer.vocab_size == size
  mine.model.vocab_size = 200
  with pytest.raises(ValueError, match="config.model.vocab_size=200, but the tokenizer has"):
    inputs.decoder_config(mine.model, tokenizer)


def of_chats(source):
  """The tokenizer of a published model that is written here, and the config of a run on chats with it."""
  tokenizer = data.train_bpe([f"{a}+{b}={a + b}" for a in range(30) for b in range(30)], 280)
  tokenizer.fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
  tokenizer.fast.chat_template = (
      "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
      "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
  shape = dict(published.SHAPE, vocab_size=320)
  published.model(transformers.Qwen3Config(**shape, head_dim=8)).save_pretrained(source)
  tokenizer.save(source)
  (source / "generation_config.json").write_text('{"eos_token_id": 7, "top_k": 3}')
  config = config_of_run(source=str(source))
  config.tokenizer.alphabet, config.data.chat, config.evaluate.problems = "", True, 0
  config.data.max_prompt_tokens = 0
  config.sft.update(steps=1)
  return tokenizer, config


def test_a_model_trained_on_chats_says_that_its_turns_end_it(tmp_path):
  tokenizer, config = of_chats(tmp_path / "source")
  run.run(config, tmp_path / "run", quiet=True)
  export(tmp_path / "run", tmp_path / "out")
  theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
  end = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|im_end|>")
  assert theirs.eos_token_id == [7, tokenizer.eos_id, end] and end != tokenizer.eos_id and theirs.top_k == 3


def test_adapters_over_a_published_model_say_where_they_end(tmp_path):
  tokenizer, config = of_chats(tmp_path / "source")
  config.model.adapters = dict(default=dict(rank=2))
  config.optimizer.learning_rate = 0.3
  config.rollout.stop_ids = (9,)
  run.run(config, tmp_path / "run", quiet=True)
  export(tmp_path / "run", tmp_path / "adapter")
  export(tmp_path / "run", tmp_path / "merged", merge_adapters=True)
  ends = [7, tokenizer.eos_id, tokenizer.fast.convert_tokens_to_ids("<|im_end|>"), 9]
  assert transformers.GenerationConfig.from_pretrained(tmp_path / "adapter").eos_token_id == ends
  assert not (tmp_path / "adapter" / "config.json").exists()

  # A run that knows no chats goes on with them, stops where they do, and says so again.
  _, plain = of_chats(tmp_path / "source")
  plain.model.source, plain.data.chat = str(tmp_path / "adapter"), False
  assert sources.filled(plain, tmp_path / "again").rollout.stop_ids == tuple(ends)
  run.run(plain, tmp_path / "again", quiet=True)
  stored = json.loads((tmp_path / "again" / "config.json").read_text())
  assert stored["rollout"]["stop_ids"] == ends
  assert sources.filled(plain, tmp_path / "again").rollout.stop_ids == tuple(ends)  # when it is continued
  export(tmp_path / "again", tmp_path / "adapter_again")
  assert transformers.GenerationConfig.from_pretrained(tmp_path / "adapter_again").eos_token_id == ends

  # The adapter answers as the model that it makes of its base, and not as the base.
  asked = {name: served.load(str(tmp_path / name)) for name in ("source", "adapter", "merged")}
  assert sorted(asked["adapter"].defaults.stop_ids) == sorted(ends)
  assert asked["adapter"].identity == {"model": str(tmp_path / "adapter")}
  how = SamplingParams(8, 0.0)
  said = {name: model.answers(model.sampler(4), [model.prompt("1+2=")], [0], how)[0][0]
          for name, model in asked.items()}
  np.testing.assert_array_equal(said["adapter"].tokens, said["merged"].tokens)
  np.testing.assert_allclose(said["adapter"].logprobs, said["merged"].logprobs, atol=1e-4)
  assert not np.allclose(said["adapter"].logprobs, said["source"].logprobs, atol=1e-2)


def test_a_run_says_which_tensors_of_images_it_leaves(tmp_path):
  published.model_of_images().save_pretrained(tmp_path / "source")
  data.CharacterTokenizer("0123456789+=").export(tmp_path / "source")
  lines = []
  mine = sources.filled(config_of_run(source=str(tmp_path / "source")), tmp_path / "run")
  parts = builders.build_parts(mine, tmp_path / "run", lines.append, fresh=True)
  assert parts.decoder.rope_local_theta == 50.0
  assert any("reads images too; " in line and "vision_tower." in line for line in lines)
  parts.scorer.close()


def test_sequences_for_which_longrope_has_other_factors_are_refused(tmp_path):
  config = transformers.Phi3Config(**published.SHAPE, original_max_position_embeddings=20,
                                   rope_parameters=dict(published.LONG, partial_rotary_factor=0.75))
  published.model(config).save_pretrained(tmp_path / "source")
  data.CharacterTokenizer("0123456789+=").export(tmp_path / "source")
  mine = config_of_run(source=str(tmp_path / "source"))
  said = refusal(mine, tmp_path / "run")
  assert "may have 32 tokens" in said and "those of more than 20 tokens" in said
  assert "config.model.rope_length=32" in said
  for fits in ({"model.rope_length": 32}, {"data.max_prompt_tokens": 4}):
    mine.update_from_flattened_dict({"data.max_prompt_tokens": 16, "model.rope_length": 0, **fits})
    filled = sources.filled(mine, tmp_path / "run")
    decoder = inputs.decoder_config(filled.model, data.CharacterTokenizer("0123456789+="))
    refusals.check_lengths([types.SimpleNamespace(settings=filled)], decoder, filled.data)


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
