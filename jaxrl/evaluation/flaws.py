"""What kinds of errors the answers of a finished run show."""

import json
import pathlib

from jaxrl.tasks import scratchpad_addition


def flaw_rates(workdir: pathlib.Path) -> dict[str, float]:
  """The share of the greedy answers of a run's last evaluation that show each kind of error, by
  `tasks.scratchpad_addition.flaw_of`, as it names them.

  Raises:
    ValueError: the run has evaluated no answers.
  """
  summary = json.loads((workdir / "summary.json").read_text())
  last = workdir / "samples" / f"evaluation_{summary['phases'][-1]['name']}.jsonl"
  if not last.exists():
    raise ValueError(f"{workdir} holds no answers of an evaluation: config.evaluate.problems was 0")
  rows = [json.loads(line) for line in last.read_text().splitlines()]
  found = []
  for row in rows:
    a, b = row["prompt"].removesuffix("=").split("+")
    found.append(scratchpad_addition.flaw_of(dict(a=int(a), b=int(b)), row["completion"]))
  kinds = (*scratchpad_addition.FLAWS, "form")
  return {kind: found.count(kind) / max(len(found), 1) for kind in kinds}
