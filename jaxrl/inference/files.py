"""Prompts in a file, answers in another: in order, and going on where an earlier command stopped."""

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

from jaxrl import data
from jaxrl.data import conversations
from jaxrl.inference.served import Answer
from jaxrl.inference.served import Model
from jaxrl.inference.served import seed_of
from jaxrl.sampling import SamplingParams
from jaxrl.training import jsonl

ROLES = ("system", "user", "assistant", "tool")
WRITTEN = ("sample", "text", "finish", "seed", "tokens", "logprobs", "ids")  # fields of answers


@dataclasses.dataclass(frozen=True)
class Asking:
  """How a file is answered; an output is continued by the same only.

  Attributes:
    how: to sample.
    n: samples of each prompt.
    seed: of all.
    system: what the system says first, of rows that do not say so themselves.
    raw: prompts without the model's template.
    logprobs: write tokens and their log-probabilities.
  """

  how: SamplingParams
  n: int = 1
  seed: int = 0
  system: str = ""
  raw: bool = False
  logprobs: bool = False


def answer_file(model: Model, source: data.Source, output: pathlib.Path, asking: Asking, *, batch: int = 64,
                advance: Callable[[int, int], None] = lambda done, total: None) -> int:
  """Answers the rows of a source that the output does not answer yet.

  An output has, in the order of the rows, `n` lines for each: what is in the row, and the fields of
  `row_of`. Beside it lies `<output>.settings.json`, which says how it was made.

  Args:
    model: that answers.
    source: rows of `{"prompt": text}` or `{"messages": [{"role", "content"}, ...]}`.
    output: a JSONL file, continued if it is there.
    asking: how.
    batch: samples computed at the same time; no answer depends on it.
    advance: is told how many rows of how many are answered.

  Returns:
    How many rows were answered now.

  Raises:
    BadRow: a row that cannot be asked, before any is answered.
    ValueError: the output is of another command.
  """
  prompts = [prompt_of(model, source[i], source.where(i), asking) for i in range(len(source))]
  done = _begun(model, source, output, asking)
  sampler = model.sampler(batch)
  at_once = max(1, batch // asking.n)
  advance(done, len(prompts))
  with open(output, "ab") as file:
    for first in range(done, len(prompts), at_once):
      rows = range(first, min(first + at_once, len(prompts)))
      seeds = [seed_of(asking.seed, i) for i in rows]
      found = model.answers(sampler, [prompts[i] for i in rows], seeds, asking.how, asking.n)
      _append(file, (line_of(source[i], row_of(answer, number, seed, asking.logprobs))
                     for i, seed, answers in zip(rows, seeds, found) for number, answer in enumerate(answers)))
      advance(rows[-1] + 1, len(prompts))
  return len(prompts) - done


def row_of(answer: Answer, number: int, seed: int, logprobs: bool) -> dict[str, Any]:
  """An answer as a JSON object; `jaxrl sample --prompt=... --seed=SEED` gives the same."""
  more = dict(logprobs=answer.logprobs, ids=answer.tokens) if logprobs else {}
  return dict(sample=number, text=answer.text, finish=answer.finish, seed=seed,
              tokens=len(answer.tokens), **more)


def line_of(row: Mapping[str, Any], answer: Mapping[str, Any]) -> bytes:
  """A line with what a row has, exactly, and its answer, whose numbers have the digits of float32."""
  return jsonl.encode({**row, **jsonl.jsonable(answer)}, exact=True)


def prompt_of(model: Model, row: Mapping[str, Any], where: str, asking: Asking) -> list[int]:
  """The token ids of a row.

  Raises:
    BadRow: what is wrong with it, and where it stands.
  """
  if taken := [name for name in WRITTEN if name in row]:
    raise data.BadRow("wrong_type", where, f"field {taken[0]!r} is one that the answer has: rename it")
  given = [name for name in ("prompt", "messages") if name in row]
  if len(given) != 1:
    raise data.BadRow("missing_field", where, "a row has either 'prompt', a text, or 'messages', a list of "
                      f"{{role, content}}; this one has {', '.join(map(repr, row)) or 'nothing'}")
  try:
    if given == ["prompt"]:
      if not isinstance(row["prompt"], str) or not row["prompt"]:
        raise ValueError(f"'prompt' holds {row['prompt']!r}, but has to hold some text")
      prompt = model.prompt(row["prompt"], asking.system, asking.raw)
    else:
      prompt = model.messages(_checked(row["messages"]), asking.system)
    model.check_length(prompt, asking.how.max_tokens)
  except ValueError as error:
    raise data.BadRow("not_encodable", where, str(error)) from error
  return prompt


def _checked(messages):
  """Messages that can be answered."""
  if not isinstance(messages, list) or not messages:
    raise ValueError("'messages' has to hold a list of {role, content}, at least one")
  if all(isinstance(message, dict) for message in messages):
    messages = [conversations.message(message) for message in messages]  # as in training
  for i, message in enumerate(messages):
    if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
      raise ValueError(f"messages[{i}] has to be an object with role and content, both text")
    if message["role"] not in ROLES:
      raise ValueError(f"messages[{i}] has the role {message['role']!r}; roles are {', '.join(ROLES)}")
  if messages[-1]["role"] == "assistant":
    raise ValueError("'messages' ends with the assistant's answer: take it out, so that there is something to "
                     "answer")
  return messages


def date_of(output: pathlib.Path) -> str:
  """The date that chats have in an output, which may have been begun on another day; "" if it has none.

  Raises:
    ValueError: what says how it was made is damaged.
  """
  return _made(output).get("date", "") if output.exists() and _settings(output).exists() else ""


def _settings(output):
  return output.with_name(output.name + ".settings.json")


def _made(output):
  """How an output was made."""
  try:
    found = json.loads(_settings(output).read_text())
    if isinstance(found, dict):
      return found
    raise ValueError("no JSON object")
  except ValueError as error:
    raise ValueError(f"{_settings(output)}, which says how {output.name} was made, is damaged ({error}): name "
                     "another --output, or delete both") from error


def _begun(model, source, output, asking):
  """How many rows are answered already, by the same command."""
  settings = _settings(output)
  own = {f.name: getattr(asking, f.name) for f in dataclasses.fields(asking) if f.name != "how"}
  own |= {"date": model.tokenizer.date} if model.tokenizer.writes_date else {}
  now = {**model.identity, "dtype": model.decoder.dtype, **own, **dataclasses.asdict(asking.how)}
  now = json.loads(json.dumps(now))
  if output.exists() and output.stat().st_size:
    if not settings.exists():
      raise ValueError(f"{output} is there already, and no {settings.name} says how it was made: name another "
                       "--output, or delete it")
    before = _made(output)
    if before != now:
      differs = ", ".join(f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in {**before, **now}
                          if before.get(k) != now.get(k))
      raise ValueError(f"{output} was begun otherwise ({differs}): name another --output, or delete it")
  jsonl.write_json(settings, now, exact=True)
  done = size = end = 0
  for number, (line, row) in enumerate(_lines(output)):
    i = number // asking.n
    if row is None:
      raise ValueError(f"{output}:{number + 1} is damaged: cut the file off before it, or name another "
                       "--output")
    if i >= len(source):
      raise ValueError(f"{output} answers more than the {len(source)} rows of the input: name another --output")
    asks, answers = (jsonl.encode([x.get(name) for name in ("prompt", "messages")], exact=True)
                     for x in (source[i], row))
    if row.get("sample") != number % asking.n or asks != answers:
      raise ValueError(f"{output}:{number + 1} answers something else than {source.where(i)} asks: name "
                       "another --output, or delete it")
    size += len(line)
    if number % asking.n == asking.n - 1:
      done, end = i + 1, size
  if output.exists():
    os.truncate(output, end)  # without a torn line, and a row whose samples are not all there
  return done


def _lines(path):
  """Whole lines of a file, and what they hold; None for what is no JSON object."""
  if not path.exists():
    return
  with open(path, "rb") as file:
    for line in file:
      if line.endswith(b"\n"):
        try:
          row = json.loads(line)
        except ValueError:
          row = None
        yield line, row if isinstance(row, dict) else None


def _append(file, lines):
  """Writes lines, which are in the system's hands then."""
  try:
    file.write(b"".join(lines))
    file.flush()
  except OSError as error:
    raise OSError(error.errno, f"cannot write to {file.name}: {error.strerror}. Make room there; the same "
                  "command continues") from error
