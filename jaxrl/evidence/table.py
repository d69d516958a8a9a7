"""`RESULTS.md`: one row for each method whose claims were measured."""

import pathlib

from jaxrl.evidence import methods
from jaxrl.evidence import verdict

HEAD = """# What the claims came to

Every row was measured with `jaxrl reproduce --method=METHOD`: small models on toy tasks, from one
warm start for all arms, at the budget in `{folder}METHOD.json`. {rule}

A small model need not show what a large one does: *no difference* and *contradicted* are about these
runs, not about the paper's. Figures are mean ± half of the 95% interval over seeds;
minutes are those of all runs behind a row, the warm start left out.

| method | the paper reports | its verdict | claim | baseline | method | verdict | seeds | minutes |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def write(results: pathlib.Path) -> pathlib.Path:
  """Draws the table of all results in a folder: beside it if it is called `results`, as that of the
  repository, else inside it, so that results of one's own replace no other table."""
  beside = results.absolute().name == "results"
  folder, rows = "results/" if beside else "", []
  for path in sorted(results.glob("*.json")):
    content = methods.result_of(path.stem, results)
    for number, claim in enumerate(content["claims"]):
      first = number == 0
      text = claim["text"]
      if claim["joint"] or text.startswith("and "):  # only the former are judged with the first
        text = f"{'*and*' if claim['joint'] else 'also'} {text.removeprefix('and ')}"
      rows.append("| " + " | ".join([
          f"[{content['slug']}]({folder}{content['slug']}.png)" if first else "",
          content["reported"] if first else "",
          f"**{content['verdict']}**" if first else "",
          f"{text} (`{claim['metric']}`, {claim['expect']} than {claim['baseline_name']}"
          + (f", margin {claim['margin']:g}" if claim["margin"] else "") + ")",
          figure(claim["baseline"]), figure(claim["method"]), claim["verdict"],
          str(len(content["seeds"])) if first else "",
          f"{content['minutes']:.1f}" if first else ""]) + " |")
  path = (results.absolute().parent if beside else results) / "RESULTS.md"
  path.write_text(HEAD.format(rule=verdict.RULE, folder=folder) + "\n".join(rows) + "\n")
  return path


def figure(arm: dict) -> str:
  """`0.812 ± 0.034`"""
  half = arm["interval"]
  return f"{arm['mean']:.3g}" + ("" if half is None else f" ± {half:.2g}")
