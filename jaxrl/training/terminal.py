"""What a run says while it runs: a progress bar on a terminal, plain lines in a log."""

from collections.abc import Callable, Mapping, Sequence
import math
import sys
import time
from typing import Any, TextIO
import unicodedata

import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text

from jaxrl.training.jsonl import number

SHOWN = ("loss", "reward", "accuracy", "kl", "entropy", "tokens_per_second")  # in this order
LOG_SECONDS = 10.0  # between the lines of a log
LOG_SHARE = 0.1  # of a phase's steps, whichever comes first
LOG_WIDTH = 100
BAR_WIDTH = 12
CLOCKS_WIDTH = 28  # of elapsed time, ETA and the gaps between the columns of the bar


class Terminal:
  """A progress bar, tables and notes on a terminal; without one, or if quiet, plain lines.

  Plain lines hold no control characters, no colours and nothing that the stream cannot encode.

  Args:
    quiet: plain lines even on a terminal, and no samples.
    stream: where to write; standard output by default.
    clock: seconds, monotonic.
  """

  def __init__(self, *, quiet: bool = False, stream: TextIO | None = None,
               clock: Callable[[], float] = time.monotonic):
    self._stream = stream or sys.stdout
    self._quiet = quiet
    self._clock = clock
    self._console = rich.console.Console(file=self._stream, highlight=False)
    self.live = not quiet and self._console.is_terminal
    if not self.live:
      self._console = rich.console.Console(file=self._stream, highlight=False, width=LOG_WIDTH,
                                           force_terminal=False, color_system=None)
    self._arrow = "→" if self.live and self._console.encoding.startswith("utf") else "->"
    self._progress: rich.progress.Progress | None = None
    self._started = self._phase_started = self._last_line = clock()
    self._phase = ""
    self._total = self._done = self._first = self._last_logged = 0

  def start_phase(self, name: str, kind: str, total_steps: int, done: int = 0) -> None:
    """Begins a phase; `done` of its steps were made before the run was resumed."""
    self._finish_bar()
    self._phase, self._total, self._done, self._first = name, total_steps, done, done
    self._phase_started = self._last_line = self._clock()
    self._last_logged = done
    self.note(f"phase {name} ({kind}): {total_steps} steps"
              + (f", continuing after {done}" if done else ""))
    if self.live and total_steps:
      self._progress = _progress_bar(self._console)
      self._bar = self._progress.add_task(self._safe(name), total=total_steps, completed=done,
                                          shown="")
      self._progress.start()

  def advance(self, done: int, metrics: Mapping[str, Any]) -> None:
    """Shows that `done` steps of the phase are made, and the key metrics of the last one."""
    self._done = done
    if self._progress:
      room = (self._console.width - BAR_WIDTH - CLOCKS_WIDTH - len(self._safe(self._phase))
              - 2 * len(str(self._total)))
      self._progress.update(self._bar, completed=done, shown=key_metrics(metrics, room))
    elif not self.live and self._log_is_due():
      self._last_line, self._last_logged = self._clock(), done
      share = f" {100 * done // self._total}%" if self._total else ""
      self._line(f"{self._time()} {self._phase} {done}/{self._total}{share}  "
                 f"{key_metrics(metrics)}  eta {self._eta()}")

  def end_phase(self) -> None:
    """Ends the bar of a phase."""
    self._finish_bar()

  def note(self, message: str) -> None:
    """One line (or a few) of plain text, above the bar if there is one."""
    if self.live:
      self._console.print(rich.text.Text(self._safe(message, keep="\n"), style="bold"))
    else:
      for line in message.splitlines():
        self._line(f"{self._time()} {line}")

  def show_samples(self, title: str, rows: Sequence[Mapping[str, Any]], limit: int = 4) -> None:
    """A table of sampled completions: `prompt`, `completion` and the numbers of each row.

    Args:
      title: above the table.
      rows: `prompt`, `completion` and optionally `reward` and `advantage`; the rest is not shown.
      limit: how many rows at most, and how long texts may be: they are cut in the middle.
    """
    if self._quiet or not rows:
      return
    numbers = [key for key in ("reward", "advantage") if any(key in row for row in rows)]
    table = self._table(title, show_lines=self.live)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("completion", ratio=3, overflow="fold")
    for key in numbers:
      table.add_column(key, justify="right", no_wrap=True)
    for row in rows[:limit]:
      table.add_row(*(rich.text.Text(shorten(self._safe(str(row.get(key, ""))), 240))
                      for key in ("prompt", "completion")),
                    *(_figure(row.get(key)) for key in numbers))
    self._console.print(table)

  def show_result(self, phases: Sequence[Mapping[str, Any]], paths: Mapping[str, Any]) -> None:
    """The table at the end: accuracies before and after each phase, its time, and where things are.

    Args:
      phases: as in `summary.json`: `name`, `kind`, `seconds`, `before` and `after`.
      paths: what -> where.
    """
    self._finish_bar()
    keys = list(dict.fromkeys(key for phase in phases for when in ("before", "after")
                              for key, value in (phase.get(when) or {}).items()
                              if _is_share(key) and math.isfinite(number(value))))
    table = self._table(f"before {self._arrow} after")
    table.add_column("phase")
    table.add_column("time", justify="right")
    for key in keys:
      table.add_column(rich.text.Text(self._safe(_label(key))), justify="right")
    for phase in phases:
      before, after = phase.get("before") or {}, phase.get("after") or {}
      table.add_row(rich.text.Text(self._safe(str(phase.get("name", "")))),
                    _clock_time(number(phase.get("seconds"))),
                    *(self._change(before.get(key), after.get(key)) for key in keys))
    self._console.print(table)
    for what, where in paths.items():
      self._line(f"{what + ':':<10} {where}")

  def close(self) -> None:
    """Ends the bar, whatever state the run is in, so that the terminal is left as it was found."""
    self._finish_bar()

  def _log_is_due(self) -> bool:
    if self._done >= self._total or self._done == self._first + 1:
      return True
    return (self._clock() - self._last_line >= LOG_SECONDS
            or self._done - self._last_logged >= max(1, LOG_SHARE * self._total))

  def _time(self) -> str:
    return f"[{_clock_time(self._clock() - self._started)}]"

  def _eta(self) -> str:
    made = self._done - self._first
    if made <= 0 or self._done > self._total:
      return "-"
    return _clock_time((self._clock() - self._phase_started) / made * (self._total - self._done))

  def _finish_bar(self) -> None:
    if self._progress:
      self._progress.stop()
      self._progress = None

  def _table(self, title: str, **style) -> rich.table.Table:
    box = rich.box.ROUNDED if self.live else rich.box.ASCII
    return rich.table.Table(title=rich.text.Text(self._safe(title)), title_justify="left", box=box,
                            expand=False, **style)

  def _change(self, before: Any, after: Any) -> str:
    return f"{_figure(before, percent=True)} {self._arrow} {_figure(after, percent=True)}"

  def _line(self, text: str) -> None:
    """One line as it is: never wrapped, so that paths can be copied and logs be searched."""
    self._console.print(rich.text.Text(self._safe(text)), soft_wrap=True)

  def _safe(self, text: str, keep: str = "") -> str:
    return visible(text, self._console.encoding, keep)


def visible(text: str, encoding: str = "utf-8", keep: str = "") -> str:
  r"""`text` with all that could drive a terminal, or that it cannot show, written as escapes.

  Control, formatting (also of text direction) and unassigned characters and lone surrogates become
  `\n`, `\x1b`, `\u202e`, ...; so do characters that `encoding` does not have.
  """
  shown = "".join(char if char in keep or unicodedata.category(char)[0] != "C"
                  else char.encode("unicode_escape").decode("ascii") for char in text)
  return shown.encode(encoding, "backslashreplace").decode(encoding)


def shorten(text: str, width: int) -> str:
  """`text` with its middle left out if it is longer than `width`: beginnings and ends tell most."""
  if len(text) <= width:
    return text
  half = (width - 5) // 2
  return f"{text[:half]} ... {text[len(text) - half:]}"


def key_metrics(metrics: Mapping[str, Any], room: float = math.inf) -> str:
  """The first key metrics that fit `room` characters, as in `loss 0.0123  reward 0.45`."""
  shown = [f"{'tokens/s' if key == 'tokens_per_second' else key} {_figure(metrics[key])}"
           for key in SHOWN if key in metrics]
  while shown and len("  ".join(shown)) > room:
    shown.pop()
  return "  ".join(shown)


def _progress_bar(console: rich.console.Console) -> rich.progress.Progress:
  columns = (rich.progress.TextColumn("{task.description}", markup=False, style="bold"),
             rich.progress.BarColumn(bar_width=BAR_WIDTH), rich.progress.MofNCompleteColumn(),
             rich.progress.TimeElapsedColumn(), rich.progress.TextColumn("eta"),
             rich.progress.TimeRemainingColumn(),
             rich.progress.TextColumn("{task.fields[shown]}", markup=False))
  return rich.progress.Progress(*columns, console=console, refresh_per_second=2)


def _figure(value: Any, percent: bool = False) -> str:
  figure = number(value)
  if value is None or isinstance(value, str) and math.isnan(figure) and value != "NaN":
    return "-"
  if percent and math.isfinite(figure):
    return f"{figure:.1%}"
  return f"{figure:.0f}" if abs(figure) >= 1000 and math.isfinite(figure) else f"{figure:.3g}"


def _is_share(key: str) -> bool:
  return key.endswith("accuracy") or key.startswith("pass_at_")


def _label(key: str) -> str:
  return key.replace("pass_at_", "pass@").replace("_", " ")


def _clock_time(seconds: float) -> str:
  if not math.isfinite(seconds):
    return "-"
  minutes, seconds = divmod(int(round(seconds)), 60)
  return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
