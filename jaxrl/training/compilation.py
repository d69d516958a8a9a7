"""Compiled programs, kept on disk from run to run.

The cache on disk is JAX's persistent compilation cache. It is only ever an aid: whatever is wrong
with its directory, programs are compiled as if there were none.
"""

from collections.abc import Callable, Mapping
import contextlib
import hashlib
import itertools
import os
import pathlib
import platform
import shutil
import sys
import time
import warnings
import zlib

import jax
import jaxlib

from jaxrl import programs

OFF = "off"
LIMIT = 2 * 10**9  # bytes of all programs in the default place; the least recently used go first
ENTRY = "*-cache"  # files of JAX's cache, each one compiled program
FILES = (ENTRY, f"*{programs.SUFFIX}")  # of compiled and of traced programs
ABANDONED = 3600  # seconds
CHECKED = "checked"  # a file whose time says up to when entries are known to be whole
ZSTANDARD = b"\x28\xb5\x2f\xfd"  # first bytes of a compressed entry; else it is zlib's


def use_cache(setting: str, report: Callable[[str], None],
              environment: Mapping[str, str] = os.environ) -> pathlib.Path | str | None:
  """Lets compiled programs be read from disk, and be written there.

  Call it before anything is compiled. Variables that JAX reads itself, such as
  `JAX_COMPILATION_CACHE_DIR` and `JAX_ENABLE_COMPILATION_CACHE`, come before `setting`.

  Args:
    setting: a directory; "" for a place of the user's own, which is kept below `LIMIT`; or "off".
    report: called with one line if the directory cannot be used.
    environment: where the variables are.

  Returns:
    The directory or address, None if there is no cache.
  """
  given = environment.get("JAX_COMPILATION_CACHE_DIR")
  if not jax.config.jax_enable_compilation_cache or (setting == OFF and not given):
    return None
  root = None if given or setting else default_root(environment)
  if not (given or setting or root):
    return None  # nobody's home: nowhere to keep anything
  directory = pathlib.Path(given or setting) if root is None else root / machine_key()
  if "://" in (given or setting):
    directory = given or setting  # a bucket, which JAX reaches by itself
  elif problem := _unusable(directory, own=root is not None):
    report(f"compiled programs are not kept for the next start: {directory} {problem}; name "
           "another place with --config.compilation_cache=DIR, or --config.compilation_cache=off")
    jax.config.update("jax_compilation_cache_dir", None)
    return None
  else:
    drop_broken(directory)
    if root is not None:
      trim(root, LIMIT)
  jax.config.update("jax_compilation_cache_dir", str(directory))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in environment:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small ones add up
  # An entry that cannot be read or written, perhaps because another run is just writing it, costs
  # one compilation and nothing else.
  warnings.filterwarnings("ignore", message="Error (read|writ)ing persistent compilation cache")
  return directory


def short_locations(environment: Mapping[str, str] = os.environ) -> None:
  """Has programs say of each operation the line it comes from, not the whole stack of calls.

  To write the stacks down took 0.17 of 3.33 s to the first update of `scripts/bench/startup.py`. JAX's own
  variable `JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS` comes first.
  """
  if "JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS" not in environment:
    jax.config.update("jax_include_full_tracebacks_in_locations", False)


def default_root(environment: Mapping[str, str]) -> pathlib.Path | None:
  """Where the user keeps caches, None if that is unknown; programs of all machines are below it."""
  if environment.get("XDG_CACHE_HOME"):
    return pathlib.Path(environment["XDG_CACHE_HOME"]) / "jaxrl" / "programs"
  try:
    return pathlib.Path.home() / ".cache" / "jaxrl" / "programs"
  except RuntimeError:
    return None


def machine_key() -> str:
  """A directory name that only machines share which can run each other's programs.

  Programs for a CPU hold instructions that another kind of CPU may lack, on which they would die,
  and a home directory is often seen by several kinds.
  """
  described = [platform.machine(), platform.processor()]
  with contextlib.suppress(OSError):
    first = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    wanted = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part",
              "Features", "isa")
    described += [line for line in first.splitlines() if line.split(":")[0].strip() in wanted]
  digest = hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]
  return f"jaxlib-{jaxlib.__version__}-{sys.platform}-{platform.machine()}-{digest}"


def drop_broken(directory: pathlib.Path) -> list[str]:
  """Deletes entries that a killed process has left half written, which JAX would never replace.

  Each entry is looked at once: those older than the last call are known to be whole. What has waited for
  `ABANDONED` seconds to become a traced program goes, too.

  Returns:
    The names of the entries deleted, of compiled programs.
  """
  mark, broken = directory / CHECKED, []
  with contextlib.suppress(OSError):
    since = mark.stat().st_mtime_ns if mark.exists() else 0
    for path in directory.glob(ENTRY):
      if path.stat().st_mtime_ns >= since and not _is_whole(path):
        path.unlink(missing_ok=True)
        broken.append(path.name)
    for path in directory.glob(f".*{programs.SUFFIX}"):
      if path.stat().st_mtime < time.time() - ABANDONED:
        path.unlink(missing_ok=True)
    mark.touch()
  return broken


def trim(root: pathlib.Path, limit: int) -> None:
  """Deletes the least recently used programs below `root` until the rest take `limit` bytes."""
  with contextlib.suppress(OSError):  # another process may be doing the same
    found = []
    for path in itertools.chain(*map(root.rglob, FILES)):
      stat = path.stat()
      found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
      if total <= limit:
        break
      path.unlink(missing_ok=True)
      total -= size
    for directory in root.iterdir():  # of versions and machines of which nothing is left
      if directory.is_dir() and found and not any(itertools.chain(*map(directory.glob, FILES))):
        shutil.rmtree(directory, ignore_errors=True)


def _unusable(directory, own):
  """What is wrong with a directory, "" if nothing is; makes it if need be."""
  try:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if own and hasattr(os, "geteuid") and directory.stat().st_uid != os.geteuid():
      return "belongs to another user, whose programs are not to be trusted"
    probe = directory / f".writable-{os.getpid()}"
    probe.touch()
    probe.unlink()
  except OSError as error:
    return f"cannot be written ({error.strerror or error})"
  return ""


def _is_whole(path):
  content = path.read_bytes()
  try:
    if content.startswith(ZSTANDARD):
      _decompress_zstandard(content)
    else:
      zlib.decompress(content)
  except ImportError:
    return True  # JAX cannot read it here either
  except Exception:  # each library has errors of its own
    return False
  return True


def _decompress_zstandard(content):
  if sys.version_info >= (3, 14):
    from compression import zstd
    return zstd.decompress(content)
  import zstandard
  return zstandard.ZstdDecompressor().decompress(content)
