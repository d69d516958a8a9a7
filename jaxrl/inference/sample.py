"""`jaxrl sample`: a prompt, a file of prompts, or a conversation."""

import builtins
from collections.abc import Mapping
import contextlib
import dataclasses
import importlib
import pathlib
import sys
from typing import Any

from jaxrl import data
from jaxrl.inference import chat
from jaxrl.inference import files
from jaxrl.inference import recommended
from jaxrl.inference import served
from jaxrl.inference.screen import Screen
from jaxrl.sampling import SamplingParams
from jaxrl.training import compilation
from jaxrl.training import jsonl
from jaxrl.training.terminal import Terminal

BOUND = 2 ** 32
BYTE_ORDER_MARK = "\ufeff"  # which some systems put in front of text
SETTINGS = ("max_tokens", "temperature", "top_k", "top_p", "min_p")


def sample(model: str, *, prompt: str | None = None, input: str = "", output: str = "", talk: bool = False,
           system: str = "", raw: bool = False, samples: int = 1, seed: int = 0, stop: tuple[str, ...] = (),
           settings: Mapping[str, Any] = {}, as_json: bool = False, logprobs: bool = False, batch: int = 64,
           dtype: str = "", tensor: int = 1, date: str = "", quiet: bool = False) -> None:
  """Answers a prompt, or the rows of a file, or whoever is at the terminal.

  Args:
    model: workdir of a run, directory of a published model, or hub id.
    prompt: one to answer; without it and an input, a terminal begins a chat, and anything else that
      standard input is holds the prompt.
    input, output: JSONL files, see `files.answer_file`.
    talk: chat, whatever standard input is.
    system, raw, samples, seed, logprobs: as in `files.Asking`.
    stop: strings that end an answer.
    settings: of `SETTINGS`, in place of the model's own.
    as_json: an object for each answer instead of its text.
    batch: as in `files.answer_file`.
    dtype, tensor, date: as in `served.load`; an output that is continued has its date already.
    quiet: answers, and nothing about them but what the model asks for and does not get.

  Raises:
    BadRow: of the input, with file and line.
    ValueError: whatever else is wrong, before any answer.
  """
  interactive = talk or (prompt is None and not input and sys.stdin.isatty())
  _check(prompt, input, output, interactive, samples, seed, batch, as_json, logprobs)
  how = _settings(SamplingParams(recommended.MAX_TOKENS), settings, stop)  # refused before a model is read
  source = data.open_source(input) if input else None
  if hasattr(sys.stdin, "reconfigure"):
    sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text, which tokenizers refuse by name
  if prompt is None and not input and not interactive:
    prompt = sys.stdin.read().removeprefix(BYTE_ORDER_MARK).removesuffix("\n")
  if prompt == "":
    raise ValueError("the prompt is empty: say something, as --prompt=TEXT or through a pipe")
  terminal = Terminal(quiet=quiet, stream=sys.stderr)
  note = (lambda text: None) if quiet else lambda text: print(text, file=sys.stderr, flush=True)
  compilation.use_cache("", note)
  date = date or (files.date_of(pathlib.Path(output)) if output else "")
  loaded = served.load(model, dtype=dtype, tensor=tensor, date=date)
  how = _settings(loaded.defaults, settings, stop)
  if loaded.unheeded:
    print(f"jaxrl: {loaded.unheeded}", file=sys.stderr, flush=True)  # however quiet it is to be
  all_of_them, *vain = recommended.in_force(how, settings, samples)
  note(f"{' checkpoint '.join(map(str, loaded.identity.values()))}, {loaded.decoder.dtype}: {all_of_them}, "
       f"seed {seed}" + (f", date {loaded.tokenizer.date}" if loaded.tokenizer.writes_date else ""))
  for line in vain:
    note(line)
  if source is not None:
    asking = files.Asking(how, samples, seed, system, raw, logprobs)
    return _file(loaded, source, pathlib.Path(output), asking, batch, terminal, note)
  if interactive:
    read = _lines() if sys.stdin.isatty() else lambda _: builtins.input().removeprefix(BYTE_ORDER_MARK)
    chat.chat(loaded, how, seed=seed, system=system, raw=raw, read=read, note=note)
    return None
  ids = loaded.prompt(prompt, system, raw)
  loaded.check_length(ids, how.max_tokens)
  return _one(loaded, ids, prompt, how, samples, seed, as_json, logprobs, batch)


def _check(prompt, input, output, interactive, samples, seed, batch, as_json, logprobs):
  """Refuses what does not go together."""
  def check(wrong, message):
    if wrong:
      raise ValueError(message)
  check(bool(input) != bool(output), "--input=FILE and --output=FILE belong together: name both, or neither")
  check(input and prompt is not None, "--prompt and --input both say what to answer: leave one out")
  check(interactive and (input or prompt is not None),
        "--chat reads from the terminal: leave --prompt and --input out")
  check(input and pathlib.Path(input).resolve() == pathlib.Path(output).resolve(),
        f"--output={output} is the input: name another file")
  check(output and pathlib.Path(output).exists() and not pathlib.Path(output).is_file(),
        f"--output={output} is no file that can be continued: name one")
  check(interactive and (samples != 1 or as_json or logprobs),
        "--samples, --json and --logprobs are not for a chat: give a --prompt, or --input and --output")
  check(logprobs and not (as_json or input), "--logprobs are written with --json, or to an --output")
  check(as_json and input, "--json is what an --output always is: leave it out")
  check(samples < 1, f"--samples={samples}: at least 1")
  check(batch < 1, f"--batch={batch}: at least 1")
  check(not 0 <= seed < BOUND, f"--seed={seed}: use a number from 0 to {BOUND - 1}")


def _settings(defaults, given, stop):
  try:
    return dataclasses.replace(defaults, **given, stop_strings=(*defaults.stop_strings, *stop))
  except ValueError as error:
    text = str(error).replace("sampling.stop_strings", "--stop").replace("sampling.", "--")
    raise ValueError(text) from error


def _file(model, source, output, asking, batch, terminal, note):
  began = False

  def advance(done, total):
    nonlocal began
    if not began:
      terminal.start_phase("answers", "sample", total, done)
    began = True
    terminal.advance(done, {})
  try:
    now = files.answer_file(model, source, output, asking, batch=batch, advance=advance)
  finally:
    if began:
      terminal.end_phase()
  note(f"{output}: {len(source)} rows answered, {now} of them now")


def _one(model, ids, prompt, how, samples, seed, as_json, logprobs, batch):
  """Answers one prompt; the first sample appears as it is sampled, others once all are there."""
  screen, sampler = Screen(sys.stdout), model.sampler(batch, watched=not as_json)

  def on_text(_, number, text):
    if number == 0:
      screen.show(text)
  [answers] = model.answers(sampler, [ids], [seed], how, samples, on_text=None if as_json else on_text)
  for number, answer in enumerate(answers):
    if as_json:
      row = {"prompt": prompt, **files.row_of(answer, number, seed, logprobs)}
      print(jsonl.encode(row).decode(), end="", flush=True)
      continue
    if number:
      print(f"--- {number + 1} of {samples}", flush=True)
    screen.end(answer.text)


def _lines():
  """What reads a line of a terminal, which can be edited where that can be had."""
  with contextlib.suppress(ImportError):
    importlib.import_module("readline")  # which changes `input`
  return builtins.input
