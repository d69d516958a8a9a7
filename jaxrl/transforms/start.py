"""What a transformation may look at before the first update of its phase."""

from collections.abc import Callable
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class PhaseStart:
  """The moment before a phase's first update.

  Attributes:
    params: that the phase begins with, on the mesh.
    parameters_of: from the workdir of a run to its last parameters. "" is what the latest training
      before this phase began with: this run, or in its first phase the run of `config.start`.
    measure: validation metrics by name of given parameters, as the phase before this one measures
      them (the first phase: as it does itself).
  """

  params: Any
  parameters_of: Callable[[str], Any]
  measure: Callable[[Any], dict[str, float]]
