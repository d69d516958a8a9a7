"""Compiled programs: kept on disk, read back, mended; and none after the first updates of a run."""

import gc
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
import zlib

import jax
import pytest

from jaxrl.training import compilation
from jaxrl.training import machine

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
import json, random
from configs import base

def get_config():
  draw = random.Random(0)
  with open("rows.jsonl", "w") as file:
    for _ in range(200):
      digits = "".join(draw.choice("0123456789") for _ in range(draw.randint(3, 14)))
      file.write(json.dumps(dict(question=digits, answer=digits[0])) + chr(10))
  config = base.get_config()
  config.data.update(train="rows.jsonl", max_prompt_tokens=16)
  config.tokenizer.alphabet = "0123456789"
  config.model.update(layers=1, d_model=16, heads=2, kv_heads=1, d_ff=32)
  config.batch.update(row_length=64, micro_batch_rows=2)
  config.rollout.update(prompts=4, episode=dict(name="group", samples=4), max_tokens=32)
  config.checkpoint.every = 0
  config.log.update(samples_every=0, curves_every=0)
  config.phases = ("rl",)
  config.rl = dict(kind="rl", steps=20)
  return config
"""


# The command, with functions that raise if they are called: those that the jitted ones call.
NEVER_TRACED = """
import functools
from jaxrl.sampling import generate
from jaxrl.training import learner

def forbidden(module, name):
  @functools.wraps(getattr(module, name))
  def function(*args, **kwargs):
    raise AssertionError(f"{name} was traced")
  setattr(module, name, function)

for name in ("_forward", "_weighted", "_apply", "_add"):
  forbidden(learner, name)
for name in ("_extend", "_logits"):
  forbidden(generate, name)
from jaxrl.cli import command
command()
"""


def run(place, name, *arguments, code="from jaxrl.cli import command; command()", **environment):
  """A run of the command line on one device -> (what it said, summary, rows of metrics)."""
  if not (place / "varying.py").exists():
    (place / "varying.py").write_text(CONFIG)
    time.sleep(0.2)  # a process keeps no program if one of its files may be newer than itself
  environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "",
                              "JAX_ENABLE_COMPILATION_CACHE": "true", **environment}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # that of tests would come before
  ended = subprocess.run(
      [sys.executable, "-c", code, "run", "--config=varying.py", f"--workdir={name}", "--quiet",
       *arguments], cwd=place, env=environment, capture_output=True, text=True, timeout=900)
  said = ended.stdout + ended.stderr
  assert ended.returncode == 0, said
  rows = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
  return said, json.loads((place / name / "summary.json").read_text()), rows


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """The first run of a user: (directory, summary, rows)."""
  place = tmp_path_factory.mktemp("first")
  said, summary, rows = run(place, "first", XDG_CACHE_HOME=str(place / "cache"))
  assert "compil" not in said
  return place, summary, rows


def test_lengths_that_vary_compile_nothing_after_the_first_updates(first):
  _, _, rows = first
  assert len({row["response_tokens"] for row in rows}) > 10 and len(rows) == 20
  assert len({row["tokens"] for row in rows}) > 10
  assert rows[0]["compilations"] > 0 and rows[0]["compile_seconds"] > 0
  assert [row["compilations"] for row in rows[5:]] == [rows[5]["compilations"]] * 15


def test_a_second_run_reads_every_program_from_disk_even_after_damage(first):
  place, summary, rows = first
  assert 0 < summary["compile"]["count"] and summary["compile"]["from_disk"] == 0
  entries = sorted((place / "cache/jaxrl/programs").rglob("*-cache"))
  assert len(entries) == summary["compile"]["count"]
  os.truncate(entries[0], entries[0].stat().st_size // 2)  # as a kill leaves it
  said, again, same = run(place, "second", XDG_CACHE_HOME=str(place / "cache"))
  assert again["compile"]["count"] - again["compile"]["from_disk"] == 1
  assert "cache" not in said and "Traceback" not in said
  assert [row["loss"] for row in same] == [row["loss"] for row in rows]
  assert zlib.decompress(entries[0].read_bytes())  # and is whole again


def test_a_second_run_traces_neither_updates_nor_sampling_and_computes_the_same_bits(first):
  place, _, rows = first
  kept = {path.name.split("-")[0] for path in (place / "cache/jaxrl/programs").rglob("*-traced")}
  assert kept >= {"_signals", "_update", "prefill", "decode", "_draw_uniforms"}
  _, summary, same = run(place, "untraced", code=NEVER_TRACED, XDG_CACHE_HOME=str(place / "cache"))
  assert summary["compile"]["count"] == summary["compile"]["from_disk"]
  _, _, plain = run(place, "plain", "--config.compilation_cache=off", XDG_CACHE_HOME=str(place / "cache"))
  for name in ("loss", "grad_norm", "response_tokens", "reward"):
    assert [row[name] for row in rows] == [row[name] for row in same] == [row[name] for row in plain]


def test_a_place_that_cannot_be_written_is_reported_and_stops_nothing(tmp_path):
  (tmp_path / "file").touch()
  said, summary, _ = run(tmp_path, "run", "--config.rl.steps=1", "--config.optimizer.warmup_steps=0",
                         f"--config.compilation_cache={tmp_path}/file/programs")
  assert "compiled programs are not kept for the next start" in said
  assert "--config.compilation_cache=DIR" in said
  assert summary["compile"]["from_disk"] == 0


@pytest.fixture
def settings():
  """Lets a test turn the cache on; what it changes in JAX is put back."""
  names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir",
           "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update("jax_enable_compilation_cache", True)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_the_cache_is_the_users_own_unless_the_config_or_jax_names_another(settings, tmp_path):
  home = {"XDG_CACHE_HOME": str(tmp_path / "home")}
  own = compilation.use_cache("", print, home)
  assert own.parent == tmp_path / "home/jaxrl/programs" and own.stat().st_mode & 0o077 == 0
  assert jax.config.jax_compilation_cache_dir == str(own)
  named = compilation.use_cache(str(tmp_path / "named"), print, home)
  assert named == tmp_path / "named"
  given = home | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "given")}
  assert compilation.use_cache("off", print, given) == tmp_path / "given"
  assert compilation.use_cache("off", print, home) is None
  jax.config.update("jax_enable_compilation_cache", False)
  assert compilation.use_cache("", print, home) is None


def test_other_kinds_of_cpu_have_programs_of_their_own(monkeypatch):
  text = "processor : 0\nmodel : 1\nflags : {}\ncpu MHz : {}\n\nprocessor : 1\n"
  keys = []
  for flags, clock in (("sse avx2", 2400), ("sse avx2", 3100), ("sse avx2 avx512f", 2400)):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda _, f=flags, c=clock: text.format(f, c))
    keys.append(compilation.machine_key())
  assert keys[0] == keys[1] != keys[2]


def test_only_entries_that_are_half_written_are_dropped_and_each_is_read_once(tmp_path):
  whole = zlib.compress(bytes(range(256)) * 40)
  for name in ("a", "b", "c"):
    (tmp_path / f"{name}-cache").write_bytes(whole)
  (tmp_path / "b-cache").write_bytes(whole[:-5])
  (tmp_path / "notes.txt").write_text("no entry")
  assert compilation.drop_broken(tmp_path) == ["b-cache"]
  old = (tmp_path / "checked").stat().st_mtime - 10
  (tmp_path / "a-cache").write_bytes(b"seen to be whole before")
  os.utime(tmp_path / "a-cache", (old, old))
  (tmp_path / "c-cache").write_bytes(b"")
  assert compilation.drop_broken(tmp_path) == ["c-cache"]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a-cache", "checked", "notes.txt"]


def test_what_a_killed_process_was_writing_of_a_traced_program_is_dropped_and_what_others_write_is_not(tmp_path):
  for name in (".old-traced", ".new-traced", "old-traced"):
    (tmp_path / name).touch()
    if "old" in name:
      os.utime(tmp_path / name, (1000, 1000))
  assert compilation.drop_broken(tmp_path) == []
  assert sorted(p.name for p in tmp_path.iterdir()) == [".new-traced", "checked", "old-traced"]


def test_programs_that_were_not_used_for_longest_make_room(tmp_path):
  for age, name in enumerate(("now/x-cache", "now/y-traced", "before/z-traced")):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(100))
    os.utime(path, (1000 - age, 500))
  compilation.trim(tmp_path, 300)
  assert len(list(tmp_path.rglob("*-*"))) == 3
  compilation.trim(tmp_path, 250)
  assert sorted(p.name for p in tmp_path.rglob("*-*")) == ["x-cache", "y-traced"]
  compilation.trim(tmp_path, 150)
  assert [p.name for p in tmp_path.rglob("*-*")] == ["x-cache"]
  assert not (tmp_path / "before").exists()


def test_malloc_uses_few_arenas_and_the_environment_comes_first():
  """In processes of their own: what malloc says of itself after sixteen threads have allocated."""
  code = """
import ctypes, re, sys, tempfile, threading
from jaxrl.training import machine
print(machine.limit_arenas(3))
libc = ctypes.CDLL(None)
barrier = threading.Barrier(16)
def allocate():
  libc.malloc(100)
  barrier.wait()
threads = [threading.Thread(target=allocate) for _ in range(16)]
[t.start() for t in threads]
[t.join() for t in threads]
with tempfile.NamedTemporaryFile() as file:
  libc.fopen.restype = ctypes.c_void_p
  stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
  libc.malloc_info(0, stream)
  libc.fclose(stream)
  print(len(re.findall("<heap nr", open(file.name).read())))
"""
  if platform.libc_ver()[0] != "glibc":
    pytest.skip("another C library than glibc")
  for variable, limited in (({}, "True"), ({"MALLOC_ARENA_MAX": "2"}, "False")):
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **variable}, text=True,
                          capture_output=True, check=True)
    told, arenas = done.stdout.split()
    assert told == limited
    assert 1 <= int(arenas) <= 3


@pytest.mark.parametrize("before, meanwhile", [
    ((700, 10, 10), machine.COLLECTIONS), ((10 ** 6, 5, 5), (10 ** 6, *machine.COLLECTIONS[1:])),
    ((0, 10, 10), (0, 10, 10))])  # who looks less often, or not at all, is left alone
def test_collections_are_rare_during_a_run_only(before, meanwhile):
  own = gc.get_threshold()
  try:
    gc.set_threshold(*before)
    with pytest.raises(ArithmeticError), machine.rare_collections():
      assert gc.get_threshold() == meanwhile
      raise ArithmeticError
    assert gc.get_threshold() == before
  finally:
    gc.set_threshold(*own)


def test_what_an_update_frees_is_kept_for_the_next():
  """In processes of their own: page faults of arrays that are made and freed again and again."""
  code = """
import ctypes, resource, threading
from jaxrl.training import machine
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(20):  # the two are more than the 64 MB that glibc makes the arena of a thread of
    blocks = [ctypes.c_void_p(libc.malloc(40 << 20)) for _ in range(2)]
    for block in blocks:
      libc.memset(block, 1, 40 << 20)
    for block in blocks:
      libc.free(block)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def in_thread():
  found = []
  thread = threading.Thread(target=lambda: found.append(faults()))
  thread.start()
  thread.join()
  return found[0]
machine.limit_arenas()
before = in_thread()
print(machine.keep_memory(), before, in_thread())
"""
  if platform.libc_ver()[0] != "glibc":
    pytest.skip("another C library than glibc")
  for variable, could in (({}, "True"), ({"MALLOC_MMAP_MAX_": "100"}, "False")):
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **variable}, text=True,
                          capture_output=True, check=True)
    told, before, after = done.stdout.split()
    assert told == could
    assert (int(after) < 0.2 * int(before)) == (could == "True"), (before, after)


def test_programs_say_the_line_of_an_operation_without_the_calls_that_led_there():
  def stacks():
    return jax.jit(lambda x: x + 1).lower(1.0).as_text(debug_info=True).count("callsite(")
  before = jax.config.jax_include_full_tracebacks_in_locations
  try:
    jax.config.update("jax_include_full_tracebacks_in_locations", True)
    assert stacks()
    compilation.short_locations({"JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS": "1"})
    assert stacks()  # asked for
    compilation.short_locations({})
    assert not stacks()
  finally:
    jax.config.update("jax_include_full_tracebacks_in_locations", before)
