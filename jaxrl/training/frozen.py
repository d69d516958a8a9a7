"""Frozen models beside the policy: the reference, moving averages, earlier policies.

`config.reference` and every entry of `config.frozen` is one. It begins as the policy that a phase begins
with, receives no gradient, and follows the policy, or another frozen model, every so many updates:

    frozen=dict(average=dict(every=1, decay=0.99),                  # Polyak average
                previous=dict(every=100),                           # the policy 1 to 100 updates ago
                before=dict(every=100, follows="previous"),         # and that before it
                start=dict(),                                       # the policy of the phase's start
                teacher=dict(source="runs/teacher"))            # the last of another run, of any shape

A piece reads what one says as the signal `NAME_SIGNAL`, such as `average_logprobs`, exactly as
`reference_logprobs`. In a model with adapters a frozen model is a copy of what the phase trains, over the
one base, and one with `adapted=False` begins as the base. A model with a `source` is that run's policy,
whole and with its own shape, see `training.teachers`; it stays as it is, and nothing follows it. A model is
kept only in phases where a piece reads it, or a model that follows it.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrl.compose import nearest
from jaxrl.models.outputs import MODEL_SIGNALS
from jaxrl.schedule import Schedule

POLICY, OLD, REFERENCE = "policy", "old", "reference"


@dataclasses.dataclass(frozen=True)
class Refresh:
  """How a frozen model follows another.

  Attributes:
    every: updates after which it does; 0 is never.
    decay: share of itself that it keeps: 0 makes it a copy, 0.99 every update is a moving average; or
      a schedule of that.
    follows: the policy, or another frozen model, as it is before it is refreshed itself: models that
      are refreshed by the same update form a shift register.
    lag: follow the policy as it was before the update (Humanline, arXiv:2509.24207).
    adapted: False begins with the adapters that the phase trains switched off.
    source: workdir of the run whose last policy it is; "" begins as the policy of this one.
  """

  every: int = 0
  decay: float | Schedule = 0.0
  follows: str = POLICY
  lag: bool = False
  adapted: bool = True
  source: str = ""


def read(reference: Mapping[str, Any], frozen: Mapping[str, Any], decay: Schedule | None = None
         ) -> dict[str, Refresh]:
  """The frozen models that a config describes, by name, the reference first.

  Args:
    reference: `config.reference`.
    frozen: `config.frozen`.
    decay: of the reference, where `config.schedules` has one.

  Raises:
    ValueError: a name that signals could not be told apart by, a field that there is not, a value out
      of range, or a model that does not follow the policy in the end.
  """
  models = {}
  for name, fields in {REFERENCE: reference, **frozen}.items():
    where = "config.reference" if fields is reference else f"config.frozen.{name}"
    if where != "config.reference":
      _check_name(name, where)
    models[name] = _refresh_of(fields, where)
  if decay is not None:
    if source := models[REFERENCE].source:
      raise ValueError(f"config.schedules is about reference.decay, but config.reference.source={source!r} is another "
                       "run's policy, which stays as it is: leave one of them out")
    models[REFERENCE] = dataclasses.replace(models[REFERENCE], decay=decay)
  for name in models:
    _check_follows(name, models)
  return models


def kept(models: Mapping[str, Refresh], wanted: Iterable[str]) -> tuple[str, ...]:
  """Those of the models that are wanted and begin as the policy, and those that they follow."""
  found = set()
  for name in (name for name in wanted if not models[name].source):
    while name != POLICY and name not in found:
      found.add(name)
      name = models[name].follows if models[name].every else POLICY
  return tuple(name for name in models if name in found)


def refresh(models: Mapping[str, Refresh], frozen: Mapping[str, Any], before: Any, after: Any,
            step: Int[Array, ""]) -> dict[str, Any]:
  """The frozen models after an update.

  Args:
    models: how each follows.
    frozen: parameters of those that are kept.
    before, after: parameters of the policy on either side of the update.
    step: updates so far, this one included; one that was skipped counts.
  """
  def moved(name, own):
    rule = models[name]
    if not rule.every:
      return own
    of_policy = before if rule.lag else after
    other = of_policy if rule.follows == POLICY else frozen[rule.follows]
    due = step % rule.every == 0

    share = rule.decay(step - 1) if isinstance(rule.decay, Schedule) else rule.decay

    def follow(old, new):
      mixed = share * old.astype(jnp.float32) + (1 - share) * new
      return jnp.where(due, mixed.astype(old.dtype), old)
    return jax.tree.map(follow, own, other)
  return {name: moved(name, own) for name, own in frozen.items()}


def place_of(name: str) -> str:
  """Where in a config a frozen model is described."""
  return "config.reference" if name == REFERENCE else f"config.frozen.{name}"


def _check_name(name, where):
  if name in (POLICY, OLD, REFERENCE):
    what = "config.reference has its settings" if name == REFERENCE else "that is the policy"
    raise ValueError(f"{where}: a frozen model cannot be called {name!r}, {what}")
  if not re.fullmatch(r"[a-z][a-z0-9]*", name):
    raise ValueError(f"{where}: pieces read what {name!r} says as NAME_SIGNAL, so a name is one word of "
                     "small letters and digits, without '_'")
  if clash := [signal for signal in MODEL_SIGNALS if signal.startswith(f"{name}_")]:
    raise ValueError(f"{where}: {clash[0]!r} is a signal of the policy, so {name!r} cannot name a "
                     "frozen model; take another word")


def _refresh_of(fields, where):
  valid = [field.name for field in dataclasses.fields(Refresh)]
  if not hasattr(fields, "items"):
    raise ValueError(f"{where}={fields!r}, but it is a section: dict(every=..., decay=...)")
  for field in fields:
    if field not in valid:
      raise ValueError(f"{where} has no field {field!r}{nearest(field, valid)}")
  rule = Refresh(**fields)
  if isinstance(rule.every, bool) or not isinstance(rule.every, int) or rule.every < 0:
    raise ValueError(f"{where}.every={rule.every!r} must be a number of updates; 0 is never")
  if isinstance(rule.decay, bool) or not (isinstance(rule.decay, int | float) and 0 <= rule.decay < 1):
    raise ValueError(f"{where}.decay={rule.decay!r} must be at least 0 and below 1: the share of itself "
                     "that the model keeps; with every=0 it stays as it is")
  for field in ("lag", "adapted"):
    if not isinstance(getattr(rule, field), bool):
      raise ValueError(f"{where}.{field}={getattr(rule, field)!r} must be True or False")
  if not isinstance(rule.source, str):
    raise ValueError(f"{where}.source={rule.source!r} must be the --workdir of a run, '' for none")
  if rule.source and rule != Refresh(source=rule.source):
    raise ValueError(f"{where}.source={rule.source!r} is another run's policy, which stays as it is: leave "
                     "every, decay, follows, lag and adapted out")
  return rule


def _check_follows(name, models):
  where = place_of(name)
  followed, seen = models[name].follows, [name]
  if models[name].lag and followed != POLICY:
    raise ValueError(f"{where}.lag=True is about the policy before an update, but the model follows "
                     f"{followed!r}: leave lag out")
  while followed != POLICY:
    if followed not in models:
      raise ValueError(f"{where}.follows={followed!r} is no model"
                       f"{nearest(followed, [POLICY, *models])}")
    if models[followed].source:
      raise ValueError(f"{where}.follows={models[name].follows!r}, but {followed!r} is of another run, which "
                       "stays as it is: read that one itself")
    if followed in seen:
      raise ValueError(f"{where}.follows={models[name].follows!r}: {' -> '.join([*seen, followed])} never "
                       "comes to the policy, so nothing would move")
    seen.append(followed)
    followed = models[followed].follows
