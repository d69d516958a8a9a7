"""The data and the tokenizer of a config."""

from collections.abc import Iterator, Mapping
import pathlib
import re
import shutil
from typing import Any

import jax
import ml_collections

from jaxrl import compose
from jaxrl import config as configs
from jaxrl import data
from jaxrl import tasks
from jaxrl.data import transforms
from jaxrl.models import DecoderConfig
from jaxrl.models import adapters
from jaxrl.models import pretrained
from jaxrl.training import processes
from jaxrl.training.shapes import PAIRED

TOKENIZERS = ("character", "bpe", "pretrained")
SPLITS = ("train", "validation", "test")
FIRST_ROWS = 64  # of the training data, which are tried before anything is computed


class Part:
  """Rows `start` to `stop` of a source."""

  def __init__(self, source: data.Source, start: int | None, stop: int | None):
    self._source, self._rows = source, range(len(source))[start:stop]

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> dict:
    return self._source[self._rows[index]]

  def where(self, index: int) -> str:
    """Where that row stands in the whole source."""
    return self._source.where(self._rows[index])


def open_split(config: ml_collections.ConfigDict, split: str) -> data.Source | None:
  """Opens `config.data.<split>`, transformed; None where the config names no data for it.

  A spec may end in `[start:stop]`, as in `train.jsonl[500:]`.

  Raises:
    ValueError: there is no such data, or none is left of it.
  """
  try:
    source = _open(config, split, config.data[split])
    return source if source is None else _transformed(config, split, source)
  except ValueError as error:
    raise ValueError(f"config.data.{split}={config.data[split]!r}: {error}") from error


def _open(config, split, spec):
  if not spec:
    return None
  if spec.startswith("task:"):
    held_out = max(config.evaluate.problems, config.evaluate.pairs, 1)
    size = config.data.task_size if split == "train" else held_out
    own = {} if split == "train" else config.data.held_out_task
    return tasks.open_task(spec.removeprefix("task:"), split=split, size=size, seed=config.seed
                           if split == "train" else 0, **{**config.data.task, **own})
  match = re.fullmatch(r"(.*)\[(-?\d*):(-?\d*)\]", spec)
  if not match:
    return data.open_source(spec)
  part = Part(data.open_source(match[1]), *(int(x) if x else None for x in match.groups()[1:]))
  if not len(part):
    raise ValueError(f"[{match[2]}:{match[3]}] leaves none of the rows")
  return part


def _transformed(config, split, source):
  """The source, changed by those of `config.data.transforms` that are for this split."""
  for i, spec in enumerate(config.data.transforms):
    where, spec = f"config.data.transforms[{i}]", configs.to_dict(spec)
    spec = {"name": spec} if isinstance(spec, str) else spec
    splits = spec.pop("splits", SPLITS)
    if isinstance(splits, str) or not set(splits) <= set(SPLITS):
      raise ValueError(f"{where}.splits={splits!r} must list some of {', '.join(SPLITS)}")
    seed = config.seed if split == "train" else 0
    transform = compose.build(spec, transforms, where=where, given=dict(seed=seed, split=split))
    if split in splits:
      source = transform(source)
      if not len(source):
        raise ValueError(f"{where} leaves none of the rows")
  return source


def make_tokenizer(config: ml_collections.ConfigDict, train: data.Source,
                   directory: pathlib.Path) -> data.Tokenizer:
  """The tokenizer of a run: the one saved in `directory`, else made as the config says and saved.

  One that lies there without the `config.json` of a run beside it is of an attempt that never
  began, perhaps with other settings, and is made again.

  Raises:
    ValueError: unknown kind, impossible settings, or nothing at `config.tokenizer.path`.
  """
  spec = config.tokenizer
  if spec.kind not in TOKENIZERS:
    raise ValueError(f"config.tokenizer.kind={spec.kind!r}{compose.nearest(spec.kind, TOKENIZERS)}")
  if directory.exists() and (directory.parent / "config.json").exists():
    return data.load_tokenizer(directory)
  tokenizer = _tokenizer_of_run(pathlib.Path(config.start)) if config.start else _new_tokenizer(config, train)
  data.set_date(tokenizer, spec.date, "config.tokenizer.date")
  if tokenizer.writes_date:
    processes.meet("the date that the chat template writes", tokenizer.date.encode())
  if jax.process_index() == 0:
    shutil.rmtree(directory, ignore_errors=True)
    tokenizer.save(directory)
  return tokenizer


def _new_tokenizer(config, train):
  spec = config.tokenizer
  try:
    if config.model.source and not spec.path:
      return _published_tokenizer(spec, config.model.source)
    if spec.kind == "character":
      return data.CharacterTokenizer(*[spec.alphabet] if spec.alphabet else [])
    if spec.kind == "bpe":
      return data.train_bpe(_texts(train, config), spec.vocab_size)
    if not spec.path:
      raise ValueError("kind='pretrained' needs a path: the directory of a model or tokenizer")
    return data.load_tokenizer(spec.path)
  except data.BadRow:
    raise
  except ValueError as error:
    raise ValueError(f"config.tokenizer: {error}") from error


def _published_tokenizer(spec, source):
  """The tokenizer of `config.model.source`, if that is what is asked for."""
  tokenizer = data.load_tokenizer(pretrained.resolve(source, weights=False))
  same = spec.kind == "character" and getattr(tokenizer, "alphabet", None) == spec.alphabet
  if spec.kind != "pretrained" and not same:
    raise ValueError(f"kind={spec.kind!r} would give other ids than config.model.source={source!r} was "
                     "trained with: --config.tokenizer.kind=pretrained takes its own tokenizer")
  return tokenizer


def _tokenizer_of_run(start):
  """The tokenizer of the run that this one begins with."""
  configs.check_run(start, f"config.start={str(start)!r}", "name the --workdir of a run that has saved a "
                    "checkpoint, or leave it empty")
  return data.load_tokenizer(start / "tokenizer")


def decoder_config(model: Mapping[str, Any], tokenizer: data.Tokenizer) -> DecoderConfig:
  """The architecture that `config.model` describes, for the tokens of a tokenizer.

  Special tokens that the model does not have are left out of the tokenizer.

  Raises:
    ValueError: settings that do not fit together.
  """
  fields, tokens = dict(model), tokenizer.vocab_size
  fields.pop("source", None)  # it has filled the others in
  fields["vocab_size"] = fields["vocab_size"] or tokens
  if fields["vocab_size"] < tokens and not tokenizer.leave_out(fields["vocab_size"]):
    raise ValueError(f"config.model.vocab_size={fields['vocab_size']}, but the tokenizer has "
                     f"{tokens} tokens; set it to at least that, or to 0 for exactly that")
  fields["adapters"] = adapters.read(fields.get("adapters", {}))
  fields = {name: _as_tuples(value) for name, value in fields.items()}
  fields["verdict"] = tuple(_token_of(text, tokenizer) for text in fields.get("verdict", ()))
  return DecoderConfig(**fields)


def longest(data: Mapping[str, Any], rollout: Mapping[str, Any]) -> int:
  """Tokens of the longest sequence that a run is made for; 0 if it has no limit."""
  limited = data["max_prompt_tokens"] and data["max_completion_tokens"]
  return (data["max_prompt_tokens"] + max(data["max_completion_tokens"], rollout["max_tokens"])
          if limited else 0)


def _as_tuples(value):
  return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _token_of(text, tokenizer):
  ids = tokenizer.encode(text)
  if len(ids) != 1:
    raise ValueError(f"config.model.verdict has {text!r}, which is {len(ids)} tokens here: name two texts of "
                     "one token each, perhaps with a space in front")
  return ids[0]


def builder(config: ml_collections.ConfigDict, tokenizer: data.Tokenizer) -> data.TaskBuilder:
  """What turns rows into tasks and examples.

  Raises:
    ValueError: settings that no row could satisfy.
  """
  d = config.data
  fields = data.Fields(question=d.question, answer=d.answer, solution=d.solution, id=d.id,
                       messages=d.messages, more=tuple(d.more))
  try:
    return data.TaskBuilder(
        tokenizer, fields, prompt_template=d.prompt_template,
        solution_template=d.solution_template, answer_pattern=d.answer_pattern,
        remove_pattern=d.remove_pattern, chat=d.chat, max_prompt_tokens=d.max_prompt_tokens,
        max_completion_tokens=d.max_completion_tokens, on_bad_row=d.on_bad_row)
  except ValueError as error:
    raise ValueError(f"config.data: {error}") from error


def pair_builder(config: ml_collections.ConfigDict, tasks: data.TaskBuilder,
                 ranges: Mapping[str, tuple[float, float]] | None = None) -> data.PairBuilder:
  """What turns rows into pairs of answers.

  Args:
    ranges: of `compose.ranges_of` the losses that read columns.

  Raises:
    ValueError: settings that no row could satisfy.
  """
  d = config.data
  try:
    return data.PairBuilder(tasks, chosen=d.chosen, rejected=d.rejected, answers=d.answers,
                            preference=d.preference, columns=tuple(d.columns), turn=d.turn,
                            other_turn=d.other_turn, critique=d.critique,
                            step_labels=d.step_labels, step_end=d.step_end,
                            weaker=d.weaker, ranges=ranges or {})
  except ValueError as error:
    raise ValueError(f"config.data: {error}") from error


def read_tasks(builder: data.TaskBuilder | data.PairBuilder, source: data.Source | None, count: int
               ) -> list[Any]:
  """The first `count` usable tasks, or pairs, of a source.

  Raises:
    ValueError: there are rows, but none is usable.
  """
  found: list[Any] = []
  for index in range(len(source) if source is not None and count else 0):
    task = builder.read(source, index)
    if task is not None:
      found.append(task)
      if len(found) == count:
        break
  if source is not None and count and not found:
    _refuse(builder, source, solved=False)
  return found


def first_tasks(builder: data.TaskBuilder | data.PairBuilder, source: data.Source, *,
                solved: bool = False) -> list[Any]:
  """Tries the first rows of the training data, which are read only once training begins.

  Args:
    solved: rows must hold a solution to imitate.

  Raises:
    BadRow: one of them is bad, and `on_bad_row` does not let it pass.
    ValueError: no row of the source is usable.
  """
  trial = builder.fresh()
  read = trial.read_solved if solved else trial.read
  first = [read(source, index) for index in range(min(len(source), FIRST_ROWS))]
  if all(task is None for task in first) and all(
      read(source, index) is None for index in range(len(first), len(source))):
    _refuse(builder, source, solved)
  return [task for task in first if task is not None]


def _refuse(builder, source, solved):
  strict = builder.fresh("fail")
  try:
    (strict.read_solved if solved else strict.read)(source, 0)
  except data.BadRow as error:
    raise ValueError(f"not one of {len(source)} rows is usable. The first, {error}") from error


def _texts(source, config) -> Iterator[str]:
  """The text that BPE learns from: questions, solutions and compared answers as training will see
  them."""
  d = config.data
  pairs = any(configs.phase_config(config, name).kind in PAIRED for name in config.phases)
  remove = re.compile(d.remove_pattern) if d.remove_pattern else None
  for index in range(len(source)):
    try:
      row = source[index]
    except data.BadRow:
      if d.on_bad_row == "skip":
        continue
      raise
    compared = [row.get(field) for field in (d.chosen, d.rejected) if field] if pairs else []
    texts = [row.get(field) for field in (d.question, d.solution or d.answer, *d.more) if field]
    texts += [text for text in compared if isinstance(text, str)]
    if pairs and d.critique:
      texts += [row.get(f"{d.chosen}_{d.critique}"), row.get(f"{d.rejected}_{d.critique}"), row.get(d.critique)]
    for messages in (row.get(d.messages) if d.messages else None, *compared):
      for message in messages if isinstance(messages, list) else ():
        texts.append(message.get("content") if isinstance(message, dict) else message)
    listed = row.get(d.answers) if pairs and d.answers else None
    for item in listed if isinstance(listed, list) else ():
      text = item.get(d.chosen) if isinstance(item, dict) else None
      texts += text if isinstance(text, list) else [text]
    for text in texts:
      if isinstance(text, str):
        yield remove.sub("", text) if remove else text
