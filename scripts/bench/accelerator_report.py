"""The JSON and the tables of `accelerator.py`."""

from collections.abc import Sequence
import json
import pathlib
import re

DECODE_GOAL, TRAIN_GOAL = 0.6, 0.45  # at 256 rows; of a 1.5B model on rows of 4096 tokens


def write(result: dict, directory: pathlib.Path) -> None:
  """Adds shares of the limits, then writes accelerator_<device>.json and .md."""
  add_shares(result)
  directory.mkdir(parents=True, exist_ok=True)
  name = re.sub(r"[^a-z0-9]+", "-", result["device"]["kind"].lower()).strip("-")
  (directory / f"accelerator_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
  text = markdown(result)
  (directory / f"accelerator_{name}.md").write_text(text)
  print(text)


def add_shares(result: dict) -> None:
  """Shares of the data sheet's figures (None for an unknown chip) and of the measured ones."""
  limits = result["limits"]

  def share(figure, sheet, measured):
    return {"of_sheet": figure / limits[sheet] if limits[sheet] else None,
            "of_measured": figure / limits[measured]}

  for sections in result["models"].values():
    for row in sections.get("decode", {}).get("rows", []):
      row["roofline"] = share(row["bytes_per_s"], "sheet_bytes_per_s", "copy_bytes_per_s")
    peer = sections.get("torch", {}).get("train", {})
    for row in (sections.get("train", {}), peer):
      if "flops_per_s" in row:
        row["mfu"] = share(row["flops_per_s"], "sheet_flops", "matmul_flops")


def markdown(result: dict) -> str:
  """What was measured, a section for each model."""
  limits, s = result["limits"], result["settings"]
  sheet = (f"the data sheet of {limits['machine']} says {limits['sheet_flops'] / 1e12:.0f} TFLOP/s "
           f"and {limits['sheet_bytes_per_s'] / 1e9:.0f} GB/s" if limits["machine"]
           else "chips.py has no data sheet of it")
  lines = [
      f"# {result['device']['kind']} ({result['device']['platform']})\n",
      "Measured by `scripts/bench/accelerator.py`: bfloat16 products "
      f"{_tera(limits['matmul_flops'])} TFLOP/s, copies "
      f"{limits['copy_bytes_per_s'] / 1e9:.0f} GB/s; {sheet}. Shares are of the data sheet / of the measured limit. "
      f"Random weights; medians of {s['repeats']} calls. jax {result['versions']['jax']}.\n"]
  for name, sections in result["models"].items():
    lines.append(f"## {name}\n")
    for section, found in sections.items():
      lines.append(f"### {section}\n")
      if "error" in found:
        lines.append(f"Failed:\n\n```\n{found['error']}\n```\n")
      else:
        lines.append(TABLES[section](found, sections, s))
  return "\n".join(lines)


def _decode(found, sections, s):
  peers = {row["rows"]: row for row in _peer(sections, "decode") or []}
  rows = []
  for row in found["rows"]:
    peer = peers.get(row["rows"], {}).get("decode_tokens_per_s")
    rows.append([row["rows"], f"{row['decode_tokens_per_s']:.0f}", f"{row['tokens_per_s']:.0f}",
                 _shares(row["roofline"]), f"{peer:.0f}" if peer else "-",
                 f"{row['decode_tokens_per_s'] / peer:.2f}" if peer else "-", _mark(row)])
  return (f"Prompts of {s['prompt']} tokens, {s['samples']} samples each, {s['response']} tokens "
          f"per sample; goal {DECODE_GOAL:.0%} of the roofline at 256 rows.\n\n" + _table(
              ["rows", "decoding tokens/s", "with prefill", "roofline", "torch decoding tokens/s",
               "ratio", ""], rows))


def _train(found, sections, s):
  rows = [["jaxrl", f"{found['tokens_per_s']:.0f}", f"{found['step_s']:.3f}", _shares(found["mfu"]),
           found["peak_device_mb"] and f"{found['peak_device_mb']:.0f}", _mark(found)]]
  peer = _peer(sections, "train")
  if peer and "mfu" in peer:
    rows.append(["torch", f"{peer['tokens_per_s']:.0f}", f"{peer['step_s']:.3f}",
                 _shares(peer["mfu"]), "", ""])
  return (f"{found['rows']} rows of {s['row_length']} tokens in sequences of {s['sequence']}, "
          f"{found['micro_batch_rows']} rows at a time, remat {s['remat']}; goal {TRAIN_GOAL:.0%} "
          "for 1.5B parameters and rows of 4096.\n\n"
          + _table(["", "tokens/s", "step s", "MFU", "peak MB", ""], rows))


def _grpo(found, sections, s):
  keys = ("sampling_s", "reference_s", "update_s", "rest_s")
  return (f"{found['sequences']} samples; largest gap of log-probabilities at the first step "
          f"{found['logprob_gap']:.4f}.\n\n" + _table(
              ["step s", "sampling s", "reference s", "update s", "rest s", "tokens/s", ""],
              [[f"{found['step_s']:.3f}", *(f"{found[k]:.3f} ({found[k] / found['step_s']:.0%})"
                                            for k in keys),
                f"{found['tokens_per_s']:.0f}", _mark(found)]]))


def _torch(found, sections, s):
  if "absent" in found:
    return f"No comparison: {found['absent']}.\n"
  failed = [f"{name}: {row['error']}" for name, part in (("decode", found["decode"]),
                                                         ("train", [found["train"]]))
            for row in part if "error" in row]
  return (f"torch {found['versions']['torch']}, transformers {found['versions']['transformers']}; "
          "figures are in the tables above.\n" + "".join(f"\nFailed: {line}\n" for line in failed))


TABLES = {"decode": _decode, "train": _train, "grpo": _grpo, "torch": _torch}


def _peer(sections, key):
  return sections.get("torch", {}).get(key)


def _shares(share):
  sheet = f"{share['of_sheet']:.1%} / " if share["of_sheet"] is not None else "- / "
  return sheet + f"{share['of_measured']:.1%}"


def _mark(row):
  return f"compiled {row['compilations']} programs while timed" if row["compilations"] else ""


def _tera(flops):
  return f"{flops / 1e12:.3g}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
  lines = [headings, ["---"] * len(headings), *rows]
  return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
