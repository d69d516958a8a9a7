"""The simulated schedule of sampling ahead, against closed forms."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

PATH = pathlib.Path(__file__).parents[2] / "scripts" / "bench" / "asynchronous.py"


@pytest.fixture(scope="module")
def script():
  spec = importlib.util.spec_from_file_location("asynchronous_under_test", PATH)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("sampling, training", [(3.0, 2.0), (2.0, 5.0), (1.0, 1.0)])
def test_equal_batches_take_the_sum_in_turn_and_the_longer_one_side_by_side(
    script, sampling, training):
  times = np.full(1000, sampling), np.full(1000, training)
  seconds, waits = script.schedule(*times, staleness=0)
  assert seconds == pytest.approx(sampling + training)
  assert waits == pytest.approx(sampling / (sampling + training))
  for staleness in (1, 3):
    seconds, waits = script.schedule(*times, staleness=staleness)
    assert seconds == pytest.approx(max(sampling, training), rel=0.01)
    assert waits == pytest.approx(max(1 - training / sampling, 0), abs=0.01)


def test_one_batch_ahead_is_the_recurrence_of_a_two_stage_line(script):
  """Batch b + 1 is begun when the trainer asks for batch b, so ends are a max-plus product."""
  rng = np.random.default_rng(0)
  sampling, training = rng.exponential(size=(2, 50))
  sampled, trained = sampling[0], 0.0
  for batch in range(50):
    asked = trained
    following = max(asked, sampled) + sampling[batch + 1] if batch < 49 else 0.0
    trained, sampled = max(asked, sampled) + training[batch], following
  assert script.schedule(sampling, training, staleness=1)[0] == pytest.approx(trained / 50)


def test_more_staleness_evens_out_a_long_tail(script):
  pod = script.Pod(spread=0.8)
  rows = script.simulate(pod, 500)
  best = {s: min(r["seconds"] for r in rows if r["staleness"] == s) for s in (0, 1, 2, 4)}
  assert best[4] < best[2] < best[1]
  assert pod.tails(100_000).mean() == pytest.approx(pod.tail, rel=0.02)
