"""Machines to plan for, by names such as v5e-8, v5p-64, h100-1, or as the one that this is."""

from collections.abc import Sequence
import importlib.util
import math
import os
import re

import jax

from jaxrl import chips

NAME = re.compile(r"([a-z]+\d+[a-z]*)-(\d+)", re.IGNORECASE)
TORUS = {"v5e": 2, "v6e": 2, "v5p": 3}  # dimensions of slices that the TPU compiler is asked for
VARIABLES = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}  # of libtpu, away from TPUs


def find(name: str = "", devices: int = 0) -> chips.Target:
  """The machine of a name; without one, this machine, or as many virtual CPU devices.

  Sizes are Google's for TPUs, as in v5e-8 and v5p-64, and numbers of GPUs for these: v4 and v5p count two
  cores on each chip. Call it before anything else has touched a device, for there may be too few of them.

  Raises:
    ValueError: a name that is none, or more devices than this process can still have.
  """
  if not name and not devices:
    here = jax.devices()
    return chips.Target("this machine", jax.default_backend(), tuple(here),
                        chips.memory_bytes(here[0]) or _host_bytes(here[0]))
  if not name:
    return chips.Target(f"{devices} devices", "cpu", _virtual(devices), None)
  machine, count = parse(name)
  if devices and devices != count:
    raise ValueError(f"--plan={name} has {count} devices, but --devices={devices}; leave one of them out")
  found = _slice(machine, count) or _virtual(count)
  return chips.Target(name, machine.platform, found, machine.usable_bytes)


def parse(name: str) -> tuple[chips.Machine, int]:
  """Chip and number of chips of a machine's name.

  Raises:
    ValueError: no such chip, or a number of cores that makes no whole chips.
  """
  match = NAME.fullmatch(name)
  if not match:
    raise ValueError(f"--plan={name!r} is no machine: name one as v5e-8, v5p-64, h100-1 or h200-8, of "
                     f"{', '.join(m.name for m in chips.MACHINES)}")
  machine, size = chips.by_name(match[1]), int(match[2])
  if size < machine.cores or size % machine.cores:
    raise ValueError(f"--plan={name}: {machine.name} counts {machine.cores} cores for each chip, so the number "
                     f"is {machine.cores} or a multiple")
  return machine, size // machine.cores


def _virtual(count) -> tuple[jax.Device, ...]:
  """CPU devices, made as many as are wanted while that is possible."""
  try:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:
    pass  # they have been made
  found = jax.devices("cpu")
  if len(found) < count:
    raise ValueError(f"{count} virtual devices are wanted and this process has {len(found)}: plan from a "
                     "process of its own")
  return tuple(found[:count])


def _slice(machine, count) -> Sequence[jax.Device] | None:
  """Devices of a TPU slice that is not here, which programs can be compiled for; None without libtpu."""
  if machine.name not in TORUS or importlib.util.find_spec("libtpu") is None:
    return None
  from jax.experimental import topologies
  for variable, value in VARIABLES.items():
    os.environ.setdefault(variable, value)
  jax.config.update("jax_platforms", "cpu")
  sides = "x".join(map(str, sides_of(count, TORUS[machine.name])))
  return tuple(topologies.get_topology_desc(f"{machine.name}:{sides}", platform="tpu").devices)


def sides_of(count: int, dimensions: int) -> list[int]:
  """Sides of the slice of so many chips, as even as powers of two allow: 8 is 2x4 or 2x2x2.

  Raises:
    ValueError: no power of two.
  """
  power = count.bit_length() - 1
  if count != 1 << power:
    raise ValueError(f"there is no slice of {count} chips: take a power of two")
  sides = sorted(1 << (power // dimensions + (i < power % dimensions)) for i in range(dimensions))
  return sides if dimensions == 2 or count > 4 else sides[::-1]


def _host_bytes(device) -> float | None:
  """Memory that CPU devices share, for each of them."""
  if device.platform != "cpu" or not hasattr(os, "sysconf"):
    return None
  try:
    return math.floor(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count())
  except (ValueError, OSError):
    return None
