"""Questions with graded answers, out of the data that reward models are measured on.

  {"prompt": "...", "chosen": "...", "rejected": "...", "subset": "..."}         RewardBench
  {"prompt": "...", "chosen": [three texts], "rejected": [three texts], ...}     RM-Bench, by style
  whatever a run was trained on, read as its config says

Of a run whose last transform is `pair_answers`, the whole lists are read instead of their pairs: then
questions whose answers are all right, or all wrong, count in best-of-n as well.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import ml_collections

from jaxrl import data
from jaxrl.batch import PREFERENCE
from jaxrl.compose import nearest
from jaxrl.data import templates
from jaxrl.data.examples import present
from jaxrl.data.transforms.answers import graded_answers
from jaxrl.evaluation.reward_model_metrics import STYLES

SHAPES = ("auto", "benchmark", "run")
PAIRING = "pair_answers"


@dataclasses.dataclass(frozen=True)
class Question:
  """One question.

  Attributes:
    row: with the fields that the model's prompts are made of.
    answers: texts.
    grades: of them; more is better.
    styles: of them, see `reward_model_metrics.Scored`; empty without.
    subset: that it is reported under.
    where: `file:line`.
  """

  row: Mapping[str, Any]
  answers: tuple[str, ...]
  grades: tuple[float, ...]
  styles: tuple[int, ...] = ()
  subset: str = ""
  where: str = ""


@dataclasses.dataclass(frozen=True)
class Reading:
  """How rows are read.

  Attributes:
    shape: "benchmark", "run" (as the config of the run says), or "auto", see `is_benchmark`.
    subset: field with what a row is reported under; rows without it are under "".
    prompt: what benchmark prompts become before the run's own template, of {prompt}.
    answer: what benchmark answers become, of {answer}.
    limit: questions at most, the first ones; 0 for all.

  Raises:
    ValueError: impossible settings.
  """

  shape: str = "auto"
  subset: str = "subset"
  prompt: str = "{prompt}"
  answer: str = "{answer}"
  limit: int = 0

  def __post_init__(self):
    if self.shape not in SHAPES:
      raise ValueError(f"shape={self.shape!r}{nearest(self.shape, SHAPES)}")
    if self.limit < 0:
      raise ValueError(f"limit={self.limit} has to be at least 0")
    for name in ("prompt", "answer"):
      pieces = templates.parse(name, getattr(self, name), (name,))
      if sum(field == name for _, field in pieces) != 1:
        raise ValueError(f"{name}={getattr(self, name)!r} has to hold {{{name}}} once")


def without_pairing(config: ml_collections.ConfigDict
                    ) -> tuple[ml_collections.ConfigDict, dict[str, Any] | None]:
  """The config whose data are lists of graded answers, and how to read these; or what it is, and None."""
  specs = [{"name": s} if isinstance(s, str) else dict(s) for s in config.data.get("transforms", ())]
  if not specs or specs[-1]["name"] != PAIRING:
    return config, None
  changed = ml_collections.ConfigDict(config)
  changed.data.transforms = config.data.transforms[:-1]
  return changed, {k: v for k, v in specs[-1].items() if k in ("answers", "text", "grade")}


def is_benchmark(source: data.Source, reading: Reading) -> bool:
  """Whether rows are to be read by `read_benchmark`: as `reading.shape` says, or, with "auto", because
  the first one has text in `prompt`, and text or lists of text in `chosen` and `rejected`."""
  if reading.shape != "auto":
    return reading.shape == "benchmark"
  row = source[0]
  return isinstance(row.get("prompt"), str) and all(
      isinstance(x, str) or (isinstance(x, list) and x and all(isinstance(y, str) for y in x))
      for x in (row.get("chosen"), row.get("rejected")))


def read_benchmark(source: data.Source, reading: Reading, fields: data.Fields) -> list[Question]:
  """Questions of rows with prompt, chosen and rejected, whatever the run was trained on.

  Args:
    source: of such rows.
    reading: how to read them.
    fields: of the run; the prompt is put where it reads its own.

  Raises:
    BadRow: a row that is none.
  """
  count = min(len(source), reading.limit or len(source))
  return [_of_benchmark(source[i], source.where(i), reading, fields) for i in range(count)]


def read_own(source: data.Source, reading: Reading, tasks: data.TaskBuilder,
             pairs: data.PairBuilder | None, listed: Mapping[str, Any] | None,
             order: tuple[str, int] | None = None) -> list[Question]:
  """Questions of rows in the shape of the run's own data.

  Args:
    source: of such rows.
    reading: how to read them.
    tasks: of the run; refuses and counts rows as its `on_bad_row` says.
    pairs: of the run; None if it compares no answers.
    listed: as `without_pairing` gives it, if rows hold lists.
    order: column and sign of the grades, as of `compose.order_of`; None is by preference.

  Raises:
    BadRow: a row that cannot be read.
    ValueError: there is nothing to read.
  """
  if pairs is None and listed is None:
    raise ValueError(f"{source.where(0)}: the run compares no answers, so its config does not say how "
                     "rows hold them: use rows with prompt, chosen and rejected")
  found = []
  for index in range(len(source)):
    if listed is not None:
      question = tasks.guarded(lambda i=index: _of_list(source[i], source.where(i), reading, listed))
    else:
      question = _of_pair(pairs.read(source, index), reading, source.where(index), order)
    found += [question] if question else []
    if reading.limit and len(found) == reading.limit:
      break
  if not found:
    raise ValueError(f"not one of {len(source)} rows is usable, {source.where(0)} among them; refused: "
                     f"{tasks.counts.as_dict()}")
  return found


def _of_benchmark(row, where, reading, fields):
  prompt = present(row, "prompt", "prompt", where)
  if not isinstance(prompt, str):
    raise data.BadRow("wrong_type", where, "field 'prompt' has to hold text, not a "
                      f"{type(prompt).__name__}")
  both = [_texts(row, name, where) for name in ("chosen", "rejected")]
  counts = {len(texts) for texts in both}
  if counts not in ({1}, {STYLES}):
    raise data.BadRow("wrong_type", where, "fields 'chosen' and 'rejected' hold "
                      f"{' and '.join(str(len(texts)) for texts in both)} texts: one each, or one for "
                      f"each of {STYLES} styles")
  text = reading.prompt.format(prompt=prompt)
  own = {fields.messages: [{"role": "user", "content": text}]} if fields.messages else {
      fields.question: text}
  count = counts.pop()
  return Question(
      row={**row, **own}, answers=tuple(reading.answer.format(answer=x) for x in both[0] + both[1]),
      grades=(1.0,) * count + (0.0,) * count, styles=tuple(range(STYLES)) * 2 if count > 1 else (),
      subset=_subset(row, reading), where=where)


def _texts(row, field, where):
  value = present(row, field, field, where)
  texts = [value] if isinstance(value, str) else value
  if not isinstance(texts, list) or not texts or not all(isinstance(x, str) and x.strip() for x in texts):
    raise data.BadRow("wrong_type", where, f"field {field!r} has to hold text, or a list of texts, none "
                      "of them empty")
  return texts


def _of_list(row, where, reading, listed):
  graded = graded_answers(row, where, **listed)
  return Question(row=row, answers=tuple(x for x, _ in graded), grades=tuple(g for _, g in graded),
                  subset=_subset(row, reading), where=where)


def _of_pair(comparison, reading, where, order):
  if comparison is None:
    return None
  column, sign = order or (PREFERENCE, 1)
  return Question(row=comparison.task.row, answers=comparison.bare,
                  grades=tuple(sign * columns[column] for columns in comparison.columns),
                  subset=_subset(comparison.task.row, reading), where=where)


def _subset(row, reading):
  value = row.get(reading.subset, "")
  return value if isinstance(value, str) else str(value)
