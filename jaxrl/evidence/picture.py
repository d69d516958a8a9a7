"""The picture of a method's runs: what was logged on the way, by arm, and the claims."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxrl.evidence import runs

COLOURS = ("#3366cc", "#dc7a1f", "#2a9d5c", "#b8356b", "#7a52c7", "#6b7280")
# The first that were logged are drawn.
CURVES = {"validation/greedy_accuracy": "held-out greedy accuracy", "reward": "training reward",
          "entropy": "entropy, nats", "response_tokens": "response, tokens",
          "preference_accuracy": "pairs that are told apart", "preference_margin": "margin of pairs",
          "loss": "loss", "grad_norm": "gradient norm"}
PANELS = 4


def draw(content: Mapping[str, Any], places: Mapping[str, Sequence[pathlib.Path]],
         path: pathlib.Path) -> None:
  """Draws curves of all seeds, thin, with their mean, and writes a PNG."""
  figure = Figure(figsize=(13, 3.4), layout="constrained", facecolor="white")
  curves_of = {name: {arm: [runs.curve_of(place, name) for place in workdirs]
                      for arm, workdirs in places.items()} for name in CURVES}
  logged = [name for name, arms in curves_of.items()
            if any(steps for curves in arms.values() for steps, _ in curves)][:PANELS]
  for axes, name in zip(figure.subplots(1, len(logged)), logged):
    label = CURVES[name]
    for colour, (arm, curves) in zip(COLOURS, curves_of[name].items()):
      for steps, values in curves:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
      shortest = min(len(values) for _, values in curves)
      if shortest:
        means = [sum(values[i] for _, values in curves) / len(curves) for i in range(shortest)]
        axes.plot(curves[0][0][:shortest], means, color=colour, linewidth=1.8, label=arm)
    axes.set_title(label, fontsize=9)
    axes.set_xlabel("update", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
  figure.axes[0].legend(fontsize=8, frameon=False)
  figure.suptitle(f"{content['title']}  -  {content['verdict']}", fontsize=10)
  FigureCanvasAgg(figure).print_png(str(path))
