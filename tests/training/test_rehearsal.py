"""What was rehearsed is what runs: compiled once, aside, before there is a batch."""

import threading
import time

import jax
import numpy as np
import pytest

from jaxrl import sharding
from jaxrl.batch import pack
from jaxrl.training import streams
from jaxrl.training.learner import make_learner
from jaxrl.training.learner import to_micro_batches
from jaxrl.training.machine import CompileCounter
from jaxrl.training.rehearsal import Aside
from jaxrl.training.rehearsal import Rehearsal
from jaxrl.training.state import abstract_state


def updated(toys, learning, learner, mesh):
  """Parameters after an update on six rollouts in a batch of 8 rows and 16 sequences."""
  host = pack(toys.rollouts(6), row_length=32, rows_multiple=4, min_rows=8, min_sequences=16)
  state = toys.start(learning, mesh)
  with jax.set_mesh(mesh):
    batch = learner.prepare(state, sharding.put_batch(to_micro_batches(host, 4), mesh))[1]
    return jax.device_get(learner.update(state, batch)[0].params)


@pytest.mark.parametrize("devices, streams", [(1, 1), (4, 1), (1, 2)])
def test_the_first_batch_of_the_rehearsed_shape_compiles_nothing(toys, devices, streams):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  learning = toys.learning("grpo", streams=streams)
  shardings = toys.shardings(learning, mesh)
  plain = updated(toys, learning, make_learner(learning, shardings), mesh)
  expected = to_micro_batches(
      pack([], row_length=32, rows_multiple=4, min_rows=8, min_sequences=16), 4)
  state = abstract_state(learning.decoder, mesh, learning.optimizer,
                         frozen=learning.kept)
  rehearsal = Rehearsal(make_learner(learning, shardings), state, expected, mesh)
  counter = CompileCounter()
  rehearsal.compile()
  rehearsal.compile()  # has begun already
  found = updated(toys, learning, rehearsal.learner, mesh)
  counter.close()
  parts = int(streams > 1)  # programs of their own
  assert [counter.programs[f"jit({name})"] for name in ("_signals", "_update", "_outputs", "_sums")
          ] == [1, 1, parts, parts]
  toys.same_bits(found, plain)


def test_pieces_that_do_not_fit_fail_at_the_rehearsal(toys):
  def two_values(outputs, batch):
    return outputs.logprobs[:, :2], {}
  mesh = toys.one_device()
  learning = toys.learning("sft", terms=[two_values])
  state = abstract_state(learning.decoder, mesh, learning.optimizer)
  learner = make_learner(learning, toys.shardings(learning, mesh))
  with pytest.raises((TypeError, ValueError)):
    Rehearsal(learner, state, pack([], row_length=32, rows_multiple=4), mesh)


def test_a_function_waits_for_what_is_compiled_aside():
  aside, go, order = Aside(), threading.Event(), []
  double = aside.first(lambda x: order.append("called") or 2 * x)

  def compile():
    go.wait(10)
    order.append("compiled")
  aside.compile(compile)
  threading.Timer(0.05, go.set).start()
  assert double(np.float32(3)) == 6
  assert order == ["compiled", "called"]


def test_what_fails_aside_does_not_stop_the_function():
  aside = Aside()

  def fail():
    raise ValueError("out of memory")
  aside.compile(fail)
  assert aside.first(lambda x: x + 1)(1) == 2


class Slow(np.ndarray):
  """An array that is there when it is let go."""

  let_go = threading.Event()

  def block_until_ready(self):
    assert self.let_go.wait(10)
    return self


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_run_while_their_caller_does_something_else(count):
  """All of them are under way when `begin` returns, each in a thread, though not one of them is done. Those of a
  new shape are called one after the other, so that only the first of them compiles; then all at once."""
  mesh, threads, fail = sharding.make_mesh(devices=jax.devices()[:1]), [], []
  calling, together = threading.Lock(), threading.Barrier(count)

  def part(state, batch, index, parts):
    threads.append(threading.current_thread())
    if not batch.ndim and len(threads) > count:
      together.wait(10)
    if index in fail:
      raise ArithmeticError(f"part {index}")
    assert jax.sharding.get_mesh() == mesh
    if batch.ndim:
      assert calling.acquire(blocking=False)
      time.sleep(0.01)
      calling.release()
    return np.asarray(state + batch * index).view(Slow)
  function = streams.SideBySide(part, lambda state, batch, parts: (len(parts), sum(parts)), lambda batch: count, mesh)
  state, batch = np.float32(2), np.float32(10)
  expected = count, sum(2 + 10 * i for i in range(count))
  for _ in range(2):
    Slow.let_go.clear()
    finish = streams.begin(Aside().first(function), state, batch)
    assert len(set(threads)) == count and threading.current_thread() not in threads
    Slow.let_go.set()
    assert finish() == expected
  assert function(state, batch[None]) == expected
  fail.append(count - 1)
  finish = streams.begin(function, state, batch)
  with pytest.raises(ArithmeticError, match=f"part {count - 1}"):
    finish()
  threads.clear()
  fail[:] = range(count)
  with pytest.raises(ArithmeticError, match="part 0"):  # a new shape, which fails once, and at once
    streams.begin(function, state, np.zeros(2))
  assert len(threads) == 1


def test_signals_of_no_frozen_model_are_no_work_to_share(toys):
  mesh = toys.one_device()

  def learner(name):
    learning = toys.learning(name, streams=2)
    return make_learner(learning, toys.shardings(learning, mesh))
  shared = {name: isinstance(learner(name).signals, streams.SideBySide) for name in ("sft", "grpo")}
  assert shared == {"sft": False, "grpo": True}
  assert isinstance(learner("sft").update, streams.SideBySide)


def test_what_has_no_parts_is_begun_by_calling_it():
  calls = []
  finish = streams.begin(lambda x: calls.append(x) or x + 1, 3)
  assert calls == [3] and finish() == 4 and calls == [3]
