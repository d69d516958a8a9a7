"""Where a phase's batches come from: examples of the data, or rollouts of the current policy.

A supply draws from the data and gives host batches; the loop neither knows nor cares which kind it
feeds on. A new kind of phase is a new supply and its objective terms.
"""

from collections.abc import Callable, Sequence
import copy
import dataclasses
import time
from typing import Any, Protocol

import jax
import numpy as np

from jaxrl import data
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rollouts import Rollouts
from jaxrl.rollouts import collect
from jaxrl.rollouts import edits as edit_lib


@dataclasses.dataclass
class Supplied:
  """Trajectories of one batch, what to log about them, and the tasks they answer."""

  trajectories: list[Trajectory]
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  tasks: dict[str, Task] = dataclasses.field(default_factory=dict)


class Supply(Protocol):
  """Gives batches, and can be stopped and continued at any of them."""

  sampled: bool  # whether trajectories come from a policy, with log-probabilities and rewards

  def next(self, params: Any, step: int, reference: Any = None) -> Supplied:
    """The next batch, for the policy `params` at update `step` of the phase, and the parameters of
    its reference if the phase has one."""

  def prefetch(self) -> None:
    """Begins with the next batch while the last one is learned from, as far as no parameters are needed.
    It may never be asked for, and what goes wrong is raised by `next`."""

  def get_state(self) -> dict:
    """Position after the last batch handed out: JSON-able values, and NumPy arrays anywhere among them."""

  def set_state(self, state: dict) -> None:
    """Continues from a position."""

  def close(self) -> None:
    """Ends what is under way, in whatever thread; no batch can be had afterwards."""


class Examples:
  """Sequences to imitate or to compare: those of `count` examples per batch."""

  sampled = False

  def __init__(self, examples: data.TaskIterator,
               to_trajectories: Callable[[list[Any]], list[Trajectory]], count: int):
    """Draws from `examples`; `to_trajectories` makes the sequences of a batch of them."""
    self._examples, self._to_trajectories, self._count = examples, to_trajectories, count
    self._early: tuple[dict, Supplied | Exception] | None = None  # position before it, the next batch

  def next(self, params: Any, step: int, reference: Any = None) -> Supplied:
    del params, step, reference
    self.prefetch()
    _, drawn = self._early
    self._early = None
    if isinstance(drawn, Exception):
      raise drawn
    return drawn

  def prefetch(self) -> None:
    if self._early is None:
      position = self._examples.get_state()
      try:
        drawn = Supplied(self._to_trajectories([next(self._examples) for _ in range(self._count)]))
      except Exception as error:
        drawn = error
      self._early = position, drawn

  def get_state(self) -> dict:
    return self._examples.get_state() if self._early is None else self._early[0]

  def set_state(self, state: dict) -> None:
    self._early = None
    self._examples.set_state(state)

  def close(self) -> None:
    pass


class GroupsOfRollouts:
  """Rollouts: episodes of the current policy, scored and edited, with statistics of their groups."""

  sampled = True

  def __init__(self, tasks: data.TaskIterator, rollouts: Rollouts, *, prompts: int,
               base_key: jax.Array, key: tuple[int, ...],
               filter_zero_variance: bool, max_resample: int, filter_by: str = "",
               edits: Sequence[Callable] = ()):
    self._tasks, self._rollouts, self._edits = tasks, rollouts, edits
    self._collect = dict(prompts=prompts, base_key=base_key,
                         filter_zero_variance=filter_zero_variance, filter_by=filter_by,
                         max_resample=max_resample)
    self._key = key

  def next(self, params: Any, step: int, reference: Any = None) -> Supplied:
    start, before = time.perf_counter(), self._rollouts.drawn.copy()
    collected = collect(self._rollouts, params, lambda n: [next(self._tasks) for _ in range(n)],
                        key=(*self._key, step), step=step, reference=reference, **self._collect)
    metrics = {**rollout_metrics(collected.sampled), **self._rollouts.scheduled(step)}
    drawn = self._rollouts.drawn - before
    metrics["sampled_sequences"], metrics["sampled_tokens"] = map(int, drawn)
    metrics["groups"] = collected.groups
    metrics["effective_group_fraction"] = collected.effective_groups / max(collected.groups, 1)
    batch = edit_lib.Step(collected.trajectories, collected.tasks, step, self._rollouts.memory,
                          metrics, self._rollouts.tokenizer.decode, collected.sampled, self._rollouts.seed)
    trajectories = edit_lib.apply(self._edits, batch)
    metrics["rollout_seconds"] = time.perf_counter() - start
    return Supplied(trajectories, metrics, collected.tasks)

  def prefetch(self) -> None:
    pass

  def get_state(self) -> dict:
    return {"tasks": self._tasks.get_state(), "memory": copy.deepcopy(self._rollouts.memory)}

  def set_state(self, state: dict) -> None:
    self._tasks.set_state(state["tasks"])
    self._rollouts.memory.clear()
    self._rollouts.memory.update(copy.deepcopy(state["memory"]))

  def close(self) -> None:
    self._rollouts.stop()


def rollout_metrics(trajectories: list[Trajectory]) -> dict[str, float]:
  """Reward and criteria where there are any; length and ending of all trajectories."""
  scored = [t for t in trajectories if t.scored]
  lengths = [int(t.loss_mask.sum()) for t in trajectories]
  metrics = {
      "reward": _mean([t.reward for t in scored]),
      "reward_std": float(np.std([t.reward for t in scored])) if scored else float("nan"),
      "response_tokens": _mean(lengths),
      "response_tokens_max": float(max(lengths, default=0)),
      "truncated": _mean([t.finish == "length" for t in trajectories]),
      "unscored": _mean([not t.scored for t in trajectories]),
  }
  for name in dict.fromkeys(name for t in scored for name in t.evidence):  # which not all of them have
    values = [t.evidence[name].score for t in scored
              if name in t.evidence and t.evidence[name].status == "ok"]
    metrics[f"criteria/{name}"] = _mean(values)
  return metrics


def _mean(values):
  return float(np.mean(values)) if len(values) else float("nan")
