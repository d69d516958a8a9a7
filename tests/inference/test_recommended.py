"""generation_config.json: what transformers reads in it is what is done, or what is named."""

import json
import shutil

import pytest
import torch
import transformers

from jaxrl import cli, data
from jaxrl.inference.recommended import in_force, recommended
from jaxrl.sampling import SamplingParams
from tests.inference.asked import ask, FEW, refused

CHARACTERS = data.CharacterTokenizer("ab")


def read(place, **says):
  (place / "generation_config.json").write_text(json.dumps(says))
  return recommended(place, CHARACTERS)


@pytest.mark.parametrize("says", [
    dict(do_sample=True), dict(do_sample=True, temperature=0.6, top_p=0.9), dict(do_sample=False, temperature=1.0),
    dict(eos_token_id=[5, 7]), dict(eos_token_id=5, max_new_tokens=9), dict(temperature=0.7, top_k=20),
    dict(do_sample=True, temperature=1.2, top_k=7, min_p=0.1, stop_strings=["a", "bb"]),
    dict(do_sample=None, top_p=0.5, stop_strings="ab")])
def test_samples_are_as_transformers_would_draw_them(tmp_path, says):
  how, _ = read(tmp_path, **says)
  theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
  greedy = theirs.get_generation_mode() == transformers.generation.GenerationMode.GREEDY_SEARCH
  assert (how.temperature == 0) == greedy
  if not greedy:
    assert how.temperature == (theirs.temperature or 1.0)
  assert (how.top_k, how.top_p, how.min_p) == (theirs.top_k or 0, theirs.top_p or 1.0, theirs.min_p or 0.0)
  assert how.max_tokens == (theirs.max_new_tokens or 512)
  ends = theirs.eos_token_id
  assert how.stop_ids == (2, *(ends if isinstance(ends, list) else [ends] if ends else []))
  strings = theirs.stop_strings or []
  assert how.stop_strings == tuple([strings] if isinstance(strings, str) else strings)


def test_without_a_file_samples_are_the_models_own(tmp_path):
  assert recommended(tmp_path, CHARACTERS) == (SamplingParams(512, 1.0, stop_ids=(2,)), "")


def test_without_a_file_answers_end_where_the_config_says_as_for_transformers(tiny, tmp_path):
  shutil.copytree(tiny, tmp_path / "model")
  (tmp_path / "model" / "generation_config.json").unlink()
  hf = json.loads((tmp_path / "model" / "config.json").read_text())
  (tmp_path / "model" / "config.json").write_text(json.dumps({**hf, "eos_token_id": [7, 9]}))
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config
  assert theirs.eos_token_id == [7, 9]
  assert {7, 9} <= set(recommended(tmp_path / "model", CHARACTERS)[0].stop_ids)


def test_a_file_of_transformers_defaults_asks_for_nothing_more(tmp_path):
  defaults = transformers.GenerationConfig._get_default_generation_params()
  for says in (transformers.GenerationConfig().to_dict(), {**defaults, "max_new_tokens": 5},
               dict(do_sample=True, temperature=0.7, num_beams=1, repetition_penalty=1, cache_implementation="static")):
    assert read(tmp_path, **says)[1] == ""


@pytest.mark.parametrize("name,value", [
    ("repetition_penalty", 1.05), ("no_repeat_ngram_size", 3), ("num_beams", 4), ("typical_p", 0.9),
    ("min_new_tokens", 2), ("max_length", 100), ("bad_words_ids", [[3]]), ("suppress_tokens", [4]),
    ("forced_eos_token_id", 2), ("guidance_scale", 1.5), ("of_the_future", "x")])
def test_what_is_not_done_is_named(tmp_path, name, value):
  _, said = read(tmp_path, do_sample=True, temperature=0.7, **{name: value})
  assert said == f"{tmp_path / 'generation_config.json'} asks for {name}={value!r}, which is not done here"


def test_values_that_nothing_draws_with_are_named(tmp_path):
  how, said = read(tmp_path, temperature=0.7, top_p=0.8, penalty_alpha=0.6, epsilon_cutoff=0.1)
  assert how.temperature == 0 and how.top_p == 0.8  # for whoever gives a temperature
  assert "asks for penalty_alpha=0.6, epsilon_cutoff=0.1, which are not done here, and says " in said
  assert "says temperature=0.7, top_p=0.8 without do_sample, so answers are of the most likely tokens" in said
  assert "\n" not in said


@pytest.mark.parametrize("says,message", [
    (dict(temperature="0.7"), "temperature='0.7' is not a number"), (dict(top_k=1.5), "top_k=1.5 is not a whole"),
    (dict(max_new_tokens=0), "max_tokens=0: a sample needs"), (dict(top_p=2), "top_p=2: use a share"),
    (dict(top_k=True), "top_k=True is not"), (dict(eos_token_id="</s>"), "eos_token_id='</s>' is no token id"),
    (dict(eos_token_id=[[1]]), "is no token id"), (dict(stop_strings=[3]), "stop_strings=\\[3\\] is no text")])
def test_values_that_nobody_can_sample_with_are_named(tmp_path, says, message):
  with pytest.raises(ValueError, match=r"generation_config\.json: .*" + message):
    read(tmp_path, **says)


def test_settings_without_effect_are_said():
  lines = in_force(SamplingParams(5, 0.0, top_p=0.9, stop_ids=(2,), stop_strings=("x",)), dict(top_p=0.9), 3)
  assert lines[0] == "max_tokens 5, temperature 0, top_k 0, top_p 0.9, min_p 0, stops at 2, 'x'"
  assert lines[1].startswith("--top_p: without effect at temperature 0") and "the 3 samples" in lines[2]
  assert len(in_force(SamplingParams(5, 0.5), dict(top_p=0.9), 3)) == 1


def test_a_flag_wins_over_the_file_and_the_file_over_our_defaults(tiny, tmp_path, capsys):
  place = tmp_path / "model"
  shutil.copytree(tiny, place)
  (place / "generation_config.json").write_text('{"eos_token_id": 2, "repetition_penalty": 1.1, "max_new_tokens": 8}')
  plain = ask(capsys, f"--model={place}", "--prompt=hi", "--raw", "--json", "--logprobs", "--quiet")
  tokenizer = transformers.AutoTokenizer.from_pretrained(place)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(place).eval()
  prompt = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode("hi", add_special_tokens=False)]])
  ends = [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
  with torch.no_grad():  # as its file says, but for the penalty, which is named
    found = theirs.generate(prompt, eos_token_id=ends, repetition_penalty=1.0)[0, prompt.shape[1]:].tolist()
  assert json.loads(plain)["ids"] == found and len(found) <= 8
  capsys.readouterr()
  ask_again = [f"--model={place}", "--prompt=hi", "--raw", "--temperature=1.5", FEW]
  cli.main(["sample", *ask_again])
  said = capsys.readouterr().err
  assert said.count("repetition_penalty=1.1, which is not done here") == 1
  assert "max_tokens 12, temperature 1.5, top_k 0" in said and "stops at 2, " in said
  (place / "generation_config.json").write_text('{"temperature": "hot"}')
  assert "generation_config.json: temperature='hot' is not a number" in refused(capsys, *ask_again)
