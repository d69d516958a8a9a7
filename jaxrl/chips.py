"""What accelerators can do at most, by their makers' data sheets, and the machine that programs are made for.

Figures are those of dense bfloat16 products, per chip. Sources:
  TPU: https://docs.cloud.google.com/tpu/docs/v4, .../v5e, .../v5p-training, .../v6e. A v5p chip has
    459 TFLOP/s, 95 GiB at 2765 GB/s, and 1200 GB/s to its neighbours, both directions counted.
  NVIDIA: the data sheets of A100 (SXM, 80 GB), H100 (SXM5: 989 TFLOP/s without sparsity, 80 GB at
    3.35 TB/s, NVLink 900 GB/s in both directions) and H200 (SXM), and those of DGX H100 and H200
    for the network of a host (one 400 Gbit/s port per GPU).
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import math
import os

import jax


@dataclasses.dataclass(frozen=True)
class Machine:
  """Limits of one chip and of its links.

  Attributes:
    name: short.
    kind: found in `jax.Device.device_kind`, in lower case.
    flops: bfloat16 FLOP/s.
    hbm_bytes: capacity of the memory, bytes.
    usable: what TPU programs may have of it, as their compiler says; 0 for GPUs.
    cores: that names of machines count on each chip: v5p-64 has 32 chips.
    hbm_rate: its bandwidth, bytes/s.
    link_rate: bytes/s that one chip sends to its neighbours, one way: over all links of a torus,
      or over NVLink. 0 where the table leaves links out.
    torus: dimensions of the torus that links chips; 0 where a switch links those of one host.
    host: chips that the fast links join (0: all of them, as in a TPU slice).
    network_rate: bytes/s one way that one chip has to others outside of those.
    hop_seconds, network_hop_seconds: latency of a step of a collective, over the fast links and
      over the network. Assumptions, not from a data sheet.
  """

  name: str
  kind: str
  flops: float
  hbm_bytes: float
  hbm_rate: float
  link_rate: float = 0.0
  torus: int = 0
  usable: float = 0.0
  cores: int = 1
  host: int = 0
  network_rate: float = 0.0
  hop_seconds: float = 1e-6
  network_hop_seconds: float = 5e-6

  @property
  def platform(self) -> str:
    """As JAX names it: tpu or gpu."""
    return "tpu" if self.kind.startswith("tpu") else "gpu"

  @property
  def usable_bytes(self) -> float:
    """Of the memory, what programs may have: on GPUs JAX takes the share of it that
    XLA_PYTHON_CLIENT_MEM_FRACTION says, or three quarters."""
    return self.usable or float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75)) * self.hbm_bytes

  def collective_seconds(self, op: str, payload: float, devices: list[int], shared_torus: int = 1
                         ) -> float:
    """Time of a collective at full bandwidth, plus the latency of its hops.

    Args:
      op: `all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all` or `collective-permute`.
      payload: bytes of the whole array: gathered, before it is scattered, or reduced.
      devices: ids of one group; a host holds neighbouring ids.
      shared_torus: mesh axes that the dimensions of the torus are divided among.
    """
    size = len(devices)
    if size < 2:
      return 0.0
    sent = wire_bytes(op, payload, size)
    passes = 2 if op == "all-reduce" else 1
    if not self.host:
      # A mesh axis uses some dimensions of the torus, each a ring in both directions.
      free = self.torus + 1 - shared_torus
      dimensions = max(1, min(self.torus, free, round(math.log2(size) / 2)))
      rate = self.link_rate * dimensions / self.torus
      hops = dimensions * (size ** (1 / dimensions) - 1) / 2
      return sent / rate + passes * hops * self.hop_seconds
    hosts = len({device // self.host for device in devices})
    local = size / hosts
    inside = sent / self.link_rate if local > 1 else 0.0
    # All chips of a host that are in the group share in its traffic to other hosts.
    outside = wire_bytes(op, payload, hosts) / (local * self.network_rate)
    hops = (local - 1) * self.hop_seconds + math.log2(hosts) * self.network_hop_seconds  # a tree
    return max(inside, outside) + passes * hops


def wire_bytes(op: str, payload: float, size: int) -> float:
  """Bytes that each of `size` devices sends in a bandwidth-optimal collective."""
  if op == "collective-permute":
    return payload
  share = (size - 1) / size
  if op == "all-to-all":
    return payload * share / size if size else 0.0
  return payload * share * (2 if op == "all-reduce" else 1)


GIB = 2.0 ** 30
MACHINES = (
    Machine("v4", "tpu v4", 275e12, 32 * GIB, 1228e9, usable=30.75 * GIB, cores=2),
    Machine("v5e", "tpu v5 lite", 197e12, 16 * GIB, 819e9, usable=15.75 * GIB),
    Machine("v5p", "tpu v5p", 459e12, 95 * GIB, 2765e9, link_rate=600e9, torus=3,
            usable=95.74 * GIB, cores=2),
    Machine("v6e", "tpu v6", 918e12, 32 * GIB, 1640e9, usable=31.25 * GIB),
    Machine("A100", "a100", 312e12, 80e9, 2039e9),
    Machine("H200", "h200", 989e12, 141e9, 4800e9, link_rate=450e9, host=8, network_rate=50e9),
    Machine("H100", "h100", 989e12, 80e9, 3350e9, link_rate=450e9, host=8, network_rate=50e9),
)


def by_name(name: str) -> Machine:
  """The machine of a short name.

  Raises:
    ValueError: there is none; names those that there are.
  """
  found = {machine.name.lower(): machine for machine in MACHINES}
  if name.lower() not in found:
    raise ValueError(f"no machine is called {name!r}; there are "
                     f"{', '.join(m.name for m in MACHINES)}")
  return found[name.lower()]


def of_device(device: jax.Device) -> Machine | None:
  """The data sheet of a device, None where it is not in the table (a CPU, for instance)."""
  kind = device.device_kind.lower()
  if kind == "tpu v5":  # what JAX calls v5p
    return by_name("v5p")
  return next((machine for machine in MACHINES if machine.kind in kind), None)


# ------------------------------------------------------------- what programs are made for


@dataclasses.dataclass(frozen=True)
class Target:
  """A machine that programs are made for without running there.

  Attributes:
    name: as in `v5e-8`.
    platform: of the devices that it has: cpu, gpu or tpu. What is compiled with are `devices`, which may
      be virtual ones of a CPU.
    devices: as many as it has.
    memory_bytes: that programs may use on each; None if nothing is known.
  """

  name: str
  platform: str
  devices: tuple[jax.Device, ...]
  memory_bytes: float | None


_assumed: list[Target] = []


@contextlib.contextmanager
def assume(target: Target) -> Iterator[None]:
  """Has all choices that depend on the machine made for another one than this."""
  _assumed.append(target)
  try:
    yield
  finally:
    _assumed.pop()


def platform() -> str:
  """Of the devices that programs are made for: cpu, gpu or tpu."""
  return _assumed[-1].platform if _assumed else jax.default_backend()


def devices() -> list[jax.Device]:
  """Those that meshes are made of."""
  return list(_assumed[-1].devices) if _assumed else jax.devices()


def memory_bytes(device: jax.Device) -> float | None:
  """What programs may use on a device; None where nothing says so, as on CPUs."""
  if _assumed:
    return _assumed[-1].memory_bytes
  return (device.memory_stats() or {}).get("bytes_limit")
