"""The data and the tokenizer of a config."""

from collections.abc import Sequence
import pathlib
import re

import ml_collections

from jaxrl import compose
from jaxrl import data
from jaxrl import tasks
from jaxrl.batch import Task

TOKENIZERS = ("character", "bpe", "pretrained")
SPLITS = ("train", "validation", "test")


class Part:
  """Rows `start` to `stop` of a source."""

  def __init__(self, source: data.Source, start: int | None, stop: int | None):
    self._source, self._rows = source, range(len(source))[start:stop]

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> dict:
    return self._source[self._rows[index]]

  def where(self, index: int) -> str:
    return self._source.where(self._rows[index])


def open_split(config: ml_collections.ConfigDict, split: str) -> data.Source | None:
  """Opens `config.data.<split>`; None where the config names no data for it.

  A spec may end in `[start:stop]`, as in `train.jsonl[500:]`.

  Raises:
    ValueError: there is no such data, or none is left of it.
  """
  spec = config.data[split]
  if not spec:
    return None
  if spec.startswith("task:"):
    size = config.data.task_size if split == "train" else max(config.evaluate.problems, 1)
    return tasks.open_task(spec.removeprefix("task:"), split=split, size=size, seed=config.seed
                           if split == "train" else 0, **config.data.task)
  match = re.fullmatch(r"(.*)\[(-?\d*):(-?\d*)\]", spec)
  if not match:
    return data.open_source(spec)
  part = Part(data.open_source(match[1]), *(int(x) if x else None for x in match.groups()[1:]))
  if not len(part):
    raise ValueError(f"config.data.{split}={spec!r} leaves no rows")
  return part


def make_tokenizer(config: ml_collections.ConfigDict, train: data.Source,
                   directory: pathlib.Path) -> data.Tokenizer:
  """The tokenizer of a run: the one saved in `directory`, else made as the config says and saved.

  Raises:
    ValueError: unknown kind, or nothing at `config.tokenizer.path`.
  """
  spec = config.tokenizer
  if spec.kind not in TOKENIZERS:
    raise ValueError(f"config.tokenizer.kind={spec.kind!r}{compose.nearest(spec.kind, TOKENIZERS)}")
  if directory.exists():
    return data.load_tokenizer(directory)
  if spec.kind == "character":
    tokenizer = data.CharacterTokenizer(*[spec.alphabet] if spec.alphabet else [])
  elif spec.kind == "bpe":
    tokenizer = data.train_bpe(_texts(train, config), spec.vocab_size)
  else:
    if not spec.path:
      raise ValueError("config.tokenizer.kind='pretrained' needs config.tokenizer.path")
    tokenizer = data.load_tokenizer(spec.path)
  tokenizer.save(directory)
  return tokenizer


def builder(config: ml_collections.ConfigDict, tokenizer: data.Tokenizer) -> data.TaskBuilder:
  """What turns rows into tasks and examples."""
  d = config.data
  fields = data.Fields(question=d.question, answer=d.answer, solution=d.solution, id=d.id,
                       messages=d.messages)
  return data.TaskBuilder(
      tokenizer, fields, prompt_template=d.prompt_template, solution_template=d.solution_template,
      answer_pattern=d.answer_pattern, remove_pattern=d.remove_pattern, chat=d.chat,
      max_prompt_tokens=d.max_prompt_tokens, max_completion_tokens=d.max_completion_tokens,
      on_bad_row=d.on_bad_row)


def read_tasks(builder: data.TaskBuilder, source: data.Source | None, count: int) -> list[Task]:
  """The first `count` usable tasks of a source."""
  found: list[Task] = []
  for index in range(len(source) if source is not None and count else 0):
    task = builder.read(source, index)
    if task is not None:
      found.append(task)
      if len(found) == count:
        break
  return found


def _texts(source, config) -> Sequence[str]:
  """The text that a BPE tokenizer learns from: questions and solutions as training will see them."""
  d = config.data
  remove = re.compile(d.remove_pattern) if d.remove_pattern else None
  for index in range(len(source)):
    row = source[index]
    for field in (d.question, d.solution or d.answer):
      text = row.get(field) if field else None
      if isinstance(text, str):
        yield remove.sub("", text) if remove else text
