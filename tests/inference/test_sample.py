"""Asking a model, on the command line: against transformers and against a run's own evaluation."""

import dataclasses
import io
import json
import shutil

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch
import transformers

from configs import bradley_terry
from configs import quickstart
from jaxrl import cli
from jaxrl import config as configs
from jaxrl import data
from jaxrl.inference import served
from jaxrl.inference.screen import Screen
from jaxrl.sampling import SamplingParams
from jaxrl.training import run
from tests.inference.asked import ask, FEW, lines_of, refused
from tests.models import published


def test_log_probabilities_are_those_of_transformers(tiny, capsys):
  out = ask(capsys, f"--model={tiny}", "--prompt=hello", "--system=there", "--samples=2", "--json",
            "--logprobs", "--temperature=0.8", "--quiet", FEW)
  rows = [json.loads(line) for line in out.splitlines()]
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
  prompt = tokenizer.apply_chat_template(
      [dict(role="system", content="there"), dict(role="user", content="hello")], add_generation_prompt=True,
      return_dict=False)
  assert [row["sample"] for row in rows] == [0, 1] and rows[0]["ids"] != rows[1]["ids"]
  for row in rows:
    with torch.no_grad():
      logits = theirs(torch.tensor([prompt + row["ids"]])).logits[0].double() / 0.8
    said = torch.log_softmax(logits, -1)[len(prompt) - 1:-1].gather(1, torch.tensor(row["ids"])[:, None])[:, 0]
    np.testing.assert_allclose(row["logprobs"], said, atol=2e-4)
    ids = row["ids"][:-1] if row["finish"] == "stop" else row["ids"]
    assert row["text"] == tokenizer.decode(ids, skip_special_tokens=True) and row["tokens"] == len(row["ids"])


def test_a_published_model_samples_as_its_generation_config_says(model):
  end = model.tokenizer.fast.convert_tokens_to_ids("<|im_end|>")
  assert model.defaults == SamplingParams(64, 0.7, top_p=0.9, stop_ids=(2, 5, end))
  assert (model.chats, model.max_positions) == (True, 128)


def test_of_a_model_that_reads_images_the_text_part_answers(tiny, tmp_path, capsys):
  made = published.model_of_images(vocab_size=304)
  made.save_pretrained(tmp_path)
  data.load_tokenizer(tiny).save(tmp_path)
  (tmp_path / "generation_config.json").write_text("{}")
  out = ask(capsys, f"--model={tmp_path}", "--prompt=hello", "--json", "--logprobs", "--quiet", FEW)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  prompt = tokenizer.apply_chat_template([dict(role="user", content="hello")], add_generation_prompt=True,
                                         return_dict=False)
  with torch.no_grad():
    expected = made.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=[
        tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")])[0, len(prompt):].tolist()
  assert json.loads(out)["ids"] == expected
  assert served.load(str(tmp_path)).max_positions == 128


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_a_published_model_loses_no_digit_of_what_is_stored(tiny, tmp_path, stored):
  shutil.copytree(tiny, tmp_path / "model")
  made = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=getattr(torch, stored))
  made.save_pretrained(tmp_path / "model")
  params = served.load(str(tmp_path / "model")).params["params"]
  np.testing.assert_array_equal(np.asarray(params["embedding"], np.float32),
                                made.model.embed_tokens.weight.detach().float().numpy())


def test_an_answer_is_as_long_as_a_small_model_leaves_room_for(model, tiny, tmp_path, capsys):
  assert model.defaults.max_tokens == 64 and model.max_positions == 128
  rows = ask(capsys, f"--model={tiny}", "--prompt=hello", "--json", "--quiet")
  assert json.loads(rows)["tokens"] <= 64


@pytest.mark.parametrize("rope_length,fits", [(0, 20), (32, 32)])
def test_no_prompt_passes_what_the_factors_of_longrope_are_for(model, rope_length, fits):
  scaling = dict(rope_type="longrope", original_max_position_embeddings=20, factor=4.0,
                 short_factor=(1.0,) * 4, long_factor=(2.0,) * 4)
  longer = dataclasses.replace(model, decoder=dataclasses.replace(
      model.decoder, rope_scaling=tuple(scaling.items()), rope_length=rope_length))
  longer.check_length([0] * (fits - 12), 12)
  with pytest.raises(ValueError, match=f"12 more it would pass {fits}, above which.*longrope"):
    longer.check_length([0] * (fits - 11), 12)


def test_what_appears_is_what_is_sampled(model):
  how = SamplingParams(12, 1.5, stop_ids=model.defaults.stop_ids)
  prompts, seeds = [model.prompt("hi"), model.prompt("you")], [3, 4]
  plain = model.answers(model.sampler(64), prompts, seeds, how, 2)
  sampler, texts = model.sampler(64, watched=True), {}
  watched = model.answers(sampler, prompts, seeds, how, 2,
                          on_text=lambda r, s, text: texts.setdefault((r, s), []).append(text))
  assert [[a.tokens.tolist() for a in samples] for samples in watched] == [
      [a.tokens.tolist() for a in samples] for samples in plain]
  assert max(len(set(shown)) for shown in texts.values()) >= 3  # it appeared in pieces
  for (request, sample), shown in texts.items():
    whole = plain[request][sample].text
    for shorter, longer in zip(shown, [*shown[1:], whole]):
      assert longer.startswith(shorter)
  # A string that comes up, and not at once, is where it stops from now on, and never seen.
  request, sample, stop = next(
      (r, s, text[i:i + 2]) for r, s in texts for text in [plain[r][s].text] for i in range(2, len(text) - 1)
      if "\ufffd" not in text[i:i + 2])
  whole, seen = plain[request][sample].text, []
  stopped = model.answers(sampler, prompts, seeds, dataclasses.replace(how, stop_strings=(stop,)), 2,
                          on_text=lambda r, s, text: seen.append(text) if (r, s) == (request, sample) else None)
  answer = stopped[request][sample]
  assert (answer.text, answer.finish) == (whole[:whole.index(stop)], "stop")
  assert all(answer.text.startswith(text) for text in seen)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12),
       st.lists(st.text(min_size=1, max_size=3), max_size=2))
@settings(max_examples=60)
def test_half_characters_and_beginnings_of_stop_strings_wait(text, stops):
  tokenizer = data.train_bpe(["ab"], 259)  # every byte is a token
  ids = tokenizer.encode(text)
  end = min((i for i in map(text.find, stops) if i >= 0), default=len(text))
  for count in range(len(ids) + 1):
    assert text[:end].startswith(served.shown(tokenizer.decode(ids[:count]), stops))
  assert served.shown("3 is\n\nQ", ["\n\nQ:"]) == "3 is" and served.shown("a\ufffd", ()) == "a"


def test_a_terminal_gets_no_control_characters():
  class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
      return True
  stream = Terminal()
  screen = Screen(stream)
  for text in ("a", "a\x1b[2J", "a\x1b[2J\té"):
    screen.show(text)
  screen.end("a\x1b[2J\té\n")
  assert stream.getvalue() == "a\ufffd[2J\té\n" and screen.written == ""
  whole = "a\u202eb\u2066c\r\nd\re\r\n"
  for end in range(len(whole)):  # also between the two that end a line
    screen.show(whole[:end])
  screen.end(whole)
  assert stream.getvalue().splitlines()[1:] == ["a\ufffdb\ufffdc", "d\ufffde"]


# -------------------------------------------------------------------------------------------- runs


def test_a_run_is_asked_as_it_evaluates(tmp_path, capsys):
  config = quickstart.get_config()
  config.compilation_cache, config.phases, config.data.validation = "off", ("sft",), ""
  config.evaluate.update(problems=3, samples=0)
  config.sft.until = None
  config.sft.update(steps=2, batch=dict(examples=8), rollout=dict(max_tokens=9))
  config.optimizer.update(warmup_steps=0, learning_rate=3e-2)
  config.model.update(layers=1, d_model=16, heads=2, kv_heads=2, d_ff=16)
  run.run(config, tmp_path / "run", quiet=True)
  greedy = [row for path in (tmp_path / "run" / "samples").glob("*.jsonl") for row in lines_of(path)]
  last = greedy[-3:]
  assert len(last) == 3 and all(len(row["completion"]) for row in last)
  (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in last))
  cli.main(["sample", f"--model={tmp_path / 'run'}", f"--input={tmp_path / 'in.jsonl'}",
            f"--output={tmp_path / 'out.jsonl'}", "--temperature=0"])
  found = lines_of(tmp_path / "out.jsonl")
  assert [(row["text"], row["finish"]) for row in found] == [(row["completion"], row["finish"]) for row in last]
  model = served.load(str(tmp_path / "run"))
  assert model.defaults.max_tokens == 9 and model.identity["checkpoint"] == 2 and not model.chats
  with pytest.raises(ValueError, match="--system is for models that are asked in a chat"):
    model.prompt("1+2=", "be brief")
  with pytest.raises(ValueError, match="has no chat template"):
    model.messages([{"role": "user", "content": "you"}])
  asks_more = dataclasses.replace(model, template=None)
  with pytest.raises(ValueError, match="asks for more than {question}.*--raw"):
    asks_more.prompt("1+2=")
  assert asks_more.prompt("1+2=", raw=True) == [1, *model.tokenizer.encode("1+2=")]


# ----------------------------------------------------------------------------------------- refusals


REFUSED = [
    (["--input=a.jsonl"], "--input=FILE and --output=FILE belong together"),
    (["--input=a.jsonl", "--output=b.jsonl", "--prompt=a"], "--prompt and --input both say what to answer"),
    (["--input=a.jsonl", "--output=./a.jsonl"], "--output=./a.jsonl is the input"),
    (["--input=a.jsonl", "--output=b.jsonl"], "no file 'a.jsonl'"),
    (["--input=a.jsonl", "--output=b.jsonl", "--json"], "--json is what an --output always is"),
    (["--chat", "--prompt=a"], "--chat reads from the terminal"),
    (["--chat", "--samples=2"], "are not for a chat"),
    (["--prompt=a", "--logprobs"], "--logprobs are written with --json"),
    (["--prompt=a", "--samples=0"], "--samples=0: at least 1"),
    (["--prompt=a", "--seed=-1"], "--seed=-1: use a number from 0"),
    (["--prompt=a", "--batch=0"], "--batch=0: at least 1"),
    (["--prompt="], "the prompt is empty"),
    (["--prompt=a", "--top_p=0"], "--top_p=0.0: use a share in (0, 1]"),
    (["--input=a.jsonl", "--output=."], "--output=. is no file that can be continued"),
    (["--input=a.jsonl", "--output=/dev/null"], "--output=/dev/null is no file that can be continued"),
    (["--prompt=a", "--max_tokens=0"], "--max_tokens=0: a sample needs at least 1 token"),
    (["--prompt=a", "--temperature=-1"], "--temperature=-1.0: use 0 (greedy) or more"),
    (["--prompt=a", "--temperature=nan"], "--temperature=nan: use 0"),
    (["--prompt=a", "--top_k=9999999999"], "--top_k=9999999999: use a positive number"),
    (["--prompt=a", "--stop="], "--stop=('',): use a tuple of non-empty strings"),
    (["--prompt=a", "--dtype=int8"], "--dtype=int8 must be one of float32, bfloat16"),
    (["--prompt=a", "--tensor=3"], "--tensor="),
    (["--prompt=a"], "--model='nowhere/at/all' is no directory"),
]


@pytest.mark.parametrize("arguments,said", REFUSED, ids=lambda x: "_".join(x) if type(x) is list else "")
def test_a_mistake_on_the_command_line_says_what_to_do(capsys, monkeypatch, tmp_path, arguments, said):
  monkeypatch.chdir(tmp_path)
  assert said in refused(capsys, "--model=nowhere/at/all", *arguments)


def test_models_that_write_no_text_are_refused(tiny, tmp_path, capsys):
  assert "has no config.json" in refused(capsys, f"--model={tmp_path}", "--prompt=a")
  hf = json.loads((tiny / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps({**hf, "architectures": ["LlamaForSequenceClassification"]}))
  assert "gives scores and writes no text" in refused(capsys, f"--model={tmp_path}", "--prompt=a")
  for part in ("tokenizer", "checkpoints"):
    (tmp_path / "run" / part).mkdir(parents=True)
  (tmp_path / "run" / "config.json").write_text(json.dumps(configs.to_dict(bradley_terry.get_config())))
  said = refused(capsys, f"--model={tmp_path / 'run'}", "--prompt=a")
  assert "whose last phase, comparisons, trained a reward model, which gives scores and writes no text" in said
  (tmp_path / "config.json").write_text(json.dumps({"phases": ["sft"]}))
  assert "has no tokenizer: name the --workdir of a run" in refused(capsys, f"--model={tmp_path}", "--prompt=a")
