"""The picture of a run: `curves.png`, drawn from the rows of `metrics.jsonl`."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import matplotlib.ticker
import numpy as np

from jaxrl.training.jsonl import number

COLOURS = ("#3366cc", "#dc7a1f", "#2a9d5c", "#b8356b", "#7a52c7", "#6b7280")
SHADES = ("#eef2fb", "#fdf3e7", "#ebf6ef", "#faecf2", "#f2eefb", "#f0f1f3")
INK, FAINT = "#1f2937", "#9aa3af"


@dataclasses.dataclass(frozen=True)
class Panel:
  """One set of axes: `left` series against the step, `right` ones on a scale of their own."""

  title: str
  left: tuple[str, ...]
  right: tuple[str, ...] = ()
  marked: bool = False  # rare points with markers, not smoothed


PANELS = (
    Panel("loss", ("loss",)),
    Panel("reward", ("reward",)),
    Panel("held-out accuracy", ("greedy_accuracy", "sampled_accuracy", "pass_at_*",
                                "validation/greedy_accuracy"), marked=True),
    Panel("entropy and KL", ("entropy",), ("kl",)),
    Panel("response length (tokens)", ("response_tokens",)),
    Panel("tokens per second", ("tokens_per_second",)),
)


def draw(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None,
         path: str | pathlib.Path) -> None:
  """Draws one panel for each group of metrics that has any data, and writes it as a PNG.

  Phases are shaded and named; where a line is smoothed, the values behind it stay visible. Rows
  without a key, NaN and infinities leave gaps.

  Args:
    metrics: rows with `step`, `phase` and any of the keys of `PANELS`, in order of time.
    summary: the content of `summary.json`, for the title; None while the run is going on.
    path: the PNG; replaced atomically.
  """
  rows = [row for row in metrics if np.isfinite(number(row.get("step")))]
  spans = phase_spans(rows)
  panels = [panel for panel in PANELS if any(_series(rows, key) for key in _keys(rows, panel))]
  columns = min(3, max(1, len(panels)))
  lines = max(1, -(-len(panels) // columns))
  figure = Figure(figsize=(1.2 + 3.9 * columns, 0.8 + 2.9 * lines), layout="constrained",
                  facecolor="white")
  FigureCanvasAgg(figure)
  if not panels:
    figure.text(0.5, 0.5, "no metrics yet", ha="center", va="center", color=FAINT)
  for index, panel in enumerate(panels):
    axes = figure.add_subplot(lines, columns, index + 1)
    _decorate(axes, panel.title, spans)
    _plot_panel(axes, rows, panel, spans)
  figure.suptitle(_title(rows, summary), fontsize=10, color=INK)
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + ".tmp")
  figure.savefig(temporary, format="png", dpi=120)
  os.replace(temporary, path)


def phase_spans(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
  """Consecutive phases as (name, first step, last step); each begins where the one before ended.

  Rows of evaluations, which belong to a moment and not to a phase, do not count.
  """
  spans = []
  for row in rows:
    if "evaluation" in row:
      continue
    name, step = str(row.get("phase", "")), number(row["step"])
    if spans and spans[-1][0] == name:
      spans[-1] = (name, spans[-1][1], max(spans[-1][2], step))
    else:
      start = spans[-1][2] if spans else min(step, 0.0) if step <= 1 else step
      spans.append((name, start, step))
  return spans


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Centred mean over `window` values, fewer at the ends; NaN where a value is NaN."""
  if window <= 1 or len(values) < 3:
    return values
  finite = np.isfinite(values)
  kernel = np.ones(window)
  def rolling(x):
    return np.convolve(x, kernel)[(window - 1) // 2:][:len(x)]
  total, count = rolling(np.where(finite, values, 0.0)), rolling(finite.astype(float))
  return np.where(finite, total / np.maximum(count, 1), np.nan)


def _plot_panel(axes, rows, panel: Panel, spans) -> None:
  colours = iter(COLOURS * 9)
  for key in _keys(rows, panel):
    target = axes
    if key in panel.right:
      target = axes.twinx()
      target.spines[["top", "left", "bottom"]].set_visible(False)
      target.spines["right"].set_color(FAINT)
      target.tick_params(labelsize=8, colors=FAINT)
    colour = next(colours)
    label = key.replace("_", " ").replace("pass at ", "pass@").replace("/", ": ")
    if panel.marked:
      steps, values = zip(*_series(rows, key))
      inside = max(values) <= 1 and min(values) >= 0  # a marker on the border is shown whole
      target.plot(steps, values, "o-", color=colour, markersize=4.5, linewidth=1.4, label=label,
                  clip_on=not inside, zorder=3)
    else:
      _plot_smoothed(target, rows, key, spans, colour, label)
    if target is not axes:
      target.set_ylabel(label, color=colour, fontsize=8)
  if panel.marked:
    axes.set_ylim(-0.03, 1.09)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes.legend(fontsize=7, frameon=False, loc="best")
  elif panel.right and len(_keys(rows, panel)) > 1:
    axes.set_ylabel(panel.left[0], color=COLOURS[0], fontsize=8)


def _plot_smoothed(axes, rows, key: str, spans, colour: str, label: str) -> None:
  """One line per phase, so that it neither joins nor averages over the border of two phases."""
  for name, start, end in spans:
    points = _series([row for row in rows if str(row.get("phase", "")) == name
                      and start <= number(row["step"]) <= end], key, keep_gaps=True)
    if not points:
      continue
    steps, values = (np.array(column) for column in zip(*points))
    window = len(values) // 30 * 2 + 1  # odd, so that the mean is centred
    if window > 1:
      axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
    few = np.isfinite(values).sum() < 3
    axes.plot(steps, smooth(values, window), color=colour, linewidth=1.6, label=label,
              marker="o" if few else None, markersize=4)


def _decorate(axes, title: str, spans) -> None:
  axes.set_title(title, fontsize=9.5, loc="left", color=INK, fontweight="bold")
  axes.tick_params(labelsize=8, colors=INK, length=3)
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color(FAINT)
  axes.grid(axis="y", color="#ffffff", linewidth=1.0)
  axes.set_axisbelow(True)
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
  axes.yaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep="")
                                 if "second" in title else matplotlib.ticker.ScalarFormatter())
  axes.set_xlabel("step", fontsize=8, color=INK)
  width = max((end for _, _, end in spans), default=0) - min((s for _, s, _ in spans), default=0)
  names = list(dict.fromkeys(name for name, _, _ in spans))
  for name, start, end in spans:
    if end <= start:
      continue
    axes.axvspan(start, end, color=SHADES[names.index(name) % len(SHADES)], linewidth=0, zorder=0)
    if end - start > 0.08 * width:
      axes.annotate(name, ((start + end) / 2, 0.985), xycoords=("data", "axes fraction"),
                    ha="center", va="top", fontsize=7.5, color=FAINT, annotation_clip=True)
  if width > 0:
    axes.set_xlim(min(s for _, s, _ in spans) - 0.004 * width,
                  max(e for _, _, e in spans) + 0.004 * width)


def _keys(rows, panel: Panel) -> list[str]:
  """The panel's keys that occur in the rows, `pass_at_*` written out in order of k."""
  present = {key for row in rows for key in row if _finite(row[key])}
  keys = []
  for key in panel.left + panel.right:
    if key.endswith("*"):
      matching = [name for name in present if name.startswith(key[:-1])]
      keys += sorted(matching, key=lambda name: (len(name), name))
    elif key in present:
      keys.append(key)
  return keys


def _series(rows, key: str, keep_gaps: bool = False) -> list[tuple[float, float]]:
  """(step, value) of the rows that have the key; values that are not finite are NaN or left out."""
  points = [(number(row["step"]), number(row[key]) if _finite(row[key]) else np.nan)
            for row in rows if key in row]
  return points if keep_gaps else [point for point in points if np.isfinite(point[1])]


def _finite(value: Any) -> bool:
  return np.isfinite(number(value))


def _title(rows, summary: Mapping[str, Any] | None) -> str:
  if not summary:
    return f"step {rows[-1]['step']}, running" if rows else ""
  parts = []
  for phase in summary.get("phases", ()):
    before, after = (number((phase.get(when) or {}).get("greedy_accuracy"))
                     for when in ("before", "after"))
    if np.isfinite(before) and np.isfinite(after):
      parts.append(f"{phase.get('name')}: greedy accuracy {before:.1%} → {after:.1%}")
  return "     ".join(parts)
