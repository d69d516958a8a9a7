"""A phase of training around a model of a given shape, made as `jaxrl run` makes it."""

from collections.abc import Mapping
import dataclasses
import pathlib
import tempfile
from typing import Any

from configs import base
from jaxrl.training import builders
import scaling_model

OBJECTIVES = {
    "sft": [dict(name="cross_entropy")],
    "grpo": [dict(name="clipped_surrogate", low=0.2, high=0.28), dict(name="kl", beta=0.01)]}


def build(shape: scaling_model.Shape, kind: str, sections: Mapping[str, Mapping[str, Any]]
          ) -> tuple[builders.Parts, builders.Phase]:
  """The parts of a run and its only phase; nothing is computed.

  Args:
    shape: of the model.
    kind: `sft`, or `grpo` with a reference.
    sections: settings of a config by section, as in `{"batch": {"row_length": 4096}}`.

  Raises:
    ValueError: settings that a config lacks or that do not fit.
  """
  config = base.get_config()
  config.data.update(train="task:addition", validation="", test="")
  config.model.update(dataclasses.asdict(shape))
  for section, settings in sections.items():
    if unknown := set(settings) - set(config[section]):
      raise ValueError(f"config.{section} has no {', '.join(sorted(unknown))}")
    config[section].update(settings)
  config.phases = ("phase",)
  config.phase = dict(kind="sft" if kind == "sft" else "rl", steps=100,
                      objective=OBJECTIVES[kind])
  with tempfile.TemporaryDirectory() as workdir:
    parts = builders.build_parts(config, pathlib.Path(workdir), report=lambda text: None)
  return parts, parts.phases[0]
