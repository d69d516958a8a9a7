"""Asking a model, on the command line: against transformers, against a run's own evaluation, against itself."""

import dataclasses
import io
import json
import sys

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
from jaxrl.inference import chat, files, served
from jaxrl.inference.screen import Screen
from jaxrl.sampling import SamplingParams
from jaxrl.training import run
from tests.models import published

CHATML = ("{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
          "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
EXACT = {"score": 0.12345678901234567, "big": 2 ** 60 + 1, "none": None, "not": float("nan"),
         "list": [1e-9, "é"]}
ROWS = [{"prompt": "hi", "id": 1}, {"messages": [{"role": "user", "content": "you"}]}, {"prompt": "é🙂"},
        {"prompt": "hi"}]
FEW = "--max_tokens=12"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """A directory as transformers writes it: a random model of two layers and a byte-level tokenizer."""
  place = tmp_path_factory.mktemp("tiny")
  tokenizer = data.train_bpe(["user assistant system hello there"] * 5, 280)
  tokenizer.fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
  tokenizer.fast.chat_template = CHATML
  tokenizer.save(place)
  made = published.model(transformers.LlamaConfig(**dict(published.SHAPE, vocab_size=304)))
  made.save_pretrained(place)
  (place / "generation_config.json").write_text(json.dumps(
      dict(eos_token_id=[2, 5], do_sample=True, temperature=0.7, top_p=0.9)))
  return place


@pytest.fixture(scope="module")
def model(tiny):
  return served.load(str(tiny))


def ask(capsys, *arguments):
  capsys.readouterr()
  cli.main(["sample", *map(str, arguments)])
  return capsys.readouterr().out


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


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
  assert model.defaults == SamplingParams(512, 0.7, top_p=0.9, stop_ids=(2, 5, end))
  assert (model.chats, model.max_positions) == (True, 128)


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


# ------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def answered(tiny, tmp_path_factory):
  """An input and its answers, two for each row."""
  place = tmp_path_factory.mktemp("files")
  (place / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  arguments = [f"--model={tiny}", f"--input={place / 'in.jsonl'}", f"--output={place / 'out.jsonl'}",
               "--samples=2", "--seed=5", "--quiet", FEW]
  cli.main(["sample", *arguments])
  return place, arguments


def test_rows_are_answered_in_order_and_keep_what_they_have(answered):
  found = lines_of(answered[0] / "out.jsonl")
  assert [row["sample"] for row in found] == [0, 1] * 4
  assert [{k: row[k] for k in ("prompt", "messages", "id") if k in row} for row in found] == [
      row for row in ROWS for _ in range(2)]
  assert len({row["text"] for row in found}) == 8  # equal prompts get other answers
  assert all(row["finish"] in ("stop", "length") and "ids" not in row for row in found)


def test_an_answer_is_the_same_alone_as_among_others(answered, tiny, capsys):
  row = lines_of(answered[0] / "out.jsonl")[7]
  out = ask(capsys, f"--model={tiny}", f"--prompt={row['prompt']}", f"--seed={row['seed']}", "--samples=2",
            "--json", FEW)
  assert json.loads(out.splitlines()[1]) == row


def test_an_interrupted_output_is_continued_and_a_foreign_one_is_left_alone(answered, tiny, tmp_path, capsys):
  place, arguments = answered
  whole = (place / "out.jsonl").read_bytes()
  lines = whole.splitlines(keepends=True)
  name = "out.jsonl.settings.json"
  (tmp_path / name).write_bytes((place / name).read_bytes())
  out = tmp_path / "out.jsonl"
  out.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # two rows, a sample of the third, a torn line
  again = [argument.replace(str(place / "out.jsonl"), str(out)) for argument in arguments]
  cli.main(["sample", *again, "--batch=2"])
  assert out.read_bytes() == whole
  cli.main(["sample", *again])  # there is nothing left to do
  assert out.read_bytes() == whole
  assert "temperature was 0.7 and is 1.0" in refused(capsys, *again, "--temperature=1")
  assert "seed was 5 and is 6" in refused(capsys, *again, "--seed=6")
  (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"prompt": "ho"}, *ROWS[1:]]))
  moved = [argument.replace(str(place / "in.jsonl"), str(tmp_path / "in.jsonl")) for argument in again]
  assert "out.jsonl:1 answers something else than" in refused(capsys, *moved)
  (tmp_path / name).unlink()
  assert "is there already" in refused(capsys, *again) and out.read_bytes() == whole


def test_what_an_input_holds_is_kept_to_the_digit_and_continued(model, tmp_path):
  talk = [dict(role="user", content="hi", time=1700000000.123456)]
  given = "".join(json.dumps({**row, **EXACT}) + "\n" for row in [{"messages": talk}, {"prompt": "you"}])
  (tmp_path / "in.jsonl").write_text(given)
  source, out = data.open_source(str(tmp_path / "in.jsonl")), tmp_path / "out.jsonl"
  asking = files.Asking(SamplingParams(3), logprobs=True)
  assert files.answer_file(model, source, out, asking) == 2
  whole = out.read_bytes()
  for line, row in zip(whole.splitlines(), given.splitlines()):
    found = json.loads(line)
    assert set(found) - set(json.loads(row)) == set(files.WRITTEN)
    assert json.dumps({name: found[name] for name in json.loads(row)}) == row
  out.write_bytes(whole.splitlines(keepends=True)[0] + b'{"messa')
  assert files.answer_file(model, source, out, asking) == 1 and out.read_bytes() == whole
  out.write_bytes(b"\0\0\n" + whole)
  damaged = out.read_bytes()
  with pytest.raises(ValueError, match=r"out\.jsonl:1 is damaged"):
    files.answer_file(model, source, out, asking)
  assert out.read_bytes() == damaged


def test_what_is_answered_is_never_rewritten(model, tmp_path, monkeypatch):
  (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n{"prompt": "you"}\n')
  source, out = data.open_source(str(tmp_path / "in.jsonl")), tmp_path / "out.jsonl"
  asking = files.Asking(SamplingParams(3), n=2)
  files.answer_file(model, source, out, asking)
  whole, node = out.read_bytes(), out.stat().st_ino
  out.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))  # a row, and half of another

  def killed(self, *args):
    raise KeyboardInterrupt
  monkeypatch.setattr(served.Model, "answers", killed)
  with pytest.raises(KeyboardInterrupt):
    files.answer_file(model, source, out, asking)
  assert out.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2]) and out.stat().st_ino == node


BAD = [
    ('{"prompt": "a"', "not valid JSON"),
    ('{"question": "a"}', "either 'prompt', a text, or 'messages'.*this one has 'question'"),
    ('{"prompt": ""}', "'prompt' holds ''"),
    ('{"prompt": "a", "text": "b"}', "field 'text' is one that the answer has: rename it"),
    ('{"prompt": "a", "ids": []}', "field 'ids' is one that the answer has: rename it"),
    ('{"messages": []}', "at least one"),
    ('{"messages": [{"role": "user"}]}', r"messages\[0\] has to be an object with role and content"),
    ('{"messages": [{"role": "bot", "content": "a"}]}', "the role 'bot'; roles are system, user"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "ends with the assistant's answer: take it out"),
    ('{"messages": [{"role": "tool", "content": "a"}]}', r"refuses messages of roles \['tool'\]: no tools"),
    (json.dumps({"prompt": "12 " * 60}), "--max_tokens=12 more it would pass the 128"),
]


def test_messages_are_asked_whole(model):
  asked = dict(role="assistant", content=None, tool_calls=[dict(function=dict(name="add", arguments={}))])
  talk = [dict(role="user", content="hi"), asked, dict(role="user", content="so?", name=None)]
  prompt = files.prompt_of(model, {"messages": talk}, "a:1", files.Asking(SamplingParams(12)))
  theirs = model.tokenizer.fast.apply_chat_template(
      [talk[0], dict(asked, content=""), talk[2]], add_generation_prompt=True, return_dict=False)
  assert prompt == theirs


@pytest.mark.parametrize("line,said", BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_with_its_line(model, tmp_path, line, said):
  (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
  asking = files.Asking(SamplingParams(12))
  with pytest.raises(data.BadRow, match=r"in\.jsonl:2: .*" + said):
    files.answer_file(model, data.open_source(str(tmp_path / "in.jsonl")), tmp_path / "out.jsonl", asking)
  assert not list(tmp_path.glob("out*"))


# -------------------------------------------------------------------------------------------- chat


@dataclasses.dataclass(frozen=True)
class Scripted(served.Model):
  """Says its lines, keeps what it was asked, and is interrupted where a line ends in ^C."""
  script: list = dataclasses.field(default_factory=list)
  asked: list = dataclasses.field(default_factory=list)

  def sampler(self, rows, watched=False):
    return None

  def answers(self, sampler, prompts, seeds, how, n=1, *, on_text=None):
    self.asked.append((self.tokenizer.written(prompts[0]), seeds[0]))
    text = self.script.pop(0)
    on_text(0, 0, text.removesuffix("^C")[:4])
    if text.endswith("^C"):
      raise KeyboardInterrupt
    return [[served.Answer(text, "stop", np.zeros(1), np.zeros(1))]]


def conversation(model, script, lines, **options):
  """A chat of given lines -> what was asked with which seed, what was seen, notes, messages at the end."""
  fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
  scripted, stream, notes = Scripted(**fields, script=list(script)), io.StringIO(), []
  lines = iter(lines)

  def read(_):
    line = next(lines, EOFError())
    if isinstance(line, BaseException):
      raise line
    return line
  kept = chat.chat(scripted, SamplingParams(12), seed=1, read=read, screen=Screen(stream), note=notes.append,
                   **options)
  return scripted.asked, stream.getvalue(), notes, kept


def test_a_chat_keeps_its_history_until_reset(model):
  asked, seen, _, kept = conversation(
      model, ["hello you", "fine", "anew"], ["hi", "", "how?", "/reset", KeyboardInterrupt(), "hi"],
      system="be")
  theirs = model.tokenizer.fast
  talk = [dict(role="system", content="be"), dict(role="user", content="hi"),
          dict(role="assistant", content="hello you"), dict(role="user", content="how?")]

  def prompt(messages):
    return theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
  assert [text for text, _ in asked] == [prompt(talk[:2]), prompt(talk), prompt(talk[:2])]
  assert asked[0][1] == asked[2][1] != asked[1][1]  # the same conversation has the same seeds
  assert seen == "hello you\nfine\nanew\n"
  assert kept == [talk[1], dict(role="assistant", content="anew")]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(model):
  asked, seen, notes, kept = conversation(
      model, ["nooo more^C", "^C", "ok"], ["hi", "stop", "so?", "/quit", "no"])
  assert seen == "nooo\n\nok\n" and notes.count("(stopped)") == 2
  assert [m["content"] for m in kept] == ["hi", "nooo", "so?", "ok"]  # what got no answer is forgotten


def test_what_is_too_long_or_has_no_template_is_said_in_the_chat(model):
  asked, _, notes, kept = conversation(model, [], ["12 " * 60])
  assert not asked and not kept and "or begin anew with /reset" in notes[-1]
  asked, seen, notes, kept = conversation(model, ["one", "two"], ["hi", "ho"], raw=True)
  bos = model.tokenizer.written([model.tokenizer.bos_id])
  assert [text for text, _ in asked] == [bos + "hi", bos + "ho"] and not kept and "continues texts" in notes[0]


def test_a_pipe_holds_the_prompt_or_the_lines_of_a_chat(tiny, capsys, monkeypatch):
  def piped(text, *more):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return ask(capsys, f"--model={tiny}", FEW, "--temperature=0", "--quiet", *more)
  first = piped("hi\n")
  assert first == ask(capsys, f"--model={tiny}", FEW, "--temperature=0", "--quiet", "--prompt=hi")
  assert first and piped("hi\n/reset\nhi\n", "--chat") == first + first  # greedy


def test_bytes_that_are_no_text_are_named(tiny, capsys, monkeypatch):
  def piped(given, *more):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), "utf-8"))
    cli.main(["sample", f"--model={tiny}", FEW, "--temperature=0", *more])
    return capsys.readouterr()
  said = piped(b"\xff\nhi\n", "--chat")
  assert said.out == piped(b"hi\n", "--chat").out != "" and "lone surrogate '\\udcff'" in said.err
  with pytest.raises(SystemExit):
    piped(b"\xff\n")
  assert "lone surrogate '\\udcff'" in capsys.readouterr().err


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
    model.messages(ROWS[1]["messages"])
  asks_more = dataclasses.replace(model, template=None)
  with pytest.raises(ValueError, match="asks for more than {question}.*--raw"):
    asks_more.prompt("1+2=")
  assert asks_more.prompt("1+2=", raw=True) == [1, *model.tokenizer.encode("1+2=")]


# ----------------------------------------------------------------------------------------- refusals


def refused(capsys, *arguments):
  capsys.readouterr()
  with pytest.raises(SystemExit) as end:
    cli.main(["sample", *map(str, arguments)])
  said = capsys.readouterr()
  assert end.value.code == 1 and said.err.startswith("jaxrl: ") and "Traceback" not in said.err
  return " ".join(said.err.split())


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
    (["--prompt=a", "--max_tokens=0"], "--max_tokens=0: a sample needs at least 1 token"),
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
