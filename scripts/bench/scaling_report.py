"""The JSON, the tables and the picture of `scaling.py`."""

from collections.abc import Iterator, Sequence
import itertools
import json
import pathlib

SERIES = ("model", "kind", "machine", "scaling")  # rows that agree in these differ in devices
SECONDS = ("compute_s", "hbm_s", "weights_s", "tensor_s", "step_s", "serial_s",
           "step_with_scores_s")
GOOD = 0.8  # efficiency below which a series counts as having stopped scaling


def write(result: dict, directory: pathlib.Path, picture: pathlib.Path) -> None:
  """Writes scaling.json and scaling.md into a directory, and the picture."""
  directory.mkdir(parents=True, exist_ok=True)
  picture.parent.mkdir(parents=True, exist_ok=True)
  (directory / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
  (directory / "scaling.md").write_text(markdown(result))
  draw(result, picture)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
  """A Markdown table."""
  lines = [headings, ["---"] * len(headings), *rows]
  return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def markdown(result: dict) -> str:
  """All tables, with what they mean."""
  s = result["settings"]
  parts = [
      "# Scaling of updates and rollouts\n",
      "Made by `python scripts/bench/scaling.py` in "
      f"{result['seconds']:.0f} s on a CPU, without allocating the models. Nothing here was timed "
      "on an accelerator: programs were compiled and counted, times are rooflines at the machines' "
      "peaks. A mesh is data x fsdp x tensor.\n",
      f"Rows of {s['length']} tokens; llama-3 shapes, scanned and fully rematerialised layers, "
      "bfloat16 activations, float32 parameters and Adam. `scripts/bench/scaling.py` says how "
      "figures are made, `jaxrl/chips.py` where those of the machines are from.\n",
      "## Compiled programs\n",
      "Per device. Arguments are XLA's, exactly; temporaries are those of XLA's CPU backend, which "
      "keeps float32 copies and attention scores, beside an estimate from the shapes. FLOPs and "
      "collectives count every run of every loop; the ratios are those of the model that fills the "
      "other tables, to the program (which may skip blocks of attention that nothing sees). "
      "Collective bytes are of whole arrays: the ones gathered, reduced or scattered.\n",
      compiled(result["compiled"]),
      "## Where it stops scaling\n",
      f"Strong: {s['rows']} rows ({s['rows'] * s['length'] / 1e6:.1f} M tokens) per update; weak: "
      f"{s['rows_per_device']} rows per device. Efficiency is the rate per device against that on "
      "the fewest devices that the model fits; the second figure is without "
      "any overlap of collectives and compute.\n",
      stops(result["scaling"]),
      "## Best mesh on each number of devices\n",
      "Bound by the largest of its times. `serial` is the step when no collective runs beside "
      "compute, `with scores` when attention scores are written to memory, as without a fused "
      "kernel. `compiled` rows are meshes of the first table; the others are scaled from those.\n",
      *series(result["scaling"]),
      "## Rollouts\n",
      f"A decoding step with bfloat16 weights and cache at {s['prompt']} + {s['response'] // 2} "
      f"tokens, the prompt's cache shared by {s['samples']} samples.\n",
      decoding(result["decoding"]),
      "## A GRPO step: on the same devices in turn, or on devices of their own\n",
      "Sampling is the bound for samples of equal length; a long tail adds idle time to it, which "
      "is what sampling on devices of their own hides. `moving` is the time to bring new weights "
      "to them; `gathering` the same on shared devices. Trainers of their own are half of all "
      "devices, a quarter or an eighth.\n",
      steps(result["steps"])]
  return "\n".join(parts)


def compiled(rows: Sequence[dict]) -> str:
  """What XLA says beside what the model says."""
  ordered = sorted(rows, key=lambda r: (r["model"], r["kind"], r["devices"], _mesh(r)))
  return table(
      ["model", "update", "devices", "mesh", "rows x micro-batches", "arguments GB",
       "state, counted GB", "temporaries GB", "working, estimate GB", "PFLOP", "ratio",
       "collectives GB by axis", "ratio", "compile s"],
      [[r["model"], r["kind"], r["devices"], _mesh(r), _load(r), _giga(r["argument_bytes"]),
        _giga(r["state_estimate"]), _giga(r["temporary_bytes"]), _giga(r["working_estimate"]),
        f"{r['flops'] / 1e15:.3f}", f"{r['flops_ratio']:.3f}",
        ", ".join(f"{axis} {_giga(size)}" for axis, size in r["collective_bytes"].items()
                  if size > 1e8), f"{r['collective_ratio']:.3f}", f"{r['compile_seconds']:.0f}"]
       for r in ordered])


def stops(rows: Sequence[dict]) -> str:
  """One line per series: from where, how far, and what holds it back."""
  lines = []
  for (name, kind, machine, scaling), group in _grouped(rows, *SERIES):
    group = sorted(group, key=lambda r: r["devices"])
    good = list(itertools.takewhile(lambda r: r["efficiency"] >= GOOD, group))
    end, after = good[-1], group[len(good)] if len(good) < len(group) else None
    reason = why(after or group[-1])
    if not after:
      reason = "nothing within the range; largest: " + reason
    serial = [r["devices"] for r in group if r["serial_efficiency"] >= GOOD]
    lines.append([name, kind, machine, scaling, f"{group[0]['devices']} ({_mesh(group[0])})",
                  f"{end['devices']} ({_mesh(end)})", max(serial, default="never"),
                  f"{group[-1]['efficiency']:.2f} / {group[-1]['serial_efficiency']:.2f}", reason])
  return table(["model", "update", "machine", "scaling", "fits from", f"efficiency >= {GOOD} up to",
                "without overlap up to", "efficiency on most", "what stops it"], lines)


def why(row: dict) -> str:
  """What limits a step, in words with its figures."""
  seconds = {"compute": row["compute_s"], "HBM": row["hbm_s"],
             "interconnect (weights)": row["weights_s"], "interconnect (tensor)": row["tensor_s"]}
  causes = {
      "compute": "compute",
      "HBM": "memory traffic of weights and optimiser, too few tokens per device",
      "interconnect (weights)": "gathering weights and reducing gradients, too few tokens per "
                                "device to hide it",
      "interconnect (tensor)": "activations reduced over tensor, which nothing hides"}
  shown = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
  return f"{row['devices']} devices, {_mesh(row)}: {causes[row['bound']]} ({shown})"


def series(rows: Sequence[dict]) -> Iterator[str]:
  """A table per model, kind of update and machine."""
  for (name, kind, machine, scaling), group in _grouped(rows, *SERIES):
    yield f"### {name} {kind} on {machine}, {scaling} scaling\n"
    yield table(
        ["devices", "mesh", "rows x micro-batches", "memory GB", "with scores GB", "compute s",
         "HBM s", "weights s", "tensor s", "step s", "serial s", "with scores s", "MFU at most",
         "efficiency", "bound", "source"],
        [[r["devices"], _mesh(r), _load(r), _giga(r["memory_bytes"]),
          _giga(r["memory_with_scores_bytes"]), *(f"{r[key]:.3g}" for key in SECONDS),
          f"{r['mfu_at_most']:.0%}", f"{r['efficiency']:.2f}", r["bound"], r["source"]]
         for r in sorted(group, key=lambda r: r["devices"])])


def decoding(rows: Sequence[dict]) -> str:
  """Tokens per second and device against rows, the best division over devices for each."""
  lines = []
  for (name, machine, rows_), group in _grouped(rows, "model", "machine", "rows"):
    fitting = [r for r in group if r["fits"]]
    if not fitting:
      lines.append([name, machine, rows_, "none fits", "", "", "", "", ""])
      continue
    best = max(fitting, key=lambda r: r["tokens_per_second"])
    lines.append([name, machine, rows_, best["tensor"], _mega(best["weight_bytes"]),
                  _mega(best["cache_bytes"]), f"{best['seconds'] * 1e3:.1f}",
                  f"{best['tokens_per_second']:.0f}", best["bound"]])
  return table(["model", "machine", "rows", "tensor", "weights MB per token", "cache MB per token",
                "step ms", "tokens/s per device, at most", "bound"], lines)


def steps(rows: Sequence[dict]) -> str:
  """Sharing devices against dividing them."""
  return table(
      ["model", "machine", "devices", "sampling s", "training s", "gathering s", "in turn s",
       "trainers", "moving s", "apart s", "gain"],
      [[r["model"], r["machine"], r["devices"], f"{r['sampling_s']:.3g}", f"{r['training_s']:.3g}",
        f"{r['gathering_s']:.3g}", f"{r['together_s']:.3g}", r.get("trainers", "none fits"),
        *([f"{r['moving_s']:.3g}", f"{r['apart_s']:.3g}", f"{r['together_s'] / r['apart_s']:.2f}"]
          if "apart_s" in r else ["", "", ""])] for r in rows])


def draw(result: dict, path: pathlib.Path) -> None:
  """Step time, efficiency, what a step is made of, and decoding rates."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, ((time_axes, rate_axes), (part_axes, decode_axes)) = plt.subplots(
      2, 2, figsize=(12, 8.5), layout="constrained")
  strong = [r for r in result["scaling"] if r["scaling"] == "strong"]
  kind = strong[0]["kind"]
  for (name, machine), group in _grouped([r for r in strong if r["kind"] == kind],
                                         "model", "machine"):
    group = sorted(group, key=lambda r: r["devices"])
    devices = [r["devices"] for r in group]
    line, = time_axes.plot(devices, [r["step_s"] for r in group], "o-", label=f"{name} {machine}")
    first = group[0]
    time_axes.plot(devices, [first["step_s"] * first["devices"] / n for n in devices], ":",
                   color=line.get_color())
    line, = rate_axes.plot(devices, [r["efficiency"] for r in group], "o-",
                           label=f"{name} {machine}")
    rate_axes.plot(devices, [r["serial_efficiency"] for r in group], ":", color=line.get_color())
  time_axes.set(xscale="log", yscale="log", xlabel="devices", ylabel="seconds",
                title=f"{kind} update, strong scaling (dotted: ideal)")
  rate_axes.set(xscale="log", xlabel="devices", ylim=(0, 1.1),
                title="rate per device, strong scaling (dotted: nothing overlaps)")
  _draw_parts(part_axes, strong, kind)
  for (name, machine), group in _grouped([r for r in result["decoding"] if r["fits"]],
                                         "model", "machine"):
    best = {}
    for r in group:
      best[r["rows"]] = max(best.get(r["rows"], 0), r["tokens_per_second"])
    decode_axes.plot(sorted(best), [best[n] for n in sorted(best)], "o-", label=f"{name} {machine}")
  decode_axes.set(xscale="log", yscale="log", xlabel="rows per copy of the weights",
                  ylabel="tokens/s per device, at most", title="decoding")
  for axes in (time_axes, rate_axes, part_axes, decode_axes):
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
  figure.suptitle("Rooflines from compiled programs, not measurements", fontsize=10)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _draw_parts(axes, strong, kind):
  """Stacked bars of the last series: what a step would take if each part were alone."""
  name, machine = strong[-1]["model"], strong[0]["machine"]
  group = sorted((r for r in strong if (r["model"], r["machine"], r["kind"])
                  == (name, machine, kind)), key=lambda r: r["devices"])
  places = range(len(group))
  parts = {"compute_s": "compute", "hbm_s": "HBM", "weights_s": "weights", "tensor_s": "tensor"}
  for offset, (key, label) in enumerate(parts.items()):
    axes.bar([p + 0.2 * (offset - 1.5) for p in places], [r[key] for r in group], 0.2, label=label)
  axes.set_xticks(list(places), [f"{r['devices']}\n{_mesh(r)}" for r in group], fontsize=7)
  axes.set(yscale="log", ylabel="seconds, each alone", title=f"parts of a step: {name} {machine}")


def _grouped(rows, *keys):
  def key(row):
    return tuple(row[k] for k in keys)
  return itertools.groupby(sorted(rows, key=key), key)


def _mesh(row):
  return "x".join(str(row["mesh"][axis]) for axis in ("data", "fsdp", "tensor"))


def _load(row):
  return f"{row['load']['rows']} x {row['load']['micro_batches']}"


def _giga(size):
  return f"{size / 1e9:.1f}"


def _mega(size):
  return f"{size / 1e6:.1f}"
