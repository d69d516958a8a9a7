"""Tables and pictures of `reward_model_metrics.report`."""

from collections.abc import Mapping, Sequence
import pathlib
import sys
from typing import Any, TextIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text

from jaxrl.training.terminal import visible

BLUE, ORANGE, INK, FAINT = "#3366cc", "#dc7a1f", "#1f2937", "#9aa3af"
STYLES = ("concise", "detailed", "Markdown")  # of RM-Bench


def show(found: Mapping[str, Any], *, quiet: bool = False, stream: TextIO | None = None) -> None:
  """Prints the tables; plain characters where there is no terminal, or if quiet."""
  console = rich.console.Console(file=stream or sys.stdout, highlight=False)
  if quiet or not console.is_terminal:
    console = rich.console.Console(file=stream or sys.stdout, highlight=False, width=100,
                                   force_terminal=False, color_system=None)
  for title, header, rows in tables(found):
    table = rich.table.Table(
        title=title, title_justify="left",
        box=rich.box.ROUNDED if console.is_terminal and not quiet else rich.box.ASCII)
    for i, name in enumerate(header):
      table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
      table.add_row(*(rich.text.Text(visible(cell, console.encoding)) for cell in row))
    console.print(table)


def tables(found: Mapping[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
  """Title, header and rows of every table."""
  parts = {"all": found, **(found["subsets"] if set(found["subsets"]) != {""} else {})}
  styles = found.get("styles")
  header = ["subset", "pairs", "accuracy", "95% interval"]
  rows = [[name or "(none)", str(part["pairs"]), share(part["accuracy"]),
           " to ".join(map(share, part["interval"]))] for name, part in parts.items()]
  if styles:
    header += ["easy", "normal", "hard"]
    for row, part in zip(rows, [styles, *(styles["subsets"][name] for name in list(parts)[1:])]):
      row += [share(part[name]) for name in header[-3:]]
  result = [("better answer scored higher (chance 50%)", header, rows)]
  if styles:
    names = STYLES if len(STYLES) == len(styles["matrix"]) else range(len(styles["matrix"]))
    result.append(("accuracy by style: better answer below, worse answer to the right",
                   ["", *map(str, names)], [[str(name), *map(share, row)]
                                            for name, row in zip(names, styles["matrix"])]))
  length, swap, fit = found["length"], found["swap"], found["calibration"]
  result.append(("bias and calibration", ["figure", "value"], [
      ["accuracy where the better answer is longer", share(length["accuracy_longer"])],
      ["accuracy where it is shorter", share(length["accuracy_shorter"])],
      ["accuracy of length alone, in its better direction", share(length["length_only"])],
      ["correlation of score and length within questions", number(length["score_correlation"])],
      ["correlation of grade and length", number(length["grade_correlation"])],
      ["same verdict if answers are swapped", share(swap["consistency"])],
      ["verdicts for the first answer", share(swap["first_preferred"])],
      ["expected calibration error", number(fit["ece"])],
      ["Brier score (chance 0.25)", number(fit["brier"])],
      ["negative log-likelihood (chance 0.693)", number(fit["nll"])],
      ["answers that were cut", share(found["cut_answers"])],
      ["questions that the model could not read", str(found["left_out"])]]))
  if "best_of_n" in found:
    header = ["n", "questions", "model", "chance", "shortest", "longest", "oracle"]
    result.append(("mean grade of the answer that is chosen among n", header, [
        [str(row["n"]), str(row["questions"]), *(number(row[name]) for name in header[2:])]
        for row in found["best_of_n"]]))
  return result


def share(value: float) -> str:
  """A share in per cent, - for NaN."""
  return "-" if np.isnan(value) else f"{value:.1%}"


def number(value: float) -> str:
  """A number with three digits, - for NaN."""
  return "-" if np.isnan(value) else f"{value:.3f}"


def draw(found: Mapping[str, Any], directory: pathlib.Path) -> list[pathlib.Path]:
  """Draws `reliability.png`, and `styles.png` if answers have styles -> where they are."""
  places = [directory / "reliability.png"]
  _reliability(found, places[0])
  if "styles" in found:
    places.append(directory / "styles.png")
    _matrix(found["styles"], places[-1])
  return places


def _reliability(found, path):
  fit = found["calibration"]
  rows = fit["reliability"]
  figure = Figure(figsize=(4.6, 4.8), layout="constrained", facecolor="white")
  FigureCanvasAgg(figure)
  top, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
  top.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=1, linestyle="--")
  top.plot([r["confidence"] for r in rows], [r["accuracy"] for r in rows], "o-", color=BLUE)
  top.set(ylabel="share of pairs that are right", ylim=(0, 1.02), xlim=(0.49, 1.01))
  top.set_title(f"accuracy {share(found['accuracy'])}, calibration error {number(fit['ece'])}, "
                f"Brier {number(fit['brier'])}", fontsize=9, color=INK)
  below.bar([r["confidence"] for r in rows], [r["pairs"] for r in rows], width=0.03, color=ORANGE)
  below.set(xlabel="confidence in the answer scored higher", ylabel="pairs")
  for axes in (top, below):
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
  figure.savefig(path, dpi=130)


def _matrix(styles, path):
  matrix = np.array(styles["matrix"], np.float64)
  names = STYLES if len(STYLES) == len(matrix) else list(map(str, range(len(matrix))))
  figure = Figure(figsize=(4.6, 4.2), layout="constrained", facecolor="white")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  axes.imshow(matrix, vmin=0, vmax=1, cmap="RdYlGn")
  for (i, j), value in np.ndenumerate(matrix):
    axes.text(j, i, share(value), ha="center", va="center", color=INK)
  axes.set_xticks(range(len(names)), names)
  axes.set_yticks(range(len(names)), names)
  axes.set(xlabel="style of the worse answer", ylabel="style of the better answer")
  axes.set_title(", ".join(f"{name} {share(styles[name])}" for name in ("easy", "normal", "hard")),
                 fontsize=9, color=INK)
  figure.savefig(path, dpi=130)
