"""What `jaxrl methods` shows."""

import inspect
import pathlib

from jaxrl.evidence import methods


def all_of_them(results: pathlib.Path) -> str:
  """A table of all methods: name, what runs came to, config, parts, title."""
  rows = [("method", "verdict", "config", "pieces", "what it is")]
  for slug in methods.slugs():
    found = methods.result_of(slug, results)
    verdict = found["verdict"] if found else (
        "not measured" if methods.evidence_of(slug) else "by tests only")
    rows.append((slug, verdict, f"configs/methods/{methods.path_of(slug).name}",
                 ", ".join(methods.parts_of(slug)) or "-", methods.title(slug)))
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[4]])
           for row in rows]
  return "\n".join([lines[0], "-" * min(100, len(lines[0])), *lines[1:]])


def one(slug: str, results: pathlib.Path) -> str:
  """A method's docstring, what its config changes in its parent's, and its claims."""
  lines = [inspect.getdoc(methods.module_of(slug)) or slug, "",
           f"configs/methods/{methods.path_of(slug).name} changes in {methods.parent_of(slug)}:"]
  lines += [f"  {line}" for line in methods.differences(slug)] or ["  nothing"]
  found = methods.result_of(slug, results)
  for claim in found["claims"] if found else ():
    lines += ["", f"{claim['text']}: {claim['verdict']}",
              f"  {claim['metric']}: {claim['baseline']['mean']:.4g} -> {claim['method']['mean']:.4g}"
              f" over seeds {found['seeds']}"]
  return "\n".join(lines)
