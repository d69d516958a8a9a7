"""Programs that are kept as they were traced: the same results without the function, never a stale one."""

import collections
import functools
import gc
import os
import pickle
import sys
import threading
import types
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import digests
from jaxrl import programs

HOUR = 3600 * 10**9
traced = []  # names of functions, whenever their Python runs


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A directory that programs are kept in, as where one device is all there is."""
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  monkeypatch.setattr(digests, "HOMES", (*digests.HOMES, __name__.split(".")[0]))
  monkeypatch.setattr(programs, "_STARTED", programs._STARTED + HOUR)  # files of a fresh checkout are old
  # Other tests have loaded modules whose files come and go.
  loaded, ours = programs._loaded, (*digests.HOMES, "piece", "other")
  monkeypatch.setattr(programs, "_loaded", lambda: {
      name: file for name, file in loaded().items() if name.split(".")[0] in ours})
  traced.clear()
  with programs.kept_in(tmp_path):
    yield tmp_path


def kept(place):
  return sorted(path.name.split("-")[0] for path in place.glob(f"*{programs.SUFFIX}"))


def step(state, x, *, power=1):
  traced.append("step")
  more = {"weak": 2 * x.sum() ** power, "none": None, "number": 1.5}
  return {"a": state["a"] + x, "b": state["b"] * x.astype(state["b"].dtype)}, more


def arguments(n=3):
  return {"a": jnp.arange(n, dtype=jnp.float32), "b": jnp.ones(n, jnp.bfloat16)}, jnp.full(n, 0.5)


def same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert one.dtype == jnp.result_type(other) and not one.weak_type
    np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_a_program_is_traced_once_whatever_process_needs_it(place):
  expected = step(*arguments(), power=2)
  traced.clear()
  for _ in range(3):  # a new object is as good as a new process: it remembers nothing
    count = collections.Counter()
    function = programs.jit(step, static_argnames=("power",), count=count, donate_argnums=0)
    for _ in range(2):
      state, x = arguments()
      found = function(state, x, power=2)
      assert state["a"].is_deleted()
      same(found, expected)
    assert count == {"step": 1}
  assert traced == ["step"] and kept(place) == ["step"]


def boxed(x, power):
  traced.append("boxed")
  return {"kernel": nn.LogicallyPartitioned(jnp.outer(x, x) ** power, ("embed", None)), "scale": (x, 1.0)}


def test_a_module_beside_the_package_is_not_part_of_it(monkeypatch):
  before = programs._surroundings()
  module = types.ModuleType("jaxrl_pieces")
  module.__file__ = os.path.dirname(os.path.dirname(programs.__file__)) + "/jaxrl_pieces.py"
  monkeypatch.setitem(sys.modules, "jaxrl_pieces", module)
  assert programs._surroundings() != before


@pytest.mark.parametrize("kind", ["scalar", "batched", "number"])
def test_shapes_are_those_of_the_function_that_was_given(place, kind):
  """`jax.vmap` and others say of themselves that they are the function they were made of."""
  def total(x):
    return jnp.sum(x)
  function, x = {"scalar": (total, jnp.ones(3)), "batched": (jax.vmap(total), jnp.ones((3, 2))),
                 "number": (total, 3.0)}[kind]
  programs.eval_shape(total, jnp.ones((3, 2)))
  for _ in range(2):
    assert programs.eval_shape(function, x) == jax.eval_shape(function, x)


@pytest.mark.parametrize("jit", [jax.jit, lambda function: function])
def test_shapes_are_traced_once_too_and_keep_their_boxes(place, jit):
  x = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
  expected = jax.eval_shape(functools.partial(boxed, power=2), x)
  traced.clear()
  for _ in range(3):
    found = programs.eval_shape(jit(functools.partial(boxed, power=2)), x)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.leaves(found) == jax.tree.leaves(expected)
    assert nn.get_partition_spec(found) == nn.get_partition_spec(expected)
  assert traced == ["boxed"] and kept(place) == ["shape_of_boxed"]
  longer = jax.ShapeDtypeStruct((4,), x.dtype)
  assert programs.eval_shape(jit(functools.partial(boxed, power=2)), longer)["kernel"].value.shape == (4, 4)
  programs.eval_shape(jit(functools.partial(boxed, power=3)), x)
  assert traced == 3 * ["boxed"] and kept(place) == 3 * ["shape_of_boxed"]


def test_shapes_of_what_has_no_digest_are_traced_every_time(place):
  lock, x = threading.Lock(), jax.ShapeDtypeStruct((3,), jnp.float32)
  for _ in range(2):
    assert programs.eval_shape(lambda x: (traced.append(lock), x)[1], x) == x
  assert traced == [lock, lock] and kept(place) == []


@pytest.mark.parametrize("change", ["shape", "dtype", "weak", "static", "structure", "function", "config",
                                    "variable", "path", "module"])
def test_another_program_is_traced(place, change, monkeypatch):
  programs.jit(step)(*arguments())
  function, (state, x), options, static = step, arguments(4 if change == "shape" else 3), {}, {}
  if change == "dtype":
    x = x.astype(jnp.float16)
  if change == "weak":
    x = 0.5
    programs.jit(step)(state, jnp.float32(x))
  if change == "static":
    options, static = {"static_argnames": ("power",)}, {"power": 2}
  if change == "structure":
    state = collections.OrderedDict(state)
  if change == "function":
    def function(state, x):
      return step(state, x, power=3)
    function.__name__ = "step"
  if change == "variable":
    monkeypatch.setenv("FLAX_FIX_RNG_SEPARATOR", "1")
  if change == "path":
    monkeypatch.syspath_prepend(str(place))
  if change == "module":  # which may have changed some of ours
    monkeypatch.setitem(sys.modules, "other", types.ModuleType("other"))
    sys.modules["other"].__file__ = __file__
  before, files = traced.copy(), kept(place)
  with jax.default_matmul_precision("highest" if change == "config" else None):
    programs.jit(function, **options)(state, x, **static)
  assert traced == before + ["step"] and kept(place) == files + ["step"]


def test_trace_and_lower_are_those_of_what_runs(place):
  for _ in range(2):
    function = programs.jit(step)
    found = function.trace(*jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments()))
    assert found.out_info[1]["weak"].shape == () and found.out_info[1]["none"] is None
    same(function.lower(*arguments()).compile()(*arguments()), step(*arguments()))
  assert "jit_step" in function.lower(*arguments()).as_text()


def test_a_change_of_any_module_that_was_loaded_is_believed_to_matter(place, tmp_path, monkeypatch):
  source = tmp_path / "piece.py"
  source.write_text("FACTOR = 2\n")
  module = types.ModuleType("piece")
  module.__file__ = str(source)
  monkeypatch.setitem(sys.modules, "piece", module)

  def start():
    traced.clear()
    with programs.kept_in(place):
      programs.jit(step)(*arguments())
    return traced.copy()
  assert start() == ["step"] and start() == []
  old = source.stat()
  source.write_text("FACTOR = 3\n")
  os.utime(source, ns=(old.st_atime_ns, old.st_mtime_ns))  # as archives and copies keep it
  assert start() == ["step"] and start() == []
  source.unlink()
  assert start() == ["step"] and start() == ["step"]


def test_files_that_changed_since_the_process_began_may_not_be_those_it_has_loaded(place, monkeypatch):
  newest = max(max(programs._state_of(file)[1:]) for file in programs._loaded().values())
  monkeypatch.setattr(programs, "_STARTED", newest - 1)
  programs.jit(step)(*arguments())
  assert kept(place) == []
  monkeypatch.setattr(programs, "_STARTED", newest)
  programs.jit(step)(*arguments())
  assert kept(place) == ["step"]


@pytest.mark.parametrize("damage", ["half", "empty", "other", "before", "text"])
def test_a_file_that_cannot_be_read_is_written_anew(place, damage):
  programs.jit(step)(*arguments())
  file, = place.glob("*")
  whole = file.read_bytes()
  file.write_bytes({"half": whole[:len(whole) // 2], "empty": b"", "text": b"no program",
                    "other": zlib.compress(pickle.dumps(({}, (b"", (0,))))),
                    "before": zlib.compress(pickle.dumps(({}, (0,), b"")))}[damage])
  same(programs.jit(step)(*arguments()), step(*arguments()))
  traced.clear()
  same(programs.jit(step)(*arguments()), jax.jit(lambda *args: step(*args))(*arguments()))
  assert traced == ["step"]  # that of `jax.jit`


def test_a_place_that_takes_nothing_stops_nothing(place):
  (place / "file").touch()
  with programs.kept_in(place / "file"):
    same(programs.jit(step)(*arguments()), step(*arguments()))


def test_what_is_not_ours_or_cannot_be_exported_is_traced_every_time(place):
  def calls_back(x):
    traced.append("calls_back")
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
  elsewhere = types.FunctionType(step.__code__, globals() | {"__name__": "elsewhere"}, "step")
  elsewhere.__module__ = "elsewhere"
  for _ in range(2):
    np.testing.assert_allclose(programs.jit(calls_back)(jnp.ones(2)), np.sin(np.ones(2)), rtol=1e-6)
    programs.jit(elsewhere, static_argnames=("power",))(*arguments(), power=1)
  # Of what cannot be exported, this is kept: nobody tries again.
  assert traced == ["calls_back", "calls_back", "step", "calls_back", "step"]
  assert kept(place) == ["calls_back"]


def test_modules_that_are_loaded_meanwhile_do_not_matter(monkeypatch):
  """Python 3.11 collects garbage, and so changes threads, between any two objects that are made."""
  monkeypatch.setattr(sys, "modules", sys.modules.copy())
  added = []

  def load(*_):
    added.append(f"loaded{len(added)}")
    sys.modules[added[-1]] = types.ModuleType(added[-1])
  thresholds = gc.get_threshold()
  gc.callbacks.append(load)
  gc.set_threshold(1)
  try:
    assert programs._loaded()["jaxrl.programs"] == programs.__file__
  finally:
    gc.set_threshold(*thresholds)
    gc.callbacks.remove(load)
  assert added


def test_modules_of_the_same_name_from_another_place_are_not_confused(place, tmp_path, monkeypatch):
  module = types.ModuleType("optax.more")  # installed, so that its place is not part of the digest
  monkeypatch.setattr(programs, "INSTALLED", (*programs.INSTALLED, str(tmp_path)))
  monkeypatch.setitem(sys.modules, "optax.more", module)
  for name in ("one", "other"):
    (tmp_path / f"{name}.py").touch()
  for name, expected in (("one", ["step"]), ("one", []), ("other", ["step"])):
    module.__file__ = str(tmp_path / f"{name}.py")
    traced.clear()
    with programs.kept_in(place):
      programs.jit(step)(*arguments())
    assert traced == expected


def test_who_looks_for_nan_or_at_arrays_gets_the_function_itself(place):
  for name in ("jax_debug_nans", "jax_debug_infs", "jax_disable_jit"):
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
      programs.jit(step)(*arguments())
    finally:
      jax.config.update(name, before)
  assert kept(place) == []


def test_mistakes_in_a_function_are_raised_as_they_are(place):
  with pytest.raises(TypeError, match="add got incompatible shapes"):
    programs.jit(step)(arguments(4)[0], arguments(3)[1])
  assert kept(place) == []


def test_without_a_place_or_with_several_devices_nothing_is_kept(tmp_path, monkeypatch):
  monkeypatch.setattr(digests, "HOMES", (*digests.HOMES, __name__.split(".")[0]))
  same(programs.jit(step)(*arguments()), step(*arguments()))
  with programs.kept_in(tmp_path):  # tests have eight devices
    same(programs.jit(step)(*arguments()), step(*arguments()))
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  with programs.kept_in(tmp_path):
    pass
  programs.jit(step)(*arguments())
  assert kept(tmp_path) == []
