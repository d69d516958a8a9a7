"""The judge that a config describes: samples in, rewards with their evidence out."""

import collections
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import inspect
import logging
import math
import textwrap
import threading
import traceback
import typing
from typing import Any

from jaxrl import compose
from jaxrl import rewards
from jaxrl.rewards import aggregate as aggregate_lib
from jaxrl.rewards import criterion as criterion_lib
from jaxrl.rewards import pool as pool_lib
from jaxrl.rewards.criterion import Criterion

if typing.TYPE_CHECKING:
  from jaxrl.batch import Task, Trajectory

WINDOW = 512  # past samples that the limits look back on
FEWEST = 16  # samples that a rate is computed over at least: 1 failure in 2 says little
EXCERPT = 400  # characters of question and completion in a report

logger = logging.getLogger(__name__)


class RewardFailure(RuntimeError):
  """Too many samples cannot be judged; the message shows the first one."""


@dataclasses.dataclass(frozen=True)
class Scored:
  """What a scorer says about one sample: `reward` is 0 and meaningless unless `scored`."""

  reward: float
  scored: bool
  evidence: dict[str, Criterion]


class Scorer:
  """Judges samples with named criteria and turns the evidence into rewards.

  Criteria run in worker processes under a time-out, except those that `declare(inline=True)` or
  `declare(batched=True)`; one
  that raises, hangs, dies or returns no finite number fails on that sample only. The sample then
  has no reward, and is counted. The run stops with `RewardFailure` when of the samples of a call
  and the last 512 before it (taken as 16 if there are fewer) more than `max_failure_rate` failed,
  or when 512 in a row have no reward because of criteria that are not `ok`: nothing is learnt then.
  The rate is checked with every failure, so that a reward which always hangs does not do so on a
  whole batch first.

  Args:
    criteria: specs of criterion functions, `dict(name=..., **kwargs)`, found in `jaxrl.rewards` or
      named `module:function`. `label` is the key in the evidence, by default the function's name.
    aggregate: spec of the function from evidence to reward.
    workers: number of worker processes. With 0 all criteria run in this process and nothing stops
      one that hangs or crashes.
    timeout: seconds that one criterion may take on one sample.
    max_failure_rate: from 0, which stops at the first failure, to 1, which never stops.
    where: path of this spec in the config, for error messages.
    mesh: devices of batched criteria; None for all.
    given: more keyword arguments, for criteria that take them and whose spec does not set them.

  Raises:
    ValueError: a spec that cannot work, with its place and the nearest valid name.
  """

  def __init__(self, criteria: Sequence[Mapping[str, Any]],
               aggregate: str | Mapping[str, Any] = "weighted_sum", *, workers: int = 2,
               timeout: float = 5.0, max_failure_rate: float = 0.1, where: str = "config.reward",
               mesh: Any = None, given: Mapping[str, Any] | None = None):
    if workers < 0 or not 0 < timeout < math.inf or not 0 <= max_failure_rate <= 1:
      raise ValueError(f"{where}: workers={workers} must be at least 0, timeout={timeout} finite "
                       f"and above 0, max_failure_rate={max_failure_rate} between 0 and 1")
    if not criteria or isinstance(criteria, str | Mapping):
      raise ValueError(f"{where}.criteria must list at least one criterion, such as "
                       f"[dict(name='exact_match')], got {criteria!r}")
    self._where, self._max_failure_rate = where, max_failure_rate
    self._labels, self._inline, self._batched, specs = [], {}, {}, {}
    self._mesh = mesh
    for number, spec in enumerate(criteria):
      at = f"{where}.criteria[{number}]"
      label, spec, function = _build_criterion(spec, at, given or {})
      if label in self._labels or label == "aggregate":
        raise ValueError(f"{at}: the label {label!r} is taken; tell criteria apart with "
                         f"dict(label=..., name={spec['name']!r})")
      self._labels.append(label)
      if _is_batched(function):
        self._batched[label] = function
      elif workers and not getattr(function.func, "inline", False):
        specs[label] = (spec, at)
      else:
        self._inline[label] = function
    self._aggregate = _build(_plain(aggregate), f"{where}.aggregate", ("evidence",))
    aggregate_lib.check_labels(self._aggregate, self._labels, where=f"{where}.aggregate")

    self._remote = list(specs)
    self._counts = collections.Counter()
    self._failures = collections.deque(maxlen=WINDOW)
    self._unscored = 0  # in a row
    self._warned = set()
    self._lock = threading.Lock()
    self._pool = pool_lib.WorkerPool(list(specs.values()), workers=workers,
                                     timeout=timeout) if specs else None

  @classmethod
  def from_config(cls, spec: Mapping[str, Any], where: str = "config.reward",
                  mesh: Any = None, given: Mapping[str, Any] | None = None) -> "Scorer":
    """Builds a scorer from `dict(criteria=[...], aggregate=..., workers=..., ...)`."""
    spec = dict(spec)
    valid = [name for name in inspect.signature(cls).parameters if name not in ("where", "mesh", "given")]
    for key in spec:
      if key not in valid:
        raise ValueError(f"{where} has no field {key!r}{compose.nearest(key, valid)}")
    if "criteria" not in spec:
      raise ValueError(f"{where} needs criteria, such as criteria=[dict(name='exact_match')]")
    return cls(**spec, where=where, mesh=mesh, given=given)

  @property
  def labels(self) -> list[str]:
    """Keys of the evidence, in the order of the criteria."""
    return list(self._labels)

  @property
  def has_workers(self) -> bool:
    """Whether judging leaves this process and its devices free."""
    return self._pool is not None and not self._batched

  @property
  def counts(self) -> dict[str, int]:
    """Totals so far: samples, scored, failed, unscorable, and the last two as `label/failed`.

    A sample with several criteria that are not `ok` counts once in `failed` or in `unscorable`.
    """
    names = ["samples", "scored", "failed", "unscorable"]
    names += [f"{label}/{status}" for label in self._labels for status in ("failed", "unscorable")]
    return {name: self._counts[name] for name in names}

  def score(self, pairs: Sequence[tuple["Task", "Trajectory"]], *, among: int = 0) -> list[Scored]:
    """Judges samples; the order of the result is that of `pairs`. May be called from any thread.

    Args:
      pairs: what is judged.
      among: samples that these are a part of, for the rate of failures; 0 is these alone.

    Raises:
      RewardFailure: too many samples failed, or none could be scored.
      RuntimeError: the worker processes cannot start.
    """
    pairs = list(pairs)
    return self._score(pairs, among, self._judge_batches(pairs))

  def _judge_batches(self, pairs) -> dict[str, list[Criterion]]:
    """What batched criteria say of each sample, by label."""
    if not pairs:
      return {}
    with self._lock:
      return {label: criterion_lib.judge_all(function, pairs, self._mesh)
              for label, function in self._batched.items()}

  def _score(self, pairs, among, batched):
    with self._lock:
      found = [{} for _ in pairs]
      failures = set()
      total = max(len(self._failures) + max(len(pairs), among), FEWEST)
      allowed = self._max_failure_rate * total - sum(self._failures)

      def note(index, label, outcome):
        found[index][label] = outcome
        if outcome.status != "failed":
          return
        failures.add(index)
        self._warn(label, _example(*pairs[index], {label: outcome}))
        if len(failures) > allowed:
          first = min(failures)
          raise RewardFailure(
              f"{len(failures) + sum(self._failures)} of {total} samples cannot be judged, more "
              f"than {self._where}.max_failure_rate={self._max_failure_rate:g} allows. The first "
              f"failing example:\n{_example(*pairs[first], found[first])}")

      for label, outcomes in batched.items():
        for index, outcome in enumerate(outcomes):
          note(index, label, outcome)
      with contextlib.closing(self._outcomes(pairs)) as outcomes:
        for outcome in outcomes:
          note(*outcome)
      scored = []
      for index in range(len(pairs)):
        evidence = {label: found[index][label] for label in self._labels}
        reward = self._reward(evidence)
        if isinstance(reward, Criterion):
          note(index, "aggregate", reward)
          evidence, reward = {**evidence, "aggregate": reward}, None
        scored.append(Scored(reward or 0.0, reward is not None, evidence))
      self._record(pairs, scored)
      return scored

  def close(self) -> None:
    """Ends the worker processes; the scorer cannot be used afterwards."""
    if self._pool is not None:
      self._pool.close()

  def __enter__(self) -> "Scorer":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _outcomes(self, pairs) -> Iterator[tuple[int, str, Criterion]]:
    for index, (task, completion) in enumerate(pairs):
      for label, function in self._inline.items():
        yield index, label, criterion_lib.judge(function, task, completion)
    if self._pool is None:
      return
    indices = tuple(range(len(self._remote)))
    jobs = (pool_lib.Job(index, self._pack(task, completion), indices)
            for index, (task, completion) in enumerate(pairs))
    with contextlib.closing(self._pool.run(jobs)) as outcomes:
      for index, number, outcome in outcomes:
        yield index, self._remote[number], outcome

  def _pack(self, task, completion):
    payload, lost = pool_lib.pack(task, completion)
    for name in lost - self._warned:
      logger.warning("%s cannot be pickled, so criteria in worker processes do not see it (first "
                     "in task %r); keep the fields of rows to plain data", name, task.id)
    self._warned |= lost
    return payload

  def _reward(self, evidence):
    """The reward, None, or a failed criterion if the aggregator broke."""
    try:
      reward = self._aggregate(evidence)
    except Exception:
      return criterion_lib.failed(traceback.format_exc())
    if reward is None:
      return None
    checked = criterion_lib.as_criterion(reward)
    return checked.score if checked.status == "ok" else checked

  def _record(self, pairs, scored):
    for (task, completion), one in zip(pairs, scored):
      statuses = {found.status for found in one.evidence.values()}
      worst = next((status for status in ("failed", "unscorable") if status in statuses), "ok")
      self._counts.update({"samples": 1, "scored": int(one.scored), worst: 1})
      self._counts.update(f"{label}/{found.status}" for label, found in one.evidence.items())
      self._failures.append(worst == "failed")
      self._unscored = self._unscored + 1 if worst != "ok" and not one.scored else 0
      if self._unscored >= WINDOW:
        raise RewardFailure(f"none of the last {WINDOW} samples has a reward. The latest:\n"
                            f"{_example(task, completion, one.evidence)}")

  def _warn(self, label, example):
    if label not in self._warned:
      self._warned.add(label)
      logger.warning("%s: criterion %r failed; its further failures are only counted\n%s",
                     self._where, label, example)


def _build(spec, where, positional, given=None):
  """`compose.build`, and a look at what the function takes, so that kinds are not mixed up."""
  function = compose.build(spec, rewards, where=where, given=given)
  parameters = inspect.signature(function.func).parameters.values()
  takes = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
  positional = ("pairs", "mesh") if _is_batched(function) else positional
  if len(takes) != len(positional):
    raise ValueError(f"{where}: {compose.name_of(function)} takes ({', '.join(takes)}), but what "
                     f"is called here takes ({', '.join(positional)}) and keywords after a *")
  if check := getattr(function.func, "check", None):
    try:
      check(**function.keywords)
    except ValueError as error:
      raise ValueError(f"{where}: {compose.name_of(function)}: {error}") from error
  return function


def _is_batched(function):
  return getattr(function.func, "batched", False)


def _build_criterion(spec, where, given):
  """The label, the spec without it as plain data, for workers with what is given, and the function."""
  spec = _plain(spec)
  spec = {"name": spec} if isinstance(spec, str) else dict(spec)
  label = spec.pop("label", None)
  function = _build(spec, where, ("task", "completion"), given)
  spec |= {name: value for name, value in given.items() if name in function.keywords and name not in spec}
  return label or compose.name_of(function), spec, function


def _plain(value):
  """Config containers as dicts, which workers read without the library of the config."""
  if hasattr(value, "to_dict"):
    value = value.to_dict()
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _example(task, completion, evidence):
  label, found = next((item for item in evidence.items() if item[1].status == "failed"),
                      next(item for item in evidence.items() if item[1].status != "ok"))
  return textwrap.dedent("""\
      task: {}
      question: {}
      completion: {}
      criterion: {} ({})
      {}""").format(task.id, _excerpt(task.question), _excerpt(completion.text), label,
                    found.status, textwrap.indent(found.detail.strip(), "  "))


def _excerpt(text):
  if len(text) > EXCERPT:
    text = f"{text[:EXCERPT // 2]} ... {text[-EXCERPT // 2:]}"
  return repr(text)  # escapes what a terminal would obey
