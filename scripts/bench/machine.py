"""This machine: its name, whether it is quiet, how fast it multiplies matrices and moves memory.

`python machine.py` measures the limits with whichever of NumPy, JAX and PyTorch are at hand and
prints them as one line of JSON.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import json
import os
import platform
import time

import numpy as np
from peers import common

SIDE = 2048  # of the matrices
MEGABYTES = (2, 8, 32, 128, 512)  # of memory in use while bandwidth is measured
SECONDS = 0.5  # for each figure


def cores() -> int:
  """CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def name() -> str:
  """Processor, cores and memory in one line."""
  model = platform.processor() or platform.machine()
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
  try:
    with open("/proc/cpuinfo") as file:
      model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
  except (OSError, StopIteration):
    pass
  return f"{model}, {cores()} cores, {memory:.0f} GB"


def wait_until_quiet(limit: float, share: float, *, look: float = 1.0) -> bool:
  """Waits until other processes use less than a share of the CPUs over `look` seconds.

  Args:
    limit: seconds to wait at most.
    share: of all CPU time.
    look: seconds that are looked at.

  Returns:
    Whether it became quiet.
  """
  end = time.monotonic() + limit
  while True:
    before, own = common.cpu_times(), common.own_seconds()
    time.sleep(look)
    if common.other_share(before, common.cpu_times(), common.own_seconds() - own) <= share:
      return True
    if time.monotonic() > end:
      return False


def matmul_gflops() -> dict[str, float]:
  """float32 GFLOP/s of a large matrix product on all cores, by library that is at hand."""
  found = {}
  for library, prepare in (("numpy", _numpy), ("jax", _jax), ("torch", _torch)):
    try:
      multiply = prepare()
    except ImportError:
      continue
    found[library] = 2 * SIDE ** 3 / _best(multiply) / 1e9
  return found


def bandwidth() -> dict[int, float]:
  """GB/s read and written together by copies on all cores, by megabytes that they go through."""
  with ThreadPoolExecutor(cores()) as pool:
    return {size: _copy_rate(pool, int(1e6 * size)) / 1e9 for size in MEGABYTES}


def _best(function: Callable[[], object]) -> float:
  """Seconds of the fastest of many calls."""
  function()
  times, end = [], time.perf_counter() + SECONDS
  while len(times) < 3 or time.perf_counter() < end:
    start = time.perf_counter()
    function()
    times.append(time.perf_counter() - start)
  return min(times)


def _numpy():
  a = np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype(np.float32)
  return lambda: a @ a


def _jax():
  import jax
  import jax.numpy as jnp
  a = jnp.asarray(np.random.default_rng(0).normal(size=(SIDE, SIDE)), jnp.float32)
  multiply = jax.jit(lambda x: x @ x)
  return lambda: jax.block_until_ready(multiply(a))


def _torch():
  import torch
  torch.set_num_threads(cores())
  a = torch.randn(SIDE, SIDE)
  return lambda: a @ a


def _copy_rate(pool, size):
  """Bytes per second of copies within `size` bytes of memory, every core in its own part."""
  parts = [np.ones((2, size // (2 * 8 * cores()))) for _ in range(cores())]
  often = max(1, int(64e6 / size))  # a small copy alone is too short to be timed

  def copy(part):
    for _ in range(often):
      np.copyto(part[0], part[1])
  return often * size / _best(lambda: list(pool.map(copy, parts)))


if __name__ == "__main__":
  print(json.dumps({"gflops": matmul_gflops(), "bandwidth": bandwidth()}))
