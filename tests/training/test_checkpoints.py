"""Checkpoints restore exactly what was saved, or say what is wrong; never anything else."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import typing

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.training import hostfile
from jaxrl.training.checkpoints import CheckpointError, Checkpoints


@flax.struct.dataclass
class State:
  step: jax.Array
  params: typing.Any
  optimizer: typing.Any
  key: jax.Array
  extra: typing.Any = None


def make_state(seed=0, width=5):
  rng = np.random.default_rng(seed)
  params = {"dense": {"kernel": jnp.asarray(rng.normal(size=(3, width)), jnp.float32),
                      "bias": jnp.asarray(rng.normal(size=width), jnp.bfloat16)}}
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  return State(
      step=jnp.asarray(seed, jnp.int32), params=params, optimizer=optimizer.init(params),
      key=jax.random.key_data(jax.random.key(seed)),
      extra={"nothing": {}, "none": None, "flag": jnp.asarray([True, False]),
             "empty": jnp.zeros((0, 2)), "python": 2**60 + seed, "rate": 0.1,
             "numpy": np.int64(-2**50), "array": np.arange(3.0),
             "table": jnp.asarray(rng.normal(size=(40, 40)), jnp.float32)})


def abstract(state, sharding=None):
  def leaf(x):
    if not isinstance(x, jax.Array):
      return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding)
  return jax.tree.map(leaf, state)


def bits(tree):
  """Structure, and type, dtype, shape and bytes of every leaf."""
  leaves, structure = jax.tree.flatten(tree)
  return structure, [(type(x).__name__, np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes())
                     for x in leaves]


HOST = {"phase": "sft", "counters": {"tokens": 12345678901, "loss": 0.1},
        "iterator": [1, 2, {"seed": None}]}
BUFFER = {"tokens": np.arange(12, dtype=np.int32).reshape(3, 4),
          "advantages": np.float32([np.nan, -0.0]),
          "half": np.asarray(jnp.arange(3, dtype=jnp.bfloat16)), "mask": np.zeros((0, 3), bool),
          "text": np.array(["a", "é"])}


@pytest.fixture
def reports():
  return []


@pytest.fixture
def open_checkpoints(tmp_path, reports):
  opened = []
  def make(**kwargs):
    opened.append(Checkpoints(tmp_path / "checkpoints", report=reports.append,
                              **{"keep": 3, **kwargs}))
    return opened[-1]
  yield make
  for checkpoints in opened:
    checkpoints.close()


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
  """A directory with steps 1 and 2, to be copied by tests that break it."""
  directory = tmp_path_factory.mktemp("two") / "checkpoints"
  checkpoints = Checkpoints(directory, keep=2)
  for step in (1, 2):
    checkpoints.save(step, make_state(step), {**HOST, "step": step}, BUFFER)
  checkpoints.close()
  return directory


def test_everything_comes_back_bit_for_bit(open_checkpoints):
  state = make_state()
  checkpoints = open_checkpoints()
  assert checkpoints.save(7, state, HOST, BUFFER)
  checkpoints.wait()
  restored = open_checkpoints().restore_latest(abstract(state))
  assert restored.step == 7 and restored.host == HOST
  assert bits(restored.state) == bits(state)
  assert list(restored.buffer) == list(BUFFER) and bits(restored.buffer) == bits(BUFFER)


def test_no_buffer_is_not_an_empty_buffer(open_checkpoints):
  checkpoints, state = open_checkpoints(), {"w": jnp.ones(2)}
  checkpoints.save(1, state, {})
  assert checkpoints.restore_latest(abstract(state)).buffer is None
  checkpoints.save(2, state, {}, {})
  assert checkpoints.restore_latest(abstract(state)).buffer == {}


@pytest.mark.parametrize("state", [{}, {"a": {}, "b": ()}, {"n": 3}])
def test_a_state_without_device_arrays(open_checkpoints, state):
  checkpoints = open_checkpoints()
  checkpoints.save(1, state, {"a": 1})
  assert bits(checkpoints.restore_latest(state).state) == bits(state)


def test_an_empty_directory_has_nothing_to_restore(open_checkpoints):
  checkpoints = open_checkpoints()
  assert checkpoints.restore_latest(abstract(make_state())) is None
  assert checkpoints.latest_step() is None


def test_the_oldest_are_deleted_and_the_newest_restored(open_checkpoints):
  checkpoints = open_checkpoints(keep=2)
  for step in (1, 2, 10):
    checkpoints.save(step, {"w": jnp.full(3, step)}, {})
  checkpoints.wait()
  assert sorted(os.listdir(checkpoints.directory)) == ["10", "2"]
  assert checkpoints.latest_step() == 10
  assert checkpoints.restore_latest({"w": jnp.zeros(3, jnp.int32)}).state["w"].tolist() == [10] * 3


def test_state_may_be_donated_and_the_buffer_overwritten_at_once(open_checkpoints):
  checkpoints = open_checkpoints()
  spoil = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  state, buffer = {"w": jnp.arange(300_000, dtype=jnp.float32)}, {"x": np.arange(1000)}
  for step in range(4):
    expected = np.array(state["w"]), buffer["x"].copy()
    checkpoints.save(step, state, {}, buffer)
    state = {"w": spoil(state["w"]) + step}
    buffer["x"] += 1
    restored = checkpoints.restore_latest(abstract(state))
    np.testing.assert_array_equal(restored.state["w"], expected[0])
    np.testing.assert_array_equal(restored.buffer["x"], expected[1])


def test_a_step_is_saved_once_unless_forced(open_checkpoints):
  checkpoints, state = open_checkpoints(), {"w": jnp.ones(2)}
  assert checkpoints.save(5, state, {"version": 1})
  assert not checkpoints.save(5, state, {"version": 2})
  assert checkpoints.restore_latest(abstract(state)).host == {"version": 1}
  assert checkpoints.save(5, state, {"version": 3}, force=True)
  assert checkpoints.restore_latest(abstract(state)).host == {"version": 3}
  assert os.listdir(checkpoints.directory) == ["5"]


def test_an_interrupted_replacement_leaves_the_old_version(open_checkpoints):
  checkpoints, state = open_checkpoints(), {"w": jnp.ones(2)}
  checkpoints.save(5, state, {"version": 1})
  checkpoints.wait()
  (checkpoints.directory / "5").rename(checkpoints.directory / "5.replaced")
  (checkpoints.directory / "5.orbax-checkpoint-tmp").mkdir()  # what a killed save leaves
  again = open_checkpoints()
  assert again.restore_latest(abstract(state)).host == {"version": 1}
  assert os.listdir(again.directory) == ["5"]


def files_of_a_checkpoint(directory):
  return sorted(p.relative_to(directory) for p in directory.rglob("*") if p.is_file())


def break_file(path, how):
  content = bytearray(path.read_bytes())
  if how == "missing":
    path.unlink()
  elif how == "empty":
    path.write_bytes(b"")
  elif how == "truncated":
    path.write_bytes(content[:len(content) // 2])
  elif how == "flipped":
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)
  else:
    path.write_bytes(np.random.default_rng(0).bytes(len(content)))


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "flipped", "garbled"])
def test_no_broken_file_restores_to_wrong_values(two_saves, tmp_path, how):
  """Whichever file is broken, the newest checkpoint restores exactly or the one before does."""
  expected = {step: bits(make_state(step)) for step in (1, 2)}
  fell_back = set()
  files = files_of_a_checkpoint(two_saves / "2")
  assert len(files) > 5
  for index, name in enumerate(files):
    directory, lines = tmp_path / str(index), []
    shutil.copytree(two_saves, directory)
    break_file(directory / "2" / name, how)
    checkpoints = Checkpoints(directory, report=lines.append)
    restored = checkpoints.restore_latest(abstract(make_state()))
    assert bits(restored.state) == expected[restored.step], name
    assert restored.host == {**HOST, "step": restored.step}
    assert bits(restored.buffer) == bits(BUFFER)
    if restored.step == 1:
      fell_back.add(name.parts[0])
      assert len(lines) == 1 and "step 2 is damaged" in lines[0] and "back to step 1" in lines[0]
      assert "\n" not in lines[0]
      checkpoints.save(2, restored.state, {"saved": "again"})  # no collision with the damaged one
      assert checkpoints.restore_latest(abstract(make_state())).host == {"saved": "again"}
      assert (directory / "2.damaged").is_dir()
    else:
      assert not lines
    checkpoints.close()
  assert {"host", "state"} <= fell_back


def test_values_written_wrongly_by_the_storage_itself_are_noticed(two_saves, tmp_path, monkeypatch):
  """Damage that every checksum of the storage format misses still meets the fingerprint."""
  shutil.copytree(two_saves, tmp_path / "c")
  lines = []
  checkpoints = Checkpoints(tmp_path / "c", report=lines.append)
  genuine = checkpoints._restore_arrays
  def one_ulp_off(step, leaves):
    values = genuine(step, leaves)
    if step == 2:
      path = ("params", "dense", "kernel")
      values[path] = jnp.asarray(np.nextafter(np.asarray(values[path]), np.float32(9)))
    return values
  monkeypatch.setattr(checkpoints, "_restore_arrays", one_ulp_off)
  assert checkpoints.restore_latest(abstract(make_state())).step == 1
  assert "params/dense/kernel" in lines[0]
  checkpoints.close()


def test_a_damaged_checkpoint_costs_one_line_on_the_terminal(two_saves, tmp_path):
  shutil.copytree(two_saves, tmp_path / "c")
  for path in (tmp_path / "c" / "2" / "state" / "d").iterdir():
    path.write_bytes(b"")
  process = start("""
      import sys
      from jaxrl.training.checkpoints import Checkpoints
      sys.path.insert(0, sys.argv[2])
      from test_checkpoints import abstract, make_state
      checkpoints = Checkpoints(sys.argv[1])
      checkpoints.restore_latest(abstract(make_state()))
      checkpoints.close()
  """, tmp_path / "c")
  out, err = process.communicate(timeout=120)
  assert err == "" and process.returncode == 0
  assert out.count("\n") == 1 and out.startswith("checkpoint of step 2 is damaged")


def test_all_damaged_is_an_error_also_the_second_time(two_saves, tmp_path, capfd):
  shutil.copytree(two_saves, tmp_path / "c")
  for step in (1, 2):
    shutil.rmtree(tmp_path / "c" / str(step) / "state")
  for _ in range(2):
    checkpoints = Checkpoints(tmp_path / "c", report=print)
    with pytest.raises(CheckpointError, match=r"1\.damaged.*2\.damaged(.|\n)*delete .* --workdir"):
      checkpoints.restore_latest(abstract(make_state()))
    checkpoints.close()
  out, err = capfd.readouterr()
  assert len(out.splitlines()) == 2 and err == ""


def test_another_model_is_not_damage(two_saves, tmp_path, reports):
  shutil.copytree(two_saves, tmp_path / "c")
  checkpoints = Checkpoints(tmp_path / "c", report=reports.append)
  with pytest.raises(CheckpointError) as caught:
    checkpoints.restore_latest(abstract(make_state(width=6)))
  message = str(caught.value)
  assert "params/dense/kernel: float32[3,5] in the checkpoint, float32[3,6] now" in message
  assert "--workdir" in message
  state = make_state()
  with pytest.raises(CheckpointError, match=r"extra/added: absent in the checkpoint, float32\[2\]"):
    checkpoints.restore_latest(state.replace(extra={**state.extra, "added": jnp.zeros(2)}))
  assert reports == [] and checkpoints.latest_step() == 2
  checkpoints.close()


def test_running_out_of_memory_is_not_damage(two_saves, tmp_path, reports, monkeypatch):
  shutil.copytree(two_saves, tmp_path / "c")
  checkpoints = Checkpoints(tmp_path / "c", report=reports.append)
  def full(*_):
    raise ValueError("RESOURCE_EXHAUSTED: out of memory")
  monkeypatch.setattr(checkpoints, "_restore_arrays", full)
  with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED"):
    checkpoints.restore_latest(abstract(make_state()))
  assert checkpoints.latest_step() == 2 and reports == []
  checkpoints.close()


def test_a_full_disk_is_named_and_costs_no_earlier_checkpoint(open_checkpoints):
  checkpoints = open_checkpoints(keep=1)
  state = {"w": jax.random.normal(jax.random.key(0), (100_000,))}  # 400 kB that do not compress
  checkpoints.save(1, state, {"n": 1})
  checkpoints.wait()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond 100 kB
  try:
    with pytest.raises(CheckpointError, match=r"step 2 could not be written(.|\n)*is of step 1"):
      checkpoints.save(2, state, {"n": 2})
      checkpoints.wait()
    with pytest.raises(CheckpointError, match=r"step 1 could not be written(.|\n)*is of step 1"):
      checkpoints.save(1, state, {"n": 3}, force=True)
      checkpoints.wait()
    with pytest.raises(CheckpointError, match=r"step 3 could not be written"):
      checkpoints.save(3, {}, {}, {"tokens": np.zeros(100_000, np.int32)})
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert checkpoints.restore_latest(abstract(state)).host == {"n": 1}
  checkpoints.save(2, state, {"n": 2})  # space was made
  assert checkpoints.restore_latest(abstract(state)).host == {"n": 2}
  assert os.listdir(checkpoints.directory) == ["2"]


@pytest.mark.parametrize("limit", [300, 3_000, 30_000])
def test_the_reason_of_the_system_is_said_whatever_could_not_be_written(open_checkpoints, limit):
  """Limits of a file at which its metadata, an array's, or an array itself does not fit."""
  checkpoints = open_checkpoints()
  state = {f"w{i}": jax.random.normal(jax.random.key(i), (256, 64)) for i in range(20)}
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
  try:
    with pytest.raises(CheckpointError, match="File too large"):
      checkpoints.save(1, state, {"n": 1})
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("host, place", [
    ({"a": [1, {"b": b"bytes"}]}, r"host\['a'\]\[1\]\['b'\] is a bytes"),
    ({"a": {1: 2}}, r"host\['a'\] has the key 1"),
    ({"a": np.zeros(2)}, r"host\['a'\] is a ndarray")])
def test_what_json_cannot_hold_is_refused_by_name(open_checkpoints, host, place):
  checkpoints = open_checkpoints()
  with pytest.raises(TypeError, match=place):
    checkpoints.save(1, {}, host)
  assert checkpoints.latest_step() is None


def test_a_refused_save_keeps_the_version_it_would_have_replaced(open_checkpoints):
  checkpoints = open_checkpoints()
  checkpoints.save(1, {}, {"n": 1})
  with pytest.raises(TypeError, match="buffer/x"):
    checkpoints.save(1, {}, {}, {"x": np.array([{}])}, force=True)
  with pytest.raises(TypeError, match="key is a typed PRNG key"):
    checkpoints.save(1, {"key": jax.random.key(0)}, {}, force=True)
  assert checkpoints.restore_latest({}).host == {"n": 1}


def test_numbers_in_the_host_record_are_exact():
  record = {"a": np.float64(0.1), "b": np.float32(0.1), "c": np.int64(2**62),
            "d": (1, np.bool_(True)), "e": [float("inf"), -0.0], "f": 2**70, "g": "é\u2028"}
  plain = json.loads(json.dumps(hostfile.plain(record)))
  assert plain == {"a": 0.1, "b": float(np.float32(0.1)), "c": 2**62, "d": [1, True],
                   "e": [float("inf"), -0.0], "f": 2**70, "g": "é\u2028"}


SHARDED = """
    import os, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from jaxrl.training.checkpoints import Checkpoints
    devices = np.array(jax.devices())
    values = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    saving = NamedSharding(Mesh(devices.reshape(4, 2), ("a", "b")), P("a", "b"))
    checkpoints = Checkpoints(sys.argv[1])
    checkpoints.save(1, {"w": jax.device_put(values, saving), "n": jnp.asarray(3)}, {})
    for mesh, spec in (((2, 4), P("a", None)), ((8, 1), P("a")), ((1, 8), P())):
      sharding = NamedSharding(Mesh(devices.reshape(mesh), ("a", "b")), spec)
      state = checkpoints.restore_latest(lambda host: {
          "w": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=sharding),
          "n": jax.ShapeDtypeStruct((), jnp.int32)}).state
      assert state["w"].sharding == sharding and int(state["n"]) == 3
      np.testing.assert_array_equal(state["w"], values)
    checkpoints.close()
    print("same on all meshes")
"""


KILLED = """
    import itertools, sys
    import jax.numpy as jnp, numpy as np
    from jaxrl.training.checkpoints import Checkpoints
    checkpoints = Checkpoints(sys.argv[1])
    restored = checkpoints.restore_latest({"w": jnp.zeros((50, 1000), jnp.int32)})
    if restored:
      assert np.all(restored.state["w"] == restored.step) and restored.host == {"n": restored.step}
      assert np.all(restored.buffer["b"] == restored.step)
    first = restored.step + 1 if restored else 0
    print("from", first, flush=True)
    for n in itertools.count(first):
      checkpoints.save(n, {"w": jnp.full((50, 1000), n)}, {"n": n}, {"b": np.full(1000, n)})
      print(n, flush=True)
"""


def start(script, directory):
  env = {**os.environ, "JAX_PLATFORMS": "cpu",
         "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
  return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(directory),
                           os.path.dirname(__file__)], env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_restores_onto_another_mesh(tmp_path):
  process = start(SHARDED, tmp_path / "c")
  out, err = process.communicate(timeout=120)
  assert out == "same on all meshes\n" and process.returncode == 0, err


def test_survives_kill_nine_while_saving(tmp_path):
  """Killed in the middle of a stream of saves, it continues from the last or the last but one."""
  last = -1
  for lines in (3, 10, 5):
    process = start(KILLED, tmp_path / "c")
    first = process.stdout.readline()
    assert first.startswith("from "), process.stderr.read()
    assert last - 1 <= int(first.split()[1]) - 1 <= last + 1  # the kill may outrun the last print
    for _ in range(lines):
      last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    last = int(rest.split()[-1]) if rest.split() else last
