"""What a run leaves behind is complete, strict and survives kills and restarts."""

import io
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import textwrap

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from jaxrl.training import jsonl
from jaxrl.training.machine import CompileCounter, peak_memory
from jaxrl.training.reporting import Reporter, file_name


def strict(text):
  """JSON as other languages read it: no NaN, no Infinity."""
  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")
  return json.loads(text, parse_constant=refuse)


def rows_of(path):
  return [strict(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


def events_of(directory):
  """(tag, step) -> value, by hand from the records: length, checksum, event, checksum."""
  found, purged = {}, []
  for path in sorted(directory.iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12:12 + length])
      data = data[16 + length:]
      if event.session_log.status == 1:
        purged.append(event.step)
      for value in event.summary.value:
        found[value.tag, event.step] = value.simple_value
  return found, purged


@pytest.fixture
def open_reporter(tmp_path):
  def make(**kwargs):
    return Reporter(tmp_path / "run", **{"stream": io.StringIO(), **kwargs})
  return make


def test_a_run_leaves_everything_behind(open_reporter, tmp_path):
  with open_reporter() as reporter:
    reporter.config({"a": {"b": (1, 2.5, None)}})
    reporter.rewind(0)
    reporter.evaluation("start", {"greedy_accuracy": np.float32(0.1)})
    reporter.start_phase("rl", "rl", 3)
    for step in (1, 2, 3):
      reporter.samples("rl", step, [{"prompt": "1+1=", "completion": "3", "criteria": {"ok": 0.0},
                                     "reward": 0.0, "advantage": np.float32(-0.5)}])
      reporter.step(step, "rl", {"loss": jnp.float32(1 / step), "reward": float("nan")})
    reporter.end_phase()
    content = reporter.finish({"phases": [{"name": "rl", "kind": "rl", "seconds": 1.0,
                                           "before": {"greedy_accuracy": 0.1}, "after": {}}]})
    said = reporter.terminal._stream.getvalue()
  run = tmp_path / "run"
  assert sorted(os.listdir(run)) == ["config.json", "curves.png", "metrics.jsonl", "samples",
                                     "summary.json", "tensorboard"]
  assert strict((run / "config.json").read_text()) == {"a": {"b": [1, 2.5, None]}}
  rows = rows_of(run / "metrics.jsonl")
  for key in ("compilations", "compile_seconds"):
    assert [row.pop(key, None) is None for row in rows] == [True, False, False, False]
  assert rows == [
      {"step": 0, "phase": "start", "evaluation": True, "greedy_accuracy": 0.1},
      {"step": 1, "phase": "rl", "loss": 1.0, "reward": "NaN"},
      {"step": 2, "phase": "rl", "loss": 0.5, "reward": "NaN"},
      {"step": 3, "phase": "rl", "loss": 0.3333333, "reward": "NaN"}]
  assert len(rows_of(run / "samples" / "rl.jsonl")) == 3
  assert rows_of(run / "samples" / "rl.jsonl")[0] == {
      "step": 1, "phase": "rl", "prompt": "1+1=", "completion": "3", "criteria": {"ok": 0.0},
      "reward": 0.0, "advantage": -0.5}
  summary = strict((run / "summary.json").read_text())
  assert summary == content
  assert summary["phases"][0]["before"] == {"greedy_accuracy": 0.1}
  assert summary["versions"]["jax"] == jax.__version__
  assert summary["device"]["count"] == jax.device_count()
  assert summary["peak_memory"]["host_mb"] > 10 and summary["total_seconds"] > 0
  events = events_of(run / "tensorboard")[0]
  assert {k: v for k, v in events.items() if "/compil" not in k[0]} == {
      ("evaluation/greedy_accuracy", 0): pytest.approx(0.1), ("rl/loss", 1): 1.0,
      ("rl/loss", 2): 0.5, ("rl/loss", 3): pytest.approx(1 / 3)}
  assert "near 0 is expected on-policy" in said and str(run / "curves.png") in said


def test_after_a_restart_no_step_is_there_twice(open_reporter, tmp_path):
  run = tmp_path / "run"
  first = open_reporter()  # never closed: killed
  first.start_phase("sft", "sft", 9)
  for step in range(1, 7):
    first.samples("sft", step, [{"prompt": "p", "completion": str(step)}])
    first.step(step, "sft", {"loss": step})
  first._events.flush()
  with open(run / "metrics.jsonl", "ab") as file:
    file.write(b'{"step": 7, "ph')
  with open_reporter() as second:
    second.rewind(4)
    second.start_phase("sft", "sft", 9, done=4)
    for step in range(5, 8):
      second.samples("sft", step, [{"prompt": "p", "completion": str(step)}])
      second.step(step, "sft", {"loss": step * 10})
  assert [(row["step"], row["loss"]) for row in rows_of(run / "metrics.jsonl")] == [
      (1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60), (7, 70)]
  assert [row["step"] for row in rows_of(run / "samples" / "sft.jsonl")] == list(range(1, 8))
  assert 5 in events_of(run / "tensorboard")[1]  # TensorBoard drops what came from step 5 on


def test_an_evaluation_that_is_repeated_after_a_restart_replaces_the_first(open_reporter, tmp_path):
  with open_reporter() as reporter:
    reporter.step(1, "sft", {"loss": 1.0})
    reporter.evaluation("sft", {"greedy_accuracy": 0.5})
  with open_reporter() as reporter:
    reporter.rewind(1)
    reporter.evaluation("sft", {"greedy_accuracy": 0.5})
  rows = rows_of(tmp_path / "run" / "metrics.jsonl")
  assert [row.get("evaluation") for row in rows] == [None, True]


def test_other_processes_write_and_say_nothing(open_reporter, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with open_reporter(stream=None) as reporter:
    reporter.config({})
    reporter.rewind(0)
    reporter.start_phase("rl", "rl", 1)
    reporter.step(1, "rl", {})
    reporter.samples("rl", 1, [{}])
    reporter.evaluation("rl", {})
    reporter.note("hello")
    reporter.end_phase()
    assert reporter.finish({"phases": []})["phases"] == []
  assert not (tmp_path / "run").exists()


def test_a_picture_that_cannot_be_drawn_stops_nothing(open_reporter, tmp_path):
  with open_reporter() as reporter:
    (tmp_path / "run" / "curves.png").mkdir()
    reporter.draw()
    assert "curves.png was not drawn" in reporter.terminal._stream.getvalue()


def test_a_full_disk_is_named(tmp_path):
  file = jsonl.JsonLines(tmp_path / "full.jsonl")
  file.path.symlink_to("/dev/full")
  with pytest.raises(OSError, match="full.jsonl.*Make room"):
    file.append({"a": "x" * 100_000})


def test_tables_of_samples_are_rare_and_files_complete(open_reporter, tmp_path):
  now = [0.0]
  with open_reporter(clock=lambda: now[0]) as reporter:
    for phase in ("a", "b"):
      reporter.start_phase(phase, "rl", 100)
      for step in range(1, 101):
        now[0] += 1.0
        reporter.samples(phase, step, [{"prompt": "p", "completion": "c"}] * 2)
    tables = reporter.terminal._stream.getvalue().count("samples at step")
  assert tables == 2 * 4
  assert len(rows_of(tmp_path / "run" / "samples" / "b.jsonl")) == 200


KILLED = """
    import io, itertools, sys
    from jaxrl.training.reporting import Reporter
    reporter = Reporter(sys.argv[1], quiet=True, stream=io.StringIO())
    reporter.start_phase("sft", "sft", 0)
    for step in itertools.count(1):
      reporter.step(step, "sft", {"loss": 1.0})
      print(step, flush=True)
"""


def test_kill_nine_loses_no_step_that_was_reported(tmp_path):
  process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "run")],
                             stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "JAX_PLATFORMS": "cpu"})
  for _ in range(50):
    process.stdout.readline()
  process.send_signal(signal.SIGKILL)
  process.communicate(timeout=60)
  steps = [row["step"] for row in jsonl.read(tmp_path / "run" / "metrics.jsonl")]
  assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 50


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=3), max_size=4),
       st.integers(0, 400))
def test_whatever_is_cut_off_a_file_the_whole_lines_before_it_are_read(tmp_path_factory, rows, cut):
  path = tmp_path_factory.mktemp("lines") / "a.jsonl"
  file = jsonl.JsonLines(path)
  file.extend(rows)
  file.close()
  data = path.read_bytes()
  kept = data[:max(0, len(data) - cut)]
  path.write_bytes(kept)
  file.append({"next": 1})
  file.close()
  lines = path.read_bytes().split(b"\n")
  assert lines.pop() == b"" and len(lines) == kept.count(b"\n") + 1
  assert [strict(line) for line in lines] == jsonl.read(path)
  assert jsonl.read(path)[:-1] == [strict(jsonl.encode(row)) for row in rows][:kept.count(b"\n")]


def test_a_torn_line_longer_than_a_block_is_cut(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
  jsonl.cut_torn_line(path)
  assert path.read_bytes() == b'{"a": 1}\n'
  path.write_bytes(b"x" * 200_000)
  jsonl.cut_torn_line(path)
  assert path.read_bytes() == b""


@settings(max_examples=25, deadline=None)
@given(st.floats(width=32))
def test_a_float32_metric_is_read_back_to_seven_digits(value):
  row = strict(jsonl.encode({"x": np.float32(value)}))
  np.testing.assert_allclose(jsonl.number(row["x"]), value, rtol=5.1e-7)


@pytest.mark.parametrize("phase, name", [("sft", "sft"), ("a/../b", "a_.._b"), ("..", "phase"),
                                         ("é 1", "é_1"), ("", "phase")])
def test_a_phase_names_a_file_in_its_own_directory(phase, name):
  assert file_name(phase) == name


def test_compilations_are_counted_once_each_and_only_while_open():
  counter, other = CompileCounter(), CompileCounter()
  double = jax.jit(lambda x: 2 * x + 0.125)
  x, y = np.ones(3, np.float32), np.ones(4, np.float32)
  before = counter.count
  double(x).block_until_ready()
  assert counter.count == before + 1 and counter.seconds > 0
  double(x).block_until_ready()
  assert counter.count == before + 1
  double(y).block_until_ready()
  assert counter.count == other.count == before + 2
  counter.close()
  counter.close()
  jax.jit(lambda x: x - 0.375)(x).block_until_ready()
  assert counter.count == before + 2 and other.count == before + 3
  other.close()


def test_peak_memory_grows_with_what_is_held():
  """In a process of its own: this one may have held more than it does."""
  program = """
import numpy as np
from jaxrl.training.machine import peak_memory
before = peak_memory()["host_mb"]
held = np.ones(50_000_000)
grown = peak_memory()["host_mb"] - before
del held
print(grown, peak_memory()["host_mb"] - before)
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  grown, after = map(float, done.stdout.split())
  assert 350 < grown < 500  # 400 MB
  assert abs(after - grown) < 5  # it stays, up to what Linux has not yet counted of each core
