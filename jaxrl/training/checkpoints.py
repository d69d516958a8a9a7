"""Checkpoints of a run: written in the background, verified when read, never silently wrong.

One checkpoint is `<directory>/<step>/` with two items: `state`, the device arrays, in Orbax's own
format, and `host`, what the run keeps beside them (see `hostfile`), including the shape and the
fingerprint of every device array. A checkpoint is restored only if all of this agrees. It does not
matter how many processes saved it, how many restore it, or on which mesh.

Names beside the steps: `<step>.damaged` is a checkpoint that could not be restored, moved out of
the way; `<step>.replaced` is the old version of a step that is being saved anew, deleted once the
new one is complete and put back if the run dies before that.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxrl.training import hostfile, orbax_noise, processes
from jaxrl.training.fingerprint import fingerprint

DAMAGED, REPLACED = ".damaged", ".replaced"
SHARED_FROM = 2 ** 20  # bytes of an array that a device writes, where several devices hold the same
NEW_PARAMETERS = re.compile(r"^params/critic/|_head/|/lora_[ab]$")  # what a run may add to those of another
ADAPTER = re.compile(r"/lora_[ab]$")
# A restore that fails for lack of these says nothing about the files.
NOT_DAMAGE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "Permission denied", "Too many open files")


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written or read; the message says which, where and what to do."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """What `Checkpoints.restore_latest` found.

  Attributes:
    step: the step that it was saved at.
    state: as `abstract_state`, with values.
    host: the JSON record (tuples have become lists).
    buffer: the flat dict of NumPy arrays, None if None was saved.
  """

  step: int
  state: Any
  host: dict[str, Any]
  buffer: dict[str, np.ndarray] | None


class Checkpoints:
  """The last few checkpoints in a directory.

  Args:
    directory: created if need be; with several processes, one that all of them see.
    keep: how many to keep, at least 1; 2 or more, so that there is one to fall back to.
    report: called with one line whenever something is wrong but can be survived.
  """

  def __init__(self, directory: str | pathlib.Path, *, keep: int = 2,
               report: Callable[[str], None] = print):
    if keep < 1:
      raise ValueError(f"keep={keep} would keep no checkpoint: use 2 or more")
    self.directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._report = report
    self._in_flight: int | None = None
    self._abandoned = False
    orbax_noise.silence_logs()
    if jax.process_index() == 0:
      self.directory.mkdir(parents=True, exist_ok=True)
      self._put_back_replaced()
    processes.meet("checkpoints are opened")
    if processes.meet("checkpoints can be opened", flag=int(not self.directory.is_dir())):
      raise CheckpointError(
          f"process 0 made {self.directory}, but not every process sees it: with several processes "
          "--workdir must be on a file system that all of them share")
    self._manager = self._open()

  def save(self, step: int, state: Any, host: Mapping[str, Any],
           buffer: Mapping[str, np.ndarray] | None = None, *, force: bool = False) -> bool:
    """Starts saving; returns once everything is copied, so that `state` may be donated.

    A save that is still being written is waited for first: there are never two in flight.

    Args:
      step: names the checkpoint; the newest is the one with the largest step.
      state: pytree of `jax.Array` (any sharding), NumPy arrays and scalars, Python numbers.
      host: JSON-able; see `hostfile.plain`. Stored as process 0 has it, as is `buffer`.
      buffer: more NumPy arrays, not necessarily the same from save to save.
      force: replace a checkpoint of the same step (the old one stays until the new is complete).

    Returns:
      False if there is a checkpoint of this step already and `force` is not set.

    Raises:
      CheckpointError: this save, or the one before, could not be written.
      TypeError: `host` or `buffer` holds what a file cannot.
    """
    self.wait()
    exists = step in self._manager.all_steps()
    if exists and not force:
      return False
    leaves = _leaves(state)
    on_device = {path: leaf for path, leaf in leaves.items() if _is_device(leaf) and leaf.size}
    arrays = {f"state/{_name(path)}": np.asarray(leaf)
              for path, leaf in leaves.items() if not _is_device(leaf)}
    arrays |= {f"buffer/{name}": np.asarray(array) for name, array in (buffer or {}).items()}
    hostfile.refuse_unstorable(arrays)
    record = {
        "step": step,
        "host": hostfile.plain(host),
        "has_buffer": buffer is not None,
        "state": _describe(leaves),
        "fingerprints": _fingerprints(on_device),
    }
    items = {"host": hostfile.HostSave(record, arrays)}
    if on_device:
      items["state"] = ocp.args.PyTreeSave(traverse_util.unflatten_dict(on_device))
    if exists:
      self._rename(step, REPLACED)
    self._in_flight = step
    orbax_noise.quiet_about_abandoned_writes()
    with self._explaining_failure():
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)
    return True

  def restore_latest(self, abstract_state: Any | Callable[[dict[str, Any]], Any]
                     ) -> Restored | None:
    """The newest checkpoint that is intact, or None in an empty directory.

    Damaged ones are reported and renamed to `<step>.damaged`.

    Args:
      abstract_state: the structure to restore, with `jax.ShapeDtypeStruct` (or arrays) for arrays;
        their `sharding` says where the arrays go, whatever the mesh was when they were saved. Or a
        function that returns it for the host record, if it depends on the phase, say.

    Raises:
      CheckpointError: no checkpoint is intact; or the checkpoint is of another model or optimiser.
    """
    self.wait()
    steps = sorted(self._manager.all_steps(), reverse=True)
    processes.meet(f"restoring the newest of the checkpoints {steps}", repr(steps).encode())
    for step in steps:
      try:
        with orbax_noise.quiet_about_abandoned_reads(_Damaged):
          return self._restore(step, abstract_state)
      except _Damaged as error:
        moved = self._rename(step, DAMAGED)
        older = [other for other in self._manager.all_steps() if other < step]
        self._report(f"checkpoint of step {step} is damaged and was moved to {moved} ({error}); "
                     + (f"falling back to step {max(older)}" if older else "there is no older one"))
    damaged = sorted(self.directory.glob(f"*{DAMAGED}"))
    if damaged:
      raise CheckpointError(
          f"no checkpoint in {self.directory} is intact: {', '.join(map(str, damaged))}. To start "
          f"afresh, delete {self.directory} or pass another --workdir; to retry one of them after "
          f"repairing it, remove {DAMAGED} from its name")
    return None

  def latest_step(self) -> int | None:
    """The newest step on disk, None if there is none; a save in flight does not count."""
    steps = [step for step in self._manager.all_steps() if step != self._in_flight]
    return max(steps, default=None)

  def wait(self) -> None:
    """Blocks until the save in flight, if any, is complete.

    Raises:
      CheckpointError: it could not be written.
    """
    if self._in_flight is None:
      return
    with self._explaining_failure():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    self._in_flight = None
    if jax.process_index() == 0:
      for path in self.directory.glob(f"*{REPLACED}"):
        shutil.rmtree(path)

  def close(self) -> None:
    """Waits for the save in flight and ends the threads; call it once, last.

    Raises:
      CheckpointError: the save in flight could not be written.
    """
    if self._abandoned:
      return
    try:
      self.wait()
    finally:
      if not self._abandoned:
        self._manager.close()

  def _open(self) -> ocp.CheckpointManager:
    arrays = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=SHARED_FROM)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.CheckpointManager(
        self.directory, options=ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, cleanup_tmp_directories=True, save_root_metadata=False),
        item_handlers={"state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
                       "host": hostfile.HostHandler()})

  def _restore(self, step: int, abstract_state: Any | Callable) -> Restored:
    """Restores one checkpoint, or raises `_Damaged`, or `CheckpointError` for another model's."""
    with _agreeing_on_damage():
      record, arrays = hostfile.read(self.directory / str(step) / "host")
    processes.meet(f"restoring checkpoint {step}", json.dumps(record, sort_keys=True).encode())
    if callable(abstract_state):
      abstract_state = abstract_state(record["host"])
    leaves = _leaves(abstract_state)
    self._refuse_other_structure(step, record["state"], _describe(leaves))
    on_device = {path: _abstract(leaf) for path, leaf in leaves.items() if _is_device(leaf)}
    with _agreeing_on_damage():
      values = self._restore_arrays(step, on_device)
      for name, value in _fingerprints(values).items():
        if value != record["fingerprints"].get(name, value):
          raise hostfile.Unreadable(f"{name} is not what was saved")
    for path, leaf in leaves.items():
      if not _is_device(leaf):
        values[path] = _as_type_of(leaf, arrays[f"state/{_name(path)}"])
    structure = jax.tree.structure(abstract_state)
    state = jax.tree.unflatten(structure, [values[path] for path in leaves])
    buffer = {name.removeprefix("buffer/"): array for name, array in arrays.items()
              if name.startswith("buffer/")}
    return Restored(step, state, record["host"], buffer if record["has_buffer"] else None)

  def _restore_arrays(self, step: int, abstract: dict[tuple, jax.ShapeDtypeStruct]
                      ) -> dict[tuple, jax.Array]:
    arrays = {path: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
              for path, leaf in abstract.items() if not leaf.size}  # Orbax stores no empty arrays
    stored = {path: leaf for path, leaf in abstract.items() if leaf.size}
    if stored:
      tree = traverse_util.unflatten_dict(stored)
      restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(
          tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))))
      arrays |= traverse_util.flatten_dict(restored["state"])
    return arrays

  def _refuse_other_structure(self, step: int, saved: dict[str, str], wanted: dict[str, str]
                              ) -> None:
    differing = [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, {wanted.get(name, 'absent')} now"
        for name in sorted({**saved, **wanted}) if saved.get(name) != wanted.get(name)]
    if not differing:
      return
    rest = f"\n  and {len(differing) - 8} more" if len(differing) > 8 else ""
    raise CheckpointError(
        f"checkpoint of step {step} in {self.directory} is of another model or optimiser:\n  "
        + "\n  ".join(differing[:8]) + rest + "\nContinue with the config that it was started with "
        "(config.json in the same --workdir), or pass another --workdir to start afresh")

  def _rename(self, step: int, suffix: str) -> pathlib.Path:
    """Takes a step out of the series, overwriting what had been moved there before."""
    moved = self.directory / f"{step}{suffix}"
    if jax.process_index() == 0:
      shutil.rmtree(moved, ignore_errors=True)
      (self.directory / str(step)).rename(moved)
    processes.meet(f"checkpoint {step} is moved")
    self._manager.reload()
    return moved

  def _put_back_replaced(self) -> None:
    for path in self.directory.glob(f"*{REPLACED}"):
      complete = path.with_name(path.name.removesuffix(REPLACED))
      if complete.exists():
        shutil.rmtree(path)
      else:
        path.rename(complete)

  @contextlib.contextmanager
  def _explaining_failure(self) -> Iterator[None]:
    """Turns what Orbax raises into one error, and leaves a directory that can be saved into."""
    try:
      yield
    except Exception as error:
      step, self._in_flight = self._in_flight, None
      self._abandoned = jax.process_count() > 1  # the others may be anywhere: no doing it together
      if not self._abandoned:
        with contextlib.suppress(Exception):  # it may raise the same error again
          self._manager.close()
      if jax.process_index() == 0:
        self._put_back_replaced()
      if not self._abandoned:
        self._manager = self._open()
      last = max((int(p.name) for p in self.directory.glob("*") if p.name.isdigit()), default=None)
      intact = "there is no earlier one" if last is None else (
          f"the last complete one is of step {last}, and the same command continues from it")
      raise CheckpointError(
          f"checkpoint of step {step} could not be written to {self.directory}: "
          f"{_first_line(error)}\nCheck the free space and the permissions there. No earlier "
          f"checkpoint is lost: {intact}") from error


def read_parameters(directory: str | pathlib.Path, params: Any) -> Any:
  """The parameters of the newest checkpoint in a directory, whatever its phase and optimiser.

  Args:
    directory: the `checkpoints` of another run; nothing in it is changed.
    params: parameters on the mesh, which say what is wanted and where. Heads, adapters and a critic
      that the other run did not have stay as they are here.

  Raises:
    CheckpointError: there is none, it is damaged, or it is of another model, or has an adapter that is
      not wanted.
  """
  orbax_noise.silence_logs()
  directory = pathlib.Path(directory).absolute()
  steps = sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())
  if not steps:
    raise CheckpointError(f"there is no checkpoint in {directory}")
  place = directory / str(steps[-1])
  leaves = _leaves({"params": params})
  try:
    record, _ = hostfile.read(place / "host")
  except hostfile.Unreadable as error:
    raise CheckpointError(f"{place} is damaged: {error}") from error
  saved = {name: text for name, text in record["state"].items() if name.startswith("params/")}
  stored = {path: leaf for path, leaf in leaves.items()
            if _name(path) in saved or not NEW_PARAMETERS.search(_name(path))}
  wanted = _describe(stored)
  if lost := sorted({name.split("/")[-2] for name in saved if ADAPTER.search(name)}
                    - {name.split("/")[-2] for name in wanted if ADAPTER.search(name)}):
    raise CheckpointError(f"{place} has the adapters {', '.join(lost)}, without which it is another model: list "
                          "them in config.model.adapters as that run did, or merge them: jaxrl export "
                          "--merge-adapters")
  if any(saved.get(name) != text for name, text in wanted.items()):
    differing = [f"{name}: {saved.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
                 for name in sorted(wanted) if saved.get(name) != wanted.get(name)]
    raise CheckpointError(f"{place} is of another model:\n  " + "\n  ".join(differing[:8])
                          + "\nconfig.model and the tokenizer must be those of that run")
  tree = traverse_util.unflatten_dict({path: _abstract(leaf) for path, leaf in stored.items()})
  try:
    with orbax_noise.quiet_about_abandoned_reads(CheckpointError):
      found = ocp.PyTreeCheckpointer().restore(place / "state", args=ocp.args.PyTreeRestore(
          item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
          partial_restore=True))
  except Exception as error:
    raise CheckpointError(f"{place} is damaged: {_first_line(error)}") from error
  values = traverse_util.flatten_dict(found)
  for name, value in _fingerprints(values).items():
    if value != record["fingerprints"].get(name, value):
      raise CheckpointError(f"{place} is damaged: {name} is not what was saved")
  return jax.tree.unflatten(jax.tree.structure(params),
                            [values.get(path, leaf) for path, leaf in leaves.items()])


class _Damaged(Exception):
  """A checkpoint's files are not what was saved."""


@contextlib.contextmanager
def _agreeing_on_damage() -> Iterator[None]:
  """Raises `_Damaged` on all processes if the body failed on any: all fall back together."""
  problem = ""
  try:
    yield
  except Exception as error:
    if isinstance(error, MemoryError) or any(text in str(error) for text in NOT_DAMAGE):
      raise
    known = isinstance(error, hostfile.Unreadable)
    problem = str(error) if known else f"{type(error).__name__}: {_first_line(error)}"
  if processes.meet("a checkpoint is read", flag=int(bool(problem))):
    raise _Damaged(problem or "another process could not read it")


def _leaves(tree: Any) -> dict[tuple[str, ...], Any]:
  """Leaves by path, in the order of `jax.tree.leaves`; containers without leaves have no part."""
  leaves = {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
  if () in leaves:
    raise TypeError("the state of a checkpoint is a bare leaf: wrap it in a dict")
  if len(leaves) != len(jax.tree.leaves(tree)):
    raise TypeError("two entries of the state have the same path once keys are written as text")
  for path, leaf in leaves.items():
    if _is_device(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      raise TypeError(f"{_name(path)} is a typed PRNG key: store jax.random.key_data of it")
  return leaves


def _name(path: tuple[str, ...]) -> str:
  return "/".join(path)


def _is_device(leaf: Any) -> bool:
  return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))


def _describe(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, str]:
  """Path -> dtype and shape, as in `params/bias: float32[64]`; host values say so."""
  def describe(leaf):
    if _is_device(leaf):
      return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    if isinstance(leaf, np.ndarray):
      return f"host {leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return f"host {type(leaf).__name__}"
  return {_name(path): describe(leaf) for path, leaf in leaves.items()}


def _abstract(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _fingerprints(arrays: Mapping[tuple[str, ...], jax.Array]) -> dict[str, int]:
  values = jax.device_get({_name(path): fingerprint(array) for path, array in arrays.items()})
  return {name: int(value) for name, value in values.items()}


def _as_type_of(leaf: Any, array: np.ndarray) -> Any:
  """A restored host value as what the structure asks for: array, NumPy or Python scalar."""
  if isinstance(leaf, np.ndarray):
    return array
  return array[()] if isinstance(leaf, np.generic) else type(leaf)(array.item())


def _first_line(error: BaseException) -> str:
  """At most 300 characters: where it begins, and the end, where the system's own reason stands."""
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  line = line.partition(" [tensorstore_spec=")[0]  # a thousand characters of what it tried to open
  return line if len(line) <= 300 else f"{line[:140]} ... {line[-140:]}"

