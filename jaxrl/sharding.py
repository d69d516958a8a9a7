"""Where arrays live: the device mesh, the rules from logical axes to mesh axes, process start-up.

Parameters name their axes (`embed`, `heads`, ...) and `RULES` says which mesh axis splits each, so
one program runs on a laptop and on a pod. XLA inserts the communication. Code for a mesh of several
devices runs inside `with jax.set_mesh(mesh)`, which is where `constrain` finds it.
"""

from collections.abc import Callable, Mapping, Sequence
import importlib.util
import itertools
import math
import os
import re
from typing import Any

from flax.core import meta
import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree
import numpy as np

from jaxrl import chips
from jaxrl.batch import BY_ROWS, TokenBatch

AXES = ("data", "fsdp", "tensor")
RULES = {
    "rows": ("data", "fsdp"),  # of a batch: every device computes its own rows, ...
    "embed": ("fsdp",),  # ... gathering each parameter over `fsdp` just before it is used
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": (),  # every device has a share of each
    "head_dim": (),
    "head": (),
    "rank": (),
    "layers": (),
    "length": (),
}
DIVIDED = (("d_model", "embed"), ("vocab_size", "vocab"), ("heads", "heads"), ("kv_heads", "kv_heads"),
           ("d_ff", "mlp"), ("expert_d_ff", "mlp"))  # field of a model config, its logical axis
PROCESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HOST = "pinned_host"  # the memory kind of what is offloaded
HEARTBEAT_SECONDS = 30  # without a sign of life after which a process counts as dead
MOST_STREAMS = 8  # each has a gradient of its own
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


# ------------------------------------------------------------------------------------------- mesh


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of all devices with axes `(data, fsdp, tensor)`.

  Args:
    data: copies of the parameters, each with its own rows.
    fsdp: devices that share one copy of the parameters, each with its own rows.
    tensor: devices that share heads, feed-forward width and vocabulary, and see the same rows.
    devices: all devices of all processes if None.

  One of the three may be -1: what the others leave.

  Raises:
    ValueError: the product is not the device count; names the nearest setting that is.
  """
  devices = chips.devices() if devices is None else list(devices)
  wanted = dict(zip(AXES, (data, fsdp, tensor)))
  given = math.prod(size for size in wanted.values() if size > 0)
  left, remainder = divmod(len(devices), given)
  shape = tuple(left if size == -1 else size for size in wanted.values())
  if min(shape) < 1 or list(wanted.values()).count(-1) > 1 or math.prod(shape) != len(devices):
    setting = ", ".join(f"{axis}={size}" for axis, size in wanted.items())
    remedy = " ".join(f"--config.mesh.{axis}={size}"
                      for axis, size in zip(AXES, _nearest_shape(wanted, len(devices))))
    raise ValueError(f"config.mesh ({setting}) does not divide {len(devices)} devices: use "
                     f"{remedy}; one axis may be -1, what the others leave")
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def _nearest_shape(wanted, count):
  divisors = [d for d in range(1, count + 1) if count % d == 0]
  shapes = [s for s in itertools.product(divisors, repeat=3) if math.prod(s) == count]
  first_free = next((axis for axis in AXES if wanted[axis] < 1), None)

  def distance(shape):
    return sum(abs(math.log(size / max(wanted[axis], 1)))
               for axis, size in zip(AXES, shape) if axis != first_free)
  return min(shapes, key=distance)


def check_divisible(config: Any, mesh: Mesh) -> None:
  """Refuses a model that does not split evenly over a mesh.

  Args:
    config: has the fields of `DIVIDED` (`models.DecoderConfig`).
    mesh: of `make_mesh`.

  Raises:
    ValueError: names every field that does not divide, and what would.
  """
  problems = []
  for field, axis in DIVIDED:
    size, parts = getattr(config, field), _parts(axis, mesh)
    if size % parts:
      mesh_axis = RULES[axis][0]
      fits = math.gcd(size, parts)
      problem = f"config.model.{field}={size} does not divide over mesh.{mesh_axis}={parts}: use "
      if field == "vocab_size":
        padded = -(-size // parts) * parts
        problem += f"--config.model.vocab_size={padded} (unused ids at its end) or "
      problems.append(problem + f"--config.mesh.{mesh_axis}={fits}")
  if problems:
    raise ValueError("\n".join(problems))


def _parts(axis, mesh):
  """Number of pieces that a logical axis is split into."""
  return math.prod(mesh.shape[name] for name in RULES[axis])


# -------------------------------------------------------------------------------------- shardings


def partition_spec(names: Sequence[str | None]) -> PartitionSpec:
  """The mesh axes of an array with these logical axes; None is not split.

  Raises:
    ValueError: a name that `RULES` lacks.
  """
  unknown = [name for name in names if name is not None and name not in RULES]
  if unknown:
    raise ValueError(f"logical axes {unknown} have no rule; sharding.RULES has {', '.join(RULES)}")
  return PartitionSpec(*(RULES[name] or None if name else None for name in names))


def shardings_of(abstract: PyTree, mesh: Mesh) -> PyTree:
  """Shardings for a tree whose parameters carry logical axis names, such as a train state.

  Args:
    abstract: `jax.eval_shape` of what makes the tree. Optimiser states made of boxed parameters are
      boxed too and follow them. Leaves without names are replicated, as are factored moments (of
      another rank than their parameter, or of size 1).
    mesh: of `make_mesh`.

  Returns:
    The unboxed tree, with a `NamedSharding` for each array.

  Raises:
    ValueError: an axis of a parameter does not divide; names the parameter.
  """
  def is_box(leaf):
    return isinstance(leaf, meta.AxisMetadata)

  def sharding(path, leaf):
    value = leaf.unbox() if is_box(leaf) else leaf
    names = leaf.names if is_box(leaf) and len(leaf.names) == value.ndim else ()
    names = [name if size > 1 else None for size, name in zip(value.shape, names)]
    for size, name in zip(value.shape, names):
      if name in RULES and size % _parts(name, mesh):
        raise ValueError(f"parameter {jax.tree_util.keystr(path)} of shape {value.shape}: axis "
                         f"{name!r} does not divide over {' x '.join(RULES[name])} = "
                         f"{_parts(name, mesh)} of config.mesh")
    return NamedSharding(mesh, partition_spec(names))

  return jax.tree_util.tree_map_with_path(sharding, abstract, is_leaf=is_box)


def constrain(x: Array, *names: str | None) -> Array:
  """Pins an activation to the logical axes of the mesh in context; without a mesh, does nothing.

  An axis that does not divide over its devices is left to XLA.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  spec = [PartitionSpec.UNCONSTRAINED if name and size % _parts(name, mesh) else axes
          for size, name, axes in zip(x.shape, names, partition_spec(names))]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def on_each_device(function: Callable, inputs: Sequence[Sequence[str | None]],
                   outputs: Sequence[str | None]) -> Callable:
  """The function, run by every device of the mesh in context on its own parts of the arguments.

  Where an axis does not divide over its devices, XLA is left to run it, on whole arrays.

  Args:
    function: of arrays that do not depend on those of other devices.
    inputs, outputs: logical axes of each argument and of the result.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function
  on_parts = jax.shard_map(function, in_specs=tuple(partition_spec(names) for names in inputs),
                           out_specs=partition_spec(outputs), check_vma=False)

  def call(*arrays: Array) -> Array:
    divides = all(size % _parts(name, mesh) == 0 for x, names in zip(arrays, inputs, strict=True)
                  for size, name in zip(x.shape, names, strict=True) if name)
    return (on_parts if divides else function)(*arrays)
  return call


def flat(x: Array) -> Array:
  """Merges all axes but the last, unless a mesh in context may have split them.

  XLA's CPU backend reduces arrays of two axes up to ten times faster than those with more.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return x.reshape(-1, x.shape[-1]) if mesh.empty or mesh.size == 1 else x


def axis_size(name: str) -> int:
  """Number of devices that split a logical axis on the mesh in context; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else _parts(name, mesh)


def bytes_of(tree: PyTree, itemsize: int = 0, *, on_host: bool = False) -> int:
  """Bytes of arrays, or abstract ones, on one device: of their own types or of `itemsize` a number.

  Args:
    on_host: of those that lie in host memory for the device, instead of those that lie on it.
  """
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * (itemsize or x.dtype.itemsize)
             for x in jax.tree.leaves(tree) if (x.sharding.memory_kind == HOST) == on_host)


def on_host(abstract: PyTree) -> PyTree:
  """Abstract arrays as they are when all that is large lies in the pinned memory of the devices' hosts."""
  def place(x):
    kind = x.sharding.with_memory_kind(HOST) if _is_large(x) else x.sharding
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kind)
  return jax.tree.map(place, abstract)


def on_device(tree: PyTree) -> PyTree:
  """Inside a jitted function, what `on_host` says lies in host memory, on the devices."""
  return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if _is_large(x) else x, tree)


def _is_large(x):
  return x.ndim > 0 and jax.numpy.issubdtype(x.dtype, jax.numpy.floating)


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> Callable[[TokenBatch], TokenBatch]:
  """A function from a batch to its shardings: tokens by rows, per-sequence arrays everywhere."""
  by_rows = NamedSharding(mesh, partition_spec(("rows",)))

  def shardings(batch: TokenBatch) -> TokenBatch:
    tokens = {name: getattr(batch, name) for name in BY_ROWS}
    return jax.tree.map(lambda _: replicated(mesh), batch).replace(
        **jax.tree.map(lambda _: by_rows, tokens))

  return shardings


def put_batch(batch: TokenBatch, mesh: Mesh) -> TokenBatch:
  """Moves a batch onto the mesh. With several processes, each passes the same whole batch.

  Raises:
    ValueError: the rows do not divide over the devices of `data` and `fsdp`.
  """
  rows, parts = batch.tokens.shape[0], _parts("rows", mesh)
  if rows % parts:
    raise ValueError(f"a batch of {rows} rows does not divide over mesh data x fsdp = {parts}: "
                     f"pack it with rows_multiple={parts}")
  shardings = batch_sharding(mesh)(batch)
  if jax.process_count() == 1:
    return jax.device_put(batch, shardings)

  def put(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
  return jax.tree.map(put, batch, shardings)


def to_host(tree: PyTree) -> PyTree:
  """Whole arrays as NumPy arrays, gathered where other processes hold parts of them.

  With several processes, all of them must call it with the same tree.
  """
  def fetch(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
      return x
    return multihost_utils.process_allgather(x, tiled=True)
  return jax.device_get(jax.tree.map(fetch, tree))


def streams(mesh: Mesh | None) -> int:
  """Threads that run programs side by side.

  One per core, up to `MOST_STREAMS`, on a single CPU device, where the operations of a small model
  keep one core busy each; one elsewhere, and on several devices, whose processes must agree on the
  order of things.
  """
  if chips.platform() != "cpu" or (mesh is not None and mesh.size > 1):
    return 1
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return min(cores, MOST_STREAMS)


# -------------------------------------------------------------------------------------- processes


def expects_processes(environment: Mapping[str, str] = os.environ) -> bool:
  """Whether the environment says that this process may be one of several; see `start_distributed`.

  Raises:
    ValueError: some of the variables are set and others are not, or they are no numbers.
  """
  named = _named_processes(environment)
  return named[1] > 1 if named else _found_by_jax(environment)


def start_distributed(environment: Mapping[str, str] = os.environ) -> bool:
  """Joins the other processes of a run when the environment says that there are others.

  That is the case with `JAX_COORDINATOR_ADDRESS` (host:port), `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID`; and in a SLURM step, an Open MPI job or on Cloud TPU hosts, where JAX finds the
  rest itself, on GCE from the metadata of the machine. Elsewhere, and when called again, it does
  nothing. Call it before anything that touches a device. A process that dies ends the others after
  `HEARTBEAT_SECONDS` at most.

  Returns:
    Whether this process is one of several.

  Raises:
    ValueError: some of the three variables are set and others are not, or they are no numbers.
  """
  _give_virtual_devices_threads()
  if jax.distributed.is_initialized():
    return jax.process_count() > 1
  named = _named_processes(environment)
  if named is not None:
    address, count, index = named
    if count > 1:
      jax.distributed.initialize(address, num_processes=count, process_id=index,
                                 heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    return count > 1
  if not _found_by_jax(environment):
    return False
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  except (ValueError, OSError):  # no cluster, or no metadata to find one in
    if _several_are_certain(environment):
      raise
    return False
  return jax.process_count() > 1


def _named_processes(environment) -> tuple[str, int, int] | None:
  """Address, number of processes and index of this one, if the environment names them."""
  given = {name: environment[name] for name in PROCESS_VARIABLES if environment.get(name)}
  if len(given) == len(PROCESS_VARIABLES):
    address, count, index = (given[name] for name in PROCESS_VARIABLES)
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
      raise ValueError(f"JAX_PROCESS_ID={index} and JAX_NUM_PROCESSES={count}: number the "
                       "processes from 0 to one less than there are")
    return address, int(count), int(index)
  if given and not _found_by_jax(environment):
    missing = ", ".join(name for name in PROCESS_VARIABLES if name not in given)
    raise ValueError(f"{', '.join(given)} without {missing}: several processes need all of "
                     f"{', '.join(PROCESS_VARIABLES)}; unset them to run one")
  return None


def _found_by_jax(environment) -> bool:
  return _several_are_certain(environment) or _is_cloud_tpu(environment)


def _several_are_certain(environment) -> bool:
  def number(name):
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 1
  return (number("SLURM_STEP_NUM_TASKS") > 1 or number("OMPI_COMM_WORLD_SIZE") > 1
          or number("MEGASCALE_NUM_SLICES") > 1
          or any("," in environment.get(name, "")
                 for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")))


def _is_cloud_tpu(environment) -> bool:
  """Whether this is a TPU host on GCE, where only the metadata server knows of other hosts.

  Notebook services and GKE forbid to ask it (`TPU_SKIP_MDS_QUERY`) or name the hosts.
  """
  named = any(environment.get(name) for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES",
                                                 "TPU_SKIP_MDS_QUERY"))
  wanted = environment.get("JAX_PLATFORMS", "")
  return (not named and (not wanted or "tpu" in wanted)
          and importlib.util.find_spec("libtpu") is not None
          and any(os.path.exists(path) for path in TPU_DEVICES))


def _give_virtual_devices_threads():
  """Lets every virtual CPU device wait in several collectives at once.

  XLA's CPU backend has as many threads as there are cores or devices, and a thread that waits for
  other devices is not free for them: independent collectives of one program can so block each other.
  """
  flag = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
  if flag and int(flag[1]) > 1:
    os.environ.setdefault("NPROC", str(4 * int(flag[1])))  # read when the backend starts
