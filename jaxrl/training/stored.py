"""Sampled batches as what a checkpoint holds: JSON, and NumPy arrays beside it."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rewards import Criterion
from jaxrl.training.supply import Supplied

PER_TOKEN = ("tokens", "loss_mask", "behaviour_logprobs", "turn_ids", "tag_ids")
PER_TRAJECTORY = ("group", "reward", "scored", "weight", "columns", "task_id", "prompt_length",
                  "text", "finish")
PER_TASK = ("id", "prompt", "question", "answer", "solution")
ARRAY = "numpy_array"  # only key of what stands for an array in JSON


def to_state(supplied: Supplied) -> dict[str, Any]:
  """A batch as JSON-able values and NumPy arrays, in which nothing is lost that training or its
  records depend on: of tasks all but the `row`, which only rewards read."""
  trajectories = supplied.trajectories
  arrays = {name: _joined([getattr(t, name) for t in trajectories]) for name in PER_TOKEN}
  signals = {name: _joined([t.signals[name] for t in trajectories])
             for name in (trajectories[0].signals if trajectories else ())}
  rows = [{**{name: getattr(t, name) for name in PER_TRAJECTORY},
           "evidence": {name: dataclasses.asdict(c) for name, c in t.evidence.items()}}
          for t in trajectories]
  tasks = [{name: getattr(task, name) for name in PER_TASK} for task in supplied.tasks.values()]
  return {"lengths": np.array([len(t.tokens) for t in trajectories], np.int64), "arrays": arrays,
          "signals": signals, "trajectories": rows, "tasks": tasks, "metrics": supplied.metrics}


def from_state(state: Mapping[str, Any]) -> Supplied:
  """The inverse of `to_state`."""
  ends = np.cumsum(state["lengths"])[:-1]

  def split(arrays):
    return {name: np.split(array, ends) for name, array in arrays.items()}
  arrays, signals = split(state["arrays"]), split(state["signals"])
  trajectories = []
  for i, row in enumerate(state["trajectories"]):
    evidence = {name: Criterion(**fields) for name, fields in row["evidence"].items()}
    trajectories.append(Trajectory(
        **{**row, "evidence": evidence}, **{name: pieces[i] for name, pieces in arrays.items()},
        signals={name: pieces[i] for name, pieces in signals.items()}))
  tasks = {task["id"]: Task(**task) for task in state["tasks"]}
  return Supplied(trajectories, dict(state["metrics"]), tasks)


def take_arrays(state: Any, where: str) -> tuple[Any, dict[str, np.ndarray]]:
  """Nested dicts and lists with a name in the place of every NumPy array, and the arrays by name.

  Args:
    where: first part of the names.
  """
  if isinstance(state, np.ndarray):
    return {ARRAY: where}, {where: state}
  if not isinstance(state, Mapping | list | tuple):
    return state, {}
  named = state if isinstance(state, Mapping) else dict(enumerate(state))
  found, arrays = {}, {}
  for name, value in named.items():
    found[name], inner = take_arrays(value, f"{where}/{name}")
    arrays |= inner
  return (found if isinstance(state, Mapping) else list(found.values())), arrays


def put_arrays(state: Any, arrays: Mapping[str, np.ndarray]) -> Any:
  """The inverse of `take_arrays`; tuples have become lists."""
  if isinstance(state, Mapping):
    if set(state) == {ARRAY} and isinstance(state[ARRAY], str):
      return arrays[state[ARRAY]]
    return {name: put_arrays(value, arrays) for name, value in state.items()}
  return [put_arrays(value, arrays) for value in state] if isinstance(state, list) else state


def _joined(arrays):
  return np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
