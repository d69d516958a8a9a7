"""What a run ran on and what it cost: versions, devices, peak memory, compilations."""

import collections
from collections.abc import Iterator
import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import os
import pathlib
import platform
import sys
import threading
from typing import Any

import jax

try:
  import resource
except ImportError:  # not on Windows
  resource = None

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # of malloc.h
ARENA_PART = 64 << 20  # bytes of the pieces that glibc makes the arenas of other threads than the first of
COLLECTIONS = 50_000, 20, 100  # thresholds of `gc`, at least
PACKAGES = ("jaxrl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# The last parts of the names of jax.monitoring's events.
COMPILE_EVENT, READ_EVENT = "backend_compile_duration", "cache_hits"


def limit_arenas(count: int = 4) -> bool:
  """Has glibc's malloc serve all threads from a few arenas; returns whether it could.

  By default there are eight for each core, and what XLA's compiling threads leave in theirs stays
  there: a sixth of the peak memory of a small model's run. `MALLOC_ARENA_MAX` comes first.
  """
  return _mallopt(("MALLOC_ARENA_MAX",), M_ARENA_MAX, count)


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
  """Has Python look for garbage less often, if it looks at all, and puts back what was set before.

  Tracing makes objects by the hundred thousand and drops hardly any. To look at them again and again, those of
  loading modules included, took 0.7 of 5.4 s to the first update (what `second_start` of
  `scripts/bench/compare.py` measures, with collections and without).
  """
  before = gc.get_threshold()
  if before[0]:
    gc.set_threshold(*map(max, before, COLLECTIONS))
  try:
    yield
  finally:
    gc.set_threshold(*before)


@functools.cache
def keep_memory() -> bool:
  """Has glibc's malloc keep what is freed, where models are on CPUs; returns whether it could.

  By default the memory of an update's activations goes back to the system after it, and the next
  update waits for as many pages of zeros. What is free already is given back now, and nothing any more
  afterwards: this is for when programs are compiled. Blocks of more than 64 MB that other threads than
  the first ask for do not count. A `MALLOC_..._` variable that speaks of it comes first.
  """
  names = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
  # The last one: what other threads than the first have freed is given back part by part, whatever the
  # threshold, unless less than the pad would be left.
  kept = (jax.default_backend() == "cpu" and _mallopt(names, M_MMAP_MAX, 0)
          and _mallopt(names, M_TRIM_THRESHOLD, -1) and _mallopt(names, M_TOP_PAD, ARENA_PART))
  if kept:
    ctypes.CDLL(None).malloc_trim(0)
  return kept


def _mallopt(variables, option, value):
  """Sets an option of glibc's malloc, unless the environment has set one of the variables."""
  if any(name in os.environ for name in variables) or platform.libc_ver()[0] != "glibc":
    return False
  return bool(ctypes.CDLL(None).mallopt(option, value))


class CompileCounter:
  """Counts XLA compilations of this process from its construction until `close`.

  Attributes:
    count: programs compiled, or read from the persistent compilation cache.
    from_disk: those of them that were read from the cache.
    seconds: time that took; tracing and lowering in Python are not included.
    programs: how often each was compiled, by the name of its function, as in `jit(update)`.
  """

  def __init__(self):
    self.count = 0
    self.from_disk = 0
    self.seconds = 0.0
    self.programs: collections.Counter[str] = collections.Counter()
    self._lock = threading.Lock()
    self._open = True
    jax.monitoring.register_event_duration_secs_listener(self._compiled)
    jax.monitoring.register_event_listener(self._read)

  def _compiled(self, event: str, duration: float, **details) -> None:
    if self._open and event.rsplit("/", 1)[-1] == COMPILE_EVENT:
      with self._lock:
        self.count += 1
        self.seconds += duration
        self.programs[str(details.get("fun_name", "?"))] += 1

  def _read(self, event: str, **_) -> None:
    if self._open and event.rsplit("/", 1)[-1] == READ_EVENT:
      with self._lock:
        self.from_disk += 1

  def close(self) -> None:
    """Stops counting."""
    if self._open:
      self._open = False
      for kind, listener in (("event_duration", self._compiled), ("event", self._read)):
        unregister = getattr(jax.monitoring, f"unregister_{kind}_listener", None)
        if unregister is not None:
          unregister(listener)


def peak_memory() -> dict[str, float | None]:
  """Highest memory use of this process so far.

  Returns:
    `host_mb`: resident memory, MB (10**6 bytes); None where the system does not say.
    `device_mb`: allocated on the fullest local device, MB; None on CPU, which does not count.
  """
  host = None
  if found := _own_peak():
    host = found * 1024 / 1e6
  elif resource is not None:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
  peaks = [peak for peak in peaks if peak is not None]
  return {"host_mb": host, "device_mb": max(peaks) / 1e6 if peaks else None}


def _own_peak():
  """Highest resident memory in KiB as Linux says it, None elsewhere. `getrusage` counts what the process
  that started this one held then."""
  with contextlib.suppress(OSError):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
      if line.startswith("VmHWM:"):
        return int(line.split()[1])
  return None


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that decide what a run computes."""
  found = {"python": platform.python_version()}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "not installed"
  return found


def devices() -> dict[str, Any]:
  """Platform, kind and number of the devices, over all processes."""
  first = jax.devices()[0]
  return {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count(),
          "processes": jax.process_count()}
