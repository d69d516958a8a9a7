"""Numbers that change over the updates of a phase: `dict(schedule="linear", start=..., end=..., steps=...)`.

Any number among the arguments of a piece (credit, objective term, episode, edit) may be given like
this, and some settings by an entry of `config.schedules` that says which of `training.pieces.SCHEDULED`
it is of: `dict(of="rollout.temperature", schedule=...)`. With
x = (step - delay) / steps, from 0 before to 1 after:

    linear    start + (end - start) * x
    cosine    end + (start - end) * (1 + cos(pi * x)) / 2
    constant  start until x reaches 1, then end

`restarts=True` begins again every `steps` updates. Cycles go from start to end and back, again and
again, with x = ((step - delay) mod steps) / steps (SIRI, arXiv:2509.25176):

    stair-cycle         end until x reaches 1/2, then start
    cosine-cycle        end + (start - end) * (1 + cos(2 pi * x)) / 2
    stair-cosine-cycle  like cosine-cycle, with an eighth of a cycle at rest on either side of x = 0
                        and of x = 1/2, and half a cosine between them in a quarter of a cycle
"""

from collections.abc import Mapping
import dataclasses
import numbers
from typing import Any

CYCLES = ("stair-cycle", "cosine-cycle", "stair-cosine-cycle")
KINDS = ("linear", "cosine", "constant", *CYCLES)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A number over updates; call it with the update's index to get a float32 scalar."""

  schedule: str
  start: float
  end: float
  steps: int
  delay: int = 0
  restarts: bool = False

  def __post_init__(self):
    if self.schedule not in KINDS:
      raise ValueError(f"schedule={self.schedule!r} is none of {', '.join(KINDS)}")
    for name in ("start", "end", "steps", "delay"):
      value = getattr(self, name)
      if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} of a schedule must be a number")
    if not self.steps > 0 or self.delay < 0:
      raise ValueError(f"a schedule over steps={self.steps} updates after delay={self.delay}: steps "
                       "must be above 0, delay at least 0")
    if self.schedule in CYCLES and self.restarts:
      raise ValueError(f"schedule={self.schedule!r} repeats itself: leave restarts out")

  def __call__(self, step):
    import jax.numpy as jnp  # only here: workers that judge read specs, and load no JAX
    done = jnp.maximum(step - self.delay, 0)
    again = self.restarts or self.schedule in CYCLES
    x = (done % self.steps if again else jnp.minimum(done, self.steps)) / self.steps
    if self.schedule == "linear":
      share = x
    elif self.schedule == "cosine":
      share = (1 - jnp.cos(jnp.pi * x)) / 2
    elif self.schedule == "stair-cycle":
      share = x < 0.5
    elif self.schedule == "cosine-cycle":
      share = (1 - jnp.cos(2 * jnp.pi * x)) / 2
    elif self.schedule == "stair-cosine-cycle":
      away = jnp.minimum(x, 1 - x)  # from the nearest start of a cycle, 0 to 1/2
      share = (1 - jnp.cos(4 * jnp.pi * jnp.clip(away - 0.125, 0, 0.25))) / 2
    else:
      share = x >= 1
    return jnp.float32(self.start) + jnp.float32(self.end - self.start) * share


def read(value: Any, where: str) -> Any:
  """The schedule that a config value describes, any other value as it is.

  Raises:
    ValueError: a field that schedules do not have, or that is missing, or wrong.
  """
  if not (isinstance(value, Mapping) and "schedule" in value):
    return value
  names = [field.name for field in dataclasses.fields(Schedule)]
  if unknown := set(value) - set(names):
    raise ValueError(f"{where} has no field {sorted(unknown)[0]!r}; a schedule has "
                     f"{', '.join(names)}")
  if missing := {"start", "end", "steps"} - set(value):
    raise ValueError(f"{where} is a schedule and needs {', '.join(sorted(missing))}")
  try:
    return Schedule(**value)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error
