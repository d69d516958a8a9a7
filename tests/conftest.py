"""Eight virtual CPU devices for every test, and the real files where there are any."""

import os
import pathlib

os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                           + " --xla_force_host_platform_device_count=8").strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("NPROC", "32")  # threads: see sharding.start_distributed
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # tests leave the user's own cache alone

import hypothesis
import pytest

ROOT = pathlib.Path(__file__).parents[1]
DATA = pathlib.Path(os.environ.get("JAXRL_DATA", ROOT.parent / "shared" / "data"))

hypothesis.settings.register_profile("jaxrl", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("jaxrl")


@pytest.fixture
def real_file():
  """`real_file("gsm8k/train.jsonl")`: a path under JAXRL_DATA; skips where it does not exist."""
  def find(name: str) -> pathlib.Path:
    path = DATA / name
    if not path.exists():
      pytest.skip(f"{path} is not here; set JAXRL_DATA to the directory that holds {name}")
    return path
  return find
