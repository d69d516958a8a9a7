"""Edits of whole batches."""

import numpy as np
import pytest

from jaxrl.batch import Trajectory
from jaxrl.rollouts import edits


def step(rewards, **fields):
  ts = [Trajectory(tokens=[1, 2], loss_mask=[False, True], reward=r, group=i // 2, task_id=str(i // 2))
        for i, r in enumerate(rewards)]
  return edits.Step(ts, {}, **{**dict(index=0, memory={}, metrics={}), **fields})


def test_keep_takes_out_what_is_not_in_the_interval_and_leaves_the_originals():
  before = step([0.0, 1.0, 0.5, 1.0])
  assert [t.scored for t in edits.keep(before, below=1.0)] == [True, False, True, False]
  assert [t.scored for t in edits.keep(before, at_least=0.5)] == [False, True, True, True]
  assert all(t.scored for t in before.trajectories)


def test_edits_run_in_order_and_remember():
  def count(step):
    step.memory["seen"] = step.memory.get("seen", 0) + len(step.trajectories)
    return step.trajectories[:-1]
  batch = step([0.0, 1.0, 1.0])
  assert len(edits.apply([count, count], batch)) == 1 and batch.memory == {"seen": 5}


def test_groups_keep_their_order():
  sizes = [len(group) for group in step(np.ones(5)).groups()]
  assert sizes == [2, 2, 1]


def test_what_is_no_list_of_trajectories_is_refused():
  def forgets(step):
    step.memory["x"] = 1
  with pytest.raises(ValueError, match="'forgets'.*NoneType"):
    edits.apply([forgets], step([1.0]))
