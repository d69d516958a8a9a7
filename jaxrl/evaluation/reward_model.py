"""`jaxrl evaluate`: what a reward model of a run says about answers whose order is known.

Leaves behind, in a directory: `scores.jsonl`, a line per question, from which the same command
continues after an interruption; `report.json`, all figures (`reward_model_metrics.report`); and
`reliability.png` and, for answers in several styles, `styles.png`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from jaxrl import compose
from jaxrl import config as configs
from jaxrl import data
from jaxrl.batch import Task
from jaxrl.compose import nearest
from jaxrl.evaluation import reward_model_metrics as metrics
from jaxrl.evaluation import reward_model_report
from jaxrl.evaluation.reward_model_questions import is_benchmark, Question, read_benchmark, read_own
from jaxrl.evaluation.reward_model_questions import Reading, without_pairing
from jaxrl.rewards.trained import check_heads
from jaxrl.training import compilation
from jaxrl.training import inputs
from jaxrl.training import jsonl
from jaxrl.training import pieces
from jaxrl.training import reward_models
from jaxrl.training.shapes import PAIRED
from jaxrl.training.terminal import Terminal

ANSWERS = 512  # scored between two lines of `scores.jsonl` that are on disk
SWAPPED = 256  # questions whose answers are scored again in the opposite order


def evaluate(run: str | pathlib.Path, out: pathlib.Path, *, path: str = "", split: str = "test",
             reading: Reading = Reading(), head: int | str = 0, levels: int = 0, ordered: bool = False,
             quiet: bool = False) -> dict[str, Any]:
  """Scores the answers of a file, or of a split of the run's own data, and writes what comes out.

  Args:
    run: --workdir of the run that trained the model; its newest checkpoint counts.
    out: directory for the files above; made if need be.
    path: data, as in `config.data.train`; "" for `config.data.<split>` of the run.
    split: of the run, if there is no path. Transforms of the run are applied to a path too, unless its
      rows are of a benchmark.
    reading: how to read rows.
    head, levels, ordered: as of the criterion `reward_model`.
    quiet: plain lines, no progress bar.

  Returns:
    The content of `report.json`.

  Raises:
    BadRow: a row that cannot be read, with file, line and field.
    ValueError: whatever else is wrong with the run, the data or the options.
    CheckpointError: the checkpoint is damaged.
  """
  if split not in inputs.SPLITS:
    raise ValueError(f"split={split!r}{nearest(split, inputs.SPLITS)}")
  check_heads(run=str(run), head=head, levels=levels, ordered=ordered)
  place = pathlib.Path(run).absolute()
  terminal = Terminal(quiet=quiet)
  config = configs.of_run(place)
  compilation.use_cache(config.compilation_cache, terminal.note)
  questions, builder = _questions(config, place, path, split, reading)
  terminal.note(f"{len(questions)} questions with {sum(len(q.answers) for q in questions)} answers, from "
                f"{questions[0].where} on")
  model, number = reward_models.RewardModel.load(place), reward_models.index_of(place, head)

  def score(asked):
    found = model.scores([(Task(f"{q.where}, answer {i}", [0], row=q.row), q.answers[i], True)
                          for q, i in asked])
    return [x if isinstance(x, Exception) else reward_models.rating(x, number, levels, ordered)
            for x in found]
  subject = dict(run=str(place), checkpoint=reward_models.newest(place),
                 head=head, levels=levels, ordered=ordered)
  rows = _score_all(questions, score, model.tokenizer, out / "scores.jsonl",
                    {**subject, "data": _digest(questions)}, terminal)
  found = {**subject, "data": path or config.data[split], "split": split,
           **_figures(questions, rows, score, config.data.max_completion_tokens),
           "refused_rows": {k: n for k, n in builder.counts.as_dict().items() if k != "ok"}}
  jsonl.write_json(out / "report.json", found)
  reward_model_report.show(found, quiet=quiet)
  for picture in reward_model_report.draw(found, out):
    terminal.note(f"picture: {picture}")
  terminal.note(f"figures: {out / 'report.json'}")
  return found


def _figures(questions, rows, score, limit):
  """What the scores say, and what was not scored as it is."""
  kept = [(q, row) for q, row in zip(questions, rows) if "reason" not in row]
  reasons = [f"{q.where}: {row['reason']}" for q, row in zip(questions, rows) if "reason" in row]
  if not kept:
    raise ValueError(f"the model can read none of {len(questions)} questions; {reasons[0]}")
  scored = [metrics.Scored(np.array(row["scores"]), np.array(q.grades), np.array(row["lengths"]),
                           q.subset, np.array(q.styles) if q.styles else None) for q, row in kept]
  lengths = np.concatenate([q.lengths for q in scored]) + 1  # with EOS
  return {**metrics.report(scored), "swap": _swap([q for q, _ in kept], scored, score),
          "cut_answers": float(np.mean(lengths > limit)) if limit else 0.0,
          "left_out": len(reasons), "left_out_first": reasons[:1]}


def _questions(config, place, path, split, reading) -> tuple[list[Question], data.TaskBuilder]:
  """The questions, and what has counted the rows that were refused."""
  config, listed = without_pairing(config)
  builder = inputs.builder(config, data.load_tokenizer(place / "tokenizer"))
  pairs = None
  if listed is None and any(config[name].kind in PAIRED for name in config.phases):
    pairs = inputs.pair_builder(config, builder)
  if path and not path.startswith("task:") and is_benchmark(source := data.open_source(path), reading):
    return read_benchmark(source, reading, builder.fields), builder
  config.data[split] = path or config.data[split]
  if not config.data[split]:
    raise ValueError(f"the run has no config.data.{split}: name another --split, or --data=FILE")
  terms = [term for name in config.phases if config[name].kind in PAIRED
           for term in pieces.terms_of(configs.phase_config(config, name))]
  return read_own(inputs.open_split(config, split), reading, builder, pairs, listed,
                  compose.order_of(terms)), builder


def _digest(questions):
  """What tells the data of one evaluation from those of another."""
  text = json.dumps([[q.where.rpartition("/")[2], q.row, q.answers] for q in questions], sort_keys=True,
                    default=str)
  return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _score_all(questions: Sequence[Question],
               score: Callable[[list[tuple[Question, int]]], list[float | Exception]],
               tokenizer: data.Tokenizer, path: pathlib.Path, identity: dict[str, Any],
               terminal: Terminal) -> list[dict[str, Any]]:
  """The rows of `path` in the order of the questions, after scoring what is not there yet.

  A row has the `question`, counted from 0, and its `scores` and `lengths` in tokens, or the `reason`
  why the model cannot read it.

  Raises:
    ValueError: the file is of another evaluation.
  """
  jsonl.cut_torn_line(path)
  written = jsonl.read(path)
  if written and written[0] != {"evaluation": identity}:
    raise ValueError(f"{path} is of another evaluation, {written[0].get('evaluation')}, not of {identity}: "
                     "pass another --out, or delete it")
  done = {row["question"] for row in written[1:]}
  file, terms = jsonl.JsonLines(path), {i: _lengths(q, tokenizer) for i, q in enumerate(questions)}
  # Sequences of similar length are computed together.
  left = sorted((i for i in terms if i not in done), key=lambda i: max(terms[i][0], default=0))
  if not written:
    file.append({"evaluation": identity})
  terminal.start_phase("scores", "evaluate", len(questions), len(done))
  try:
    while left:
      some, size = [], 0
      while left and size < ANSWERS:
        some.append(left.pop())
        size += len(questions[some[-1]].answers)
      asked = [(questions[i], a) for i in some for a in range(len(questions[i].answers))]
      answers = iter(score(asked))
      for i in some:
        found = [next(answers) for _ in questions[i].answers]
        reason = terms[i][1] or next((str(x) for x in found if isinstance(x, Exception)), "")
        file.append({"question": i, **({"reason": reason} if reason else {
            "scores": found, "lengths": terms[i][0]})})
      terminal.advance(len(questions) - len(left), {})
  finally:
    terminal.end_phase()
    file.close()
  rows = {row["question"]: row for row in jsonl.read(path)[1:]}
  return [rows[i] for i in range(len(questions))]


def _lengths(question, tokenizer):
  """Tokens of every answer, or what is wrong with them."""
  try:
    return [len(tokenizer.encode(text)) for text in question.answers], ""
  except ValueError as error:
    return [], str(error)


def _swap(questions, scored, score):
  """`swap_consistency` on some questions that have pairs, whose answers are asked in reverse."""
  some = [i for i, s in enumerate(scored) if len(set(s.grades.tolist())) > 1][:SWAPPED]
  asked = [(questions[i], a) for i in reversed(some) for a in reversed(range(len(scored[i].scores)))]
  again = iter(score(asked)[::-1])
  swapped = [dataclasses.replace(scored[i], scores=np.array([next(again) for _ in scored[i].scores]))
             for i in some]
  return metrics.swap_consistency(metrics.pairs_of([scored[i] for i in some]).margins,
                                  metrics.pairs_of(swapped).margins)
