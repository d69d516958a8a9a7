"""The comparison as JSON, as a Markdown table and as a picture."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

LABELS = {"jaxrl": "jaxrl", "tunix": "Tunix", "trl": "TRL"}
COLOURS = {"jaxrl": "#2b6cb0", "tunix": "#dd8452", "trl": "#55a868"}
DISTURBED = "disturbed"


def write(content: Mapping[str, Any], stem: pathlib.Path, *, quote_disturbed: bool = False) -> str:
  """Writes `stem.json` and `stem.md`.

  Args:
    content: `machine`, `date`, `limits`, `versions` and `rows`, see `compare.main`.
    stem: path without a suffix.
    quote_disturbed: show the figures of disturbed rows too. Otherwise these are neither in the
      table nor in the JSON.

  Returns:
    The table.
  """
  rows = [row if quote_disturbed or not row["disturbed"] else _withheld(row)
          for row in content["rows"]]
  text = table({**content, "rows": rows})
  stem.parent.mkdir(parents=True, exist_ok=True)
  stem.with_name(stem.name + ".json").write_text(
      json.dumps(_rounded({**content, "quoted_disturbed": quote_disturbed, "rows": rows}), indent=1)
      + "\n")
  stem.with_name(stem.name + ".md").write_text(text)
  return text


def table(content: Mapping[str, Any]) -> str:
  """The rows in Markdown, under a line about where they were measured."""
  systems = list(content["versions"])
  peers = [system for system in systems if system != "jaxrl"]
  header = ["row", *(f"{LABELS[s]}, s" for s in systems), "ratio", "limit, s", "times the limit",
            *(f"{LABELS[s]}, MB" for s in systems)]
  lines = [header, ["---"] * len(header)]
  for row in content["rows"]:
    times = {"jaxrl": row["jaxrl_s"], **row["peers"]}
    name = row["row"] + (f" ({DISTURBED})" if row["disturbed"] else "")
    lines.append([name, *(_number(times.get(s), 3) for s in systems), _number(row["ratio"], 2),
                  _number(row["limit_s"], 3), _number(row["times_limit"], 1),
                  *(_number(row["peak_rss_mb"].get(s), 0) for s in systems)])
  body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
  limits, versions = content["limits"], content["versions"]
  package = {"jaxrl": "jaxrl", "tunix": "google-tunix", "trl": "trl"}
  names = ", ".join(f"{LABELS[s]} {versions[s][package[s]]}" for s in ["jaxrl", *peers])
  return (f"{content['machine']}, {content['date']}; {names}. Matrix products: "
          f"{max(limits['gflops'].values()):.0f} GFLOP/s. `ratio`: the faster peer's time over "
          f"jaxrl's. MB: largest resident memory.\n\n{body}\n")


def draw(content: Mapping[str, Any], path: pathlib.Path, *, quote_disturbed: bool = False) -> None:
  """Draws times relative to jaxrl's, and memory, of all rows that may be quoted."""
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot
  rows = [row for row in content["rows"] if quote_disturbed or not row["disturbed"]]
  if not rows:
    return
  systems = list(content["versions"])
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.8 + 0.6 * len(rows)), sharey=True)
  height = 0.8 / len(systems)
  for i, system in enumerate(systems):
    at = [j + (i - (len(systems) - 1) / 2) * height for j in range(len(rows))]
    times = [{"jaxrl": row["jaxrl_s"], **row["peers"]}.get(system) for row in rows]
    memory = [row["peak_rss_mb"].get(system, 0.0) for row in rows]
    relative = [t / row["jaxrl_s"] if t else 0.0 for t, row in zip(times, rows)]
    left.barh(at, relative, height, color=COLOURS[system], label=LABELS[system])
    right.barh(at, memory, height, color=COLOURS[system])
    for y, x, t in zip(at, relative, times):
      if t:
        left.text(x, y, f" {_number(t, 3)} s", va="center", fontsize=7)
    for y, mb in zip(at, memory):
      right.text(mb, y, f" {mb:.0f}" if mb else "", va="center", fontsize=7)
  limits = [(j, row["limit_s"] / row["jaxrl_s"]) for j, row in enumerate(rows) if row["limit_s"]]
  for n, (j, x) in enumerate(limits):
    left.plot([x, x], [j - 0.42, j + 0.42], color="black", linewidth=1.5,
              label=None if n else "the machine's limit")
  left.set_yticks(range(len(rows)), [row["row"] for row in rows])
  left.invert_yaxis()
  left.set_xlabel("time, as a multiple of jaxrl's")
  right.set_xlabel("largest resident memory, MB")
  for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
  figure.legend(fontsize=8, loc="lower center", ncols=len(systems) + 1, frameon=False)
  figure.suptitle(content["machine"], fontsize=9)
  figure.tight_layout(rect=(0, 0.25 / figure.get_figheight(), 1, 1))  # room for the legend
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=130)
  pyplot.close(figure)


def _withheld(row):
  """A row without its figures."""
  return {**row, "jaxrl_s": None, "peers": {}, "ratio": None, "times_limit": None,
          "peak_rss_mb": {}}


def _number(value, digits):
  """Decimals for a table: `digits`, fewer for large numbers, and nothing where there is none."""
  if value is None:
    return ""
  return f"{value:.{min(digits, 2) if value >= 10 else digits}f}"


def _rounded(value):
  """Four significant digits, which is more than timings have."""
  if isinstance(value, dict):
    return {key: _rounded(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_rounded(item) for item in value]
  return float(f"{value:.4g}") if isinstance(value, float) else value
