"""A chat, with a model that says its lines, and through a pipe."""

import dataclasses
import io
import sys

import numpy as np
import pytest

from jaxrl import cli
from jaxrl.inference import chat, served
from jaxrl.inference.screen import Screen
from jaxrl.sampling import SamplingParams
from tests.inference.asked import ask, FEW


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
  assert piped("\ufeffhi\n") == piped("\ufeffhi\n", "--chat") == first


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
