"""What a run ran on and what it cost: versions, devices, peak memory, compilations."""

import importlib.metadata
import platform
import sys
import threading
from typing import Any

import jax

try:
  import resource
except ImportError:  # not on Windows
  resource = None

PACKAGES = ("jaxrl", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
COMPILE_EVENT = "backend_compile_duration"  # the last part of the name of jax.monitoring's event


class CompileCounter:
  """Counts XLA compilations of this process from its construction until `close`.

  Attributes:
    count: programs compiled, or read from the persistent compilation cache.
    seconds: time that took; tracing and lowering in Python are not included.
  """

  def __init__(self):
    self.count = 0
    self.seconds = 0.0
    self._lock = threading.Lock()
    self._open = True
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration: float, **_) -> None:
    if self._open and event.rsplit("/", 1)[-1] == COMPILE_EVENT:
      with self._lock:
        self.count += 1
        self.seconds += duration

  def close(self) -> None:
    """Stops counting."""
    if self._open:
      self._open = False
      unregister = getattr(jax.monitoring, "unregister_event_duration_listener", None)
      if unregister is not None:
        unregister(self._listen)


def peak_memory() -> dict[str, float | None]:
  """Highest memory use of this process so far.

  Returns:
    `host_mb`: resident memory, MB (10**6 bytes); None where the system does not say.
    `device_mb`: allocated on the fullest local device, MB; None on CPU, which does not count.
  """
  host = None
  if resource is not None:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
  peaks = [peak for peak in peaks if peak is not None]
  return {"host_mb": host, "device_mb": max(peaks) / 1e6 if peaks else None}


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
