"""The reference follows the policy: copies every so many updates, moving averages, in any phase."""

import jax
import numpy as np
import pytest

from jaxrl import compose
from jaxrl import objectives
from jaxrl import sharding
from jaxrl.batch import pack
from jaxrl.objectives.aggregate import Aggregation
from jaxrl.training.frozen import Refresh
from jaxrl.training.learner import make_learner
from jaxrl.training.learner import to_micro_batches

UPDATES = 6
TERMS = [dict(name="clipped_surrogate"), dict(name="kl", beta=0.3)]


@pytest.fixture(scope="module")
def trained(toys):
  """`trained(every, decay, bad)`: states, and metrics, after each update, the first before any."""
  def train(every, decay, bad=()):
    parts = toys.learning(
        terms=[compose.build(t, objectives) for t in TERMS],
        aggregations=[Aggregation("token_mean")] * 2, optimizer=toys.gradient_keeper(0.2),
        models={"reference": Refresh(every, decay)})
    learner, state = make_learner(parts, toys.shardings(parts, toys.one_device())), toys.start(parts)
    states, rows = [jax.device_get(state)], []
    for update in range(1, UPDATES + 1):
      trajectories = toys.rollouts(update)
      if update in bad:
        trajectories[0].weight = np.nan
      host = to_micro_batches(pack(trajectories, row_length=32, rows_multiple=8, min_rows=8), 8)
      state, batch, _ = learner.prepare(state, sharding.put_batch(host, toys.one_device()))
      state, metrics = learner.update(state, batch)
      states.append(jax.device_get(state))
      rows.append({k: float(v) for k, v in metrics.items()})
    return states, rows
  return train


def same(x, y):
  return all((a == b).all() for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


def test_a_copy_every_third_update_and_nothing_between(toys, trained):
  states, rows = trained(3, 0.0, bad=(6,))
  references = [s.reference for s in states]
  assert not same(references[0], states[0].params)
  for now, before in ((1, 0), (2, 0), (4, 3), (5, 3)):
    toys.same_bits(references[now], references[before])
    assert not same(states[now].params, states[now - 1].params)
  toys.same_bits(references[3], states[3].params)
  toys.same_bits(references[6], states[5].params)  # what was skipped is counted as an update
  assert rows[-1]["skipped_steps"] == 1
  assert abs(rows[3]["kl"]) < 1e-6 and all(rows[i]["kl"] > 1e-4 for i in (0, 1, 2, 4))


def test_a_moving_average_of_the_policy(toys, trained):
  every, decay = 2, 0.7
  states, _ = trained(every, decay)
  expected = jax.tree.map(lambda x: np.asarray(x, np.float64), states[0].reference)
  for update in range(1, UPDATES + 1):
    if update % every == 0:
      expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * np.float64(new),
                              expected, states[update].params)
    toys.close(states[update].reference, expected, rtol=1e-6)
  assert not same(states[-1].reference, states[-1].params)
