"""What `jaxrl arena` leaves behind: `ranking.json`, `ranking.md` and `ranking.png`."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from jaxrl import data
from jaxrl.data import votes
from jaxrl.evaluation import arena


def report(path: str, out: pathlib.Path, *, length: bool = False, ridge: float = 0.0,
           resamples: int = 100, seed: int = 0) -> str:
  """Ranks the models of a file of votes and writes what comes out -> the table.

  Args:
    path: votes, see `jaxrl.data.votes`.
    out: directory for the three files; made if need be.
    length: rank at equal lengths of answers (`votes.length_difference` as a covariate).
    ridge, resamples, seed: as in `arena.ranking`.

  Raises:
    ValueError: no such file, or votes that no ranking fits.
    BadRow: a row that is no vote.
  """
  if resamples < 1:
    raise ValueError(f"--resamples={resamples} has to be at least 1")
  found = list(votes.read(data.open_source(path)))
  if length and not all(any(vote.answers) for vote in found):
    raise ValueError(f"--length needs the fields answer_a and answer_b in every row of {path}")
  covariates = {"length": [votes.length_difference(vote) for vote in found]} if length else {}
  matches = arena.Matches.of([(*vote.models, vote.points) for vote in found], covariates)
  content = arena.ranking(matches, ridge=ridge, resamples=resamples, seed=seed)
  text = table(content)
  out.mkdir(parents=True, exist_ok=True)
  (out / "ranking.json").write_text(json.dumps(content, indent=1) + "\n")
  (out / "ranking.md").write_text(text)
  draw(content, out / "ranking.png")
  return text


def table(content: Mapping[str, Any]) -> str:
  """A ranking in Markdown."""
  lines = [["rank", "model", "score", "95%", "rank, 95%", "Elo", "matches", "won", "drawn", "lost"]]
  lines.append(["---"] * len(lines[0]))
  for m in content["models"]:
    lines.append([str(m["rank"]), m["model"], f"{m['score']:.0f}",
                  "{:.0f} to {:.0f}".format(*m["interval"]), "{:.0f} to {:.0f}".format(*m["rank_interval"]),
                  f"{m['elo']:.0f}", *(str(m[name]) for name in ("matches", "wins", "draws", "losses"))])
  body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
  cues = "".join(f"\n{name}: {c['coefficient']:+.2f} logits per unit (95%: {c['interval'][0]:+.2f} to "
                 f"{c['interval'][1]:+.2f})\n" for name, c in content["covariates"].items())
  return f"{body}\n{cues}"


def draw(content: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws scores with their intervals, the best on top."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  models = content["models"]
  figure = Figure(figsize=(6.4, 1.0 + 0.28 * len(models)), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  for y, m in enumerate(models):
    axes.plot(m["interval"], [y, y], color="#9aa3af", linewidth=3, solid_capstyle="round")
  axes.plot([m["score"] for m in models], range(len(models)), "o", color="#3366cc")
  axes.set_yticks(range(len(models)), [m["model"] for m in models])
  axes.invert_yaxis()
  axes.set_xlabel(f"score: 400 points are odds of 10 to 1 ({content['matches']} votes, 95% intervals of "
                  f"{content['resamples']} resamples)", fontsize=8)
  axes.grid(axis="x", color="#e5e7eb")
  axes.spines[["top", "right", "left"]].set_visible(False)
  figure.savefig(path, dpi=130)
