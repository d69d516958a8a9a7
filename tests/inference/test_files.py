"""Prompts in a file: against the command that asks one, against itself, and against bad rows."""

import json
import shutil

import pytest

from jaxrl import cli, data
from jaxrl.data import dates
from jaxrl.inference import files, served
from jaxrl.sampling import SamplingParams
from tests.inference.asked import ask, CHATML, FEW, lines_of, refused

EXACT = {"score": 0.12345678901234567, "big": 2 ** 60 + 1, "none": None, "not": float("nan"),
         "list": [1e-9, "é"]}
ROWS = [{"prompt": "hi", "id": 1}, {"messages": [{"role": "user", "content": "you"}]}, {"prompt": "é🙂"},
        {"prompt": "hi"}]


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
    ('{"prompt": 3}', "'prompt' holds 3, but has to hold some text"),
    ('{"prompt": ["a"]}', "'prompt' holds .'a'., but has to hold some text"),
    ('{"prompt": "a\\ud800"}', "lone surrogate"),
    ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}', "role and content, both text"),
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


WRITTEN_BY_OTHERS = [b'\xef\xbb\xbf{"prompt": "hi"}\n{"prompt": "you"}\n',
                     b'{"prompt": "hi"}\r\n\r\n{"prompt": "you"}',
                     b'\n\n{"prompt": "hi"}\n \t\n{"prompt": "you"}\n']


@pytest.mark.parametrize("given", WRITTEN_BY_OTHERS, ids=["mark", "crlf", "blank_lines"])
def test_files_of_other_systems_are_answered_alike(model, tmp_path, given):
  asking, found = files.Asking(SamplingParams(3), n=2), []
  for name, content in (("a", given), ("b", b'{"prompt": "hi"}\n{"prompt": "you"}\n')):
    (tmp_path / f"{name}.jsonl").write_bytes(content)
    source = data.open_source(str(tmp_path / f"{name}.jsonl"))
    files.answer_file(model, source, tmp_path / f"{name}.out", asking)
    found.append((tmp_path / f"{name}.out").read_bytes())
  assert found[0] == found[1] and found[0].count(b"\n") == 4


def test_rows_with_the_same_id_are_rows_of_their_own(model, tmp_path):
  (tmp_path / "in.jsonl").write_text('{"prompt": "hi", "id": 1}\n' * 2)
  source, out = data.open_source(str(tmp_path / "in.jsonl")), tmp_path / "out.jsonl"
  asking = files.Asking(SamplingParams(6, 1.5))
  files.answer_file(model, source, out, asking)
  whole = out.read_bytes()
  first, second = lines_of(out)
  assert first["id"] == second["id"] and first["seed"] != second["seed"]
  out.write_bytes(whole[:-9])
  assert files.answer_file(model, source, out, asking) == 1 and out.read_bytes() == whole


@pytest.mark.parametrize("text,why", [("{", "Expecting property name"), ("[1]", "no JSON object")])
def test_damaged_settings_are_named_and_nothing_is_touched(answered, tiny, tmp_path, capsys, text, why):
  whole = (answered[0] / "out.jsonl").read_bytes()
  (tmp_path / "out.jsonl").write_bytes(whole)
  (tmp_path / "out.jsonl.settings.json").write_text(text)
  said = refused(capsys, *answered[1][:2], f"--output={tmp_path / 'out.jsonl'}", *answered[1][3:])
  assert f"out.jsonl.settings.json, which says how out.jsonl was made, is damaged ({why}" in said
  assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_date_in_the_template_is_that_of_the_first_command(tiny, tmp_path, monkeypatch, capsys):
  place = tmp_path / "dated"
  shutil.copytree(tiny, place)
  (place / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }} " + CHATML)
  (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n{"prompt": "you"}\n')

  def on(day, name, *more):
    monkeypatch.setattr(dates, "today", lambda: day)
    cli.main(["sample", f"--model={place}", f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / name}",
              "--logprobs", "--max_tokens=3", *more])
    assert f", date {more[0][-10:] if more else '2025-01-05'}" in capsys.readouterr().err
    return (tmp_path / name).read_bytes()
  whole = on("2025-01-05", "out.jsonl")
  (tmp_path / "out.jsonl").write_bytes(whole.splitlines(keepends=True)[0])
  assert on("2025-01-06", "out.jsonl") == whole
  assert on("2026-01-06", "again.jsonl", "--date=2025-01-05") == whole
  assert on("2025-01-05", "other.jsonl", "--date=2025-01-06") != whole
  said = refused(capsys, f"--model={place}", f"--input={tmp_path / 'in.jsonl'}",
                 f"--output={tmp_path / 'out.jsonl'}", "--logprobs", "--max_tokens=3", "--date=2025-01-07", "--quiet")
  assert "date was '2025-01-05' and is '2025-01-07'" in said
  assert "no chat template that writes the date" in refused(
      capsys, f"--model={tiny}", "--prompt=a", "--date=2025-01-07")
