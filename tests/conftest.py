"""Eight virtual CPU devices for every test, and the real files where there are any."""

import gc
import os
import pathlib

os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                           + " --xla_force_host_platform_device_count=8").strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("NPROC", "32")  # threads: see sharding.start_distributed
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jax
import pytest

from jaxrl.training import compilation

ROOT = pathlib.Path(__file__).parents[1]
DATA = pathlib.Path(os.environ.get("JAXRL_DATA", ROOT.parent / "shared" / "data"))

# Programs of tests are kept from run to run, apart from the user's own, and workers share them.
# JAX_ENABLE_COMPILATION_CACHE=false does without.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if PROGRAMS := compilation.default_root(os.environ):
  PROGRAMS = PROGRAMS.parent / "test-programs"
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS / compilation.machine_key()))
  if "PYTEST_XDIST_WORKER" not in os.environ:
    compilation.trim(PROGRAMS, compilation.LIMIT)
compilation.use_cache(compilation.OFF, print)

hypothesis.settings.register_profile("jaxrl", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("jaxrl")


MAPS, MOST_MAPS = pathlib.Path("/proc/self/maps"), 25_000


@pytest.fixture(scope="module", autouse=True)
def drop_programs():
  """Forgets compiled programs when they are many, after a module.

  Linux gives a process 65,530 regions of memory, of which each program takes some; a worker that has
  used them up dies of a segmentation fault when it loads the next.
  """
  yield
  if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def real_file():
  """`real_file("gsm8k/train.jsonl")`: a path under JAXRL_DATA; skips where it does not exist."""
  def find(name: str) -> pathlib.Path:
    path = DATA / name
    if not path.exists():
      pytest.skip(f"{path} is not here; set JAXRL_DATA to the directory that holds {name}")
    return path
  return find
