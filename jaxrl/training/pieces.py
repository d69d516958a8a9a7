"""From settings of a phase to built pieces: terms, episodes, edits, how to sample."""

from collections.abc import Callable, Mapping, Sequence
import inspect
import math
import numbers
from typing import Any

import ml_collections

from jaxrl import compose
from jaxrl import config as configs
from jaxrl import objectives
from jaxrl import rollouts as rollout_lib
from jaxrl import schedule
from jaxrl.objectives.aggregate import Aggregation
from jaxrl.objectives.aggregate import check_aggregation
from jaxrl.rollouts import edits
from jaxrl.sampling import SamplingParams
from jaxrl.training.shapes import PAIRED

OF_ALL_TERMS = ("aggregation", "loss_weight")  # what specs of terms hold beside arguments
# Settings that are no argument of a piece and may have a schedule, for they shape no program; and what
# holds of their values.
SCHEDULED = {
    "optimizer.learning_rate": (lambda x: x >= 0, "at least 0"),
    "rollout.temperature": (lambda x: x > 0, "above 0, for greedy samples have no policy gradient"),
    "rollout.top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "rollout.min_p": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "reference.decay": (lambda x: 0 <= x < 1, "at least 0 and below 1")}


def objective(settings: ml_collections.ConfigDict) -> tuple[list[Callable], list[Aggregation]]:
  """The terms, and the aggregation of each: its own, or that of all, with its `loss_weight`.

  Raises:
    ValueError: a mistake in one, or a second use of a term that can be there only once.
  """
  terms, aggregations = [], []
  for where, spec in _specs(settings):
    aggregation = _aggregation(spec, settings.aggregation, where)
    term = _term(spec, where)
    name = compose.name_of(term)
    if name in map(compose.name_of, terms) and (compose.initial_of(term) or compose.is_prepared(term)):
      raise ValueError(f"{where} lists {name!r} once more, but it keeps something of the batch under its "
                       "name: list it once")
    if compose.is_by_sequence(term) and aggregation.kind == "token_mean" and (
        settings.kind in ("rl", *PAIRED)):
      raise ValueError(f"{where}: {name} compares sequences, and aggregation 'token_mean' would let long "
                       "ones count more: use config.aggregation.kind='sequence_mean', the mean over pairs")
    if compose.is_by_sequence(term) and settings.data.critique and aggregation.kind != "sequence_mean" and (
        settings.kind in PAIRED):
      raise ValueError(f"{where}: critiques behind answers (config.data.critique) are no part of what {name} "
                       f"compares, but aggregation {aggregation.kind!r} would count their tokens: use "
                       "config.aggregation.kind='sequence_mean'")
    terms.append(term)
    aggregations.append(aggregation)
  return terms, aggregations


def terms_of(settings: ml_collections.ConfigDict) -> list[Callable]:
  """The terms alone, whatever else may be wrong with the objective."""
  return [_term(spec, where) for where, spec in _specs(settings)]


def _specs(settings):
  """Where each term stands in a config, and what is there."""
  for i, spec in enumerate(map(plain, settings.objective)):
    yield f"config.objective[{i}]", {"name": spec} if isinstance(spec, str) else spec


def _term(spec, where):
  return compose.build({k: v for k, v in spec.items() if k not in OF_ALL_TERMS}, objectives, where=where)


def _aggregation(spec, common, where):
  """How the loss of a term is aggregated, and its weight."""
  own, weight = spec.get("aggregation"), spec.get("loss_weight", 1.0)
  place = f"{where}.aggregation" if own else "config.aggregation"
  own = {"kind": own} if isinstance(own, str) else own or {k: common[k] for k in ("kind", "constant")}
  if set(own) - {"kind", "constant"} or "kind" not in own:
    raise ValueError(f"{where}.aggregation={own} must be a kind of aggregation, or dict(kind=..., "
                     "constant=...)")
  constant = own.get("constant", common["constant"])
  with compose.named(place):
    check_aggregation(own["kind"], constant)
  weight = schedule.read(weight, f"{where}.loss_weight")
  if not isinstance(weight, schedule.Schedule) and (
      not isinstance(weight, numbers.Real) or isinstance(weight, bool) or not math.isfinite(weight)):
    raise ValueError(f"{where}.loss_weight={weight!r} must be a number, what the term's loss is multiplied "
                     "by, or a schedule of one")
  return Aggregation(own["kind"], constant, weight)


def episode(settings: ml_collections.ConfigDict) -> Callable:
  """What samples and scores the trajectories of a prompt."""
  return _build_episode(settings.rollout.episode, "config.rollout.episode")


def asking(settings: ml_collections.ConfigDict) -> Callable | None:
  """The episode that evaluations ask by; None for the plain question."""
  spec, where = settings.evaluate.episode, "config.evaluate.episode"
  if not spec:
    return None
  episode = _build_episode(spec, where)
  if "reference" in compose.signals_of(episode):
    raise ValueError(f"{where}: {spec.name!r} asks the reference, and evaluations have none")
  return episode


def asks_pairs(settings: ml_collections.ConfigDict) -> bool:
  """Whether the episodes of a phase ask for the answers that rows hold."""
  return settings.kind == "rl" and "pairs" in compose.signals_of(episode(settings))


def _build_episode(spec, where):
  episode = compose.build(plain(spec), rollout_lib, where=where, kind=inspect.iscoroutinefunction)
  if not inspect.iscoroutinefunction(episode.func):
    raise ValueError(f"{where}: {spec.name!r} is no episode; an episode is an `async def "
                     "my_episode(ctx, task, *, ...)`")
  return episode


def edits_of(settings: ml_collections.ConfigDict) -> list[Callable]:
  """What changes the groups of an episode."""
  return [compose.build(plain(edit), rollout_lib, where=f"config.rollout.edits[{i}]", kind=edits.is_edit)
          for i, edit in enumerate(settings.rollout.edits)]


def schedules(settings: ml_collections.ConfigDict) -> dict[str, schedule.Schedule]:
  """What `config.schedules` lists, by the setting that it is of.

  Raises:
    ValueError: a setting that cannot be scheduled, or is twice, or would leave its range.
  """
  found = {}
  for i, spec in enumerate(map(plain, settings.schedules)):
    where = f"config.schedules[{i}]"
    if not (isinstance(spec, Mapping) and {"of", "schedule"} <= set(spec)):
      raise ValueError(f"{where}={spec!r} needs a setting and a schedule: dict(of='rollout.temperature', "
                       "schedule='linear', start=1.2, end=0.8, steps=200)")
    of = spec["of"]
    if of not in SCHEDULED:
      raise ValueError(f"{where}.of={of!r} cannot be scheduled{compose.nearest(str(of), SCHEDULED)}; numbers "
                       "among the arguments of a piece can, in their own place")
    if of in found:
      raise ValueError(f"{where}.of={of!r} has a schedule already: leave one of them out")
    found[of] = schedule.read({k: v for k, v in spec.items() if k != "of"}, where)
    holds, limits = SCHEDULED[of]
    for end in (found[of].start, found[of].end):
      if not holds(end):
        raise ValueError(f"{where}: {of} would be {end:g}; it must be {limits}")
  return found


def sampling(r: ml_collections.ConfigDict, stop_ids: Sequence[int]) -> SamplingParams:
  """How `config.rollout` samples, with more ids where a sample ends."""
  try:
    return SamplingParams(
        max_tokens=r.max_tokens, temperature=r.temperature, top_k=r.top_k, top_p=r.top_p,
        min_p=r.min_p, stop_ids=tuple(dict.fromkeys((*stop_ids, *r.stop_ids))),
        stop_strings=tuple(r.stop_strings))
  except ValueError as error:
    raise ValueError(str(error).replace("sampling.", "config.rollout.", 1)) from error


def samples_ahead(phase: Any) -> bool:
  """Whether batches are sampled while earlier ones are trained on."""
  return phase.kind == "rl" and phase.settings.rollout.staleness > 0


def plain(spec: Any) -> Any:
  """A part of a config as plain dicts and lists."""
  return configs.to_dict(spec) if isinstance(spec, ml_collections.ConfigDict) else spec
