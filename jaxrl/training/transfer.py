"""Parameters from the trainer's devices to those that sample, without a detour over the host."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from jaxrl import chips
from jaxrl import sharding


def make_meshes(settings: Mapping[str, Any]) -> tuple[Mesh, Mesh]:
  """The meshes that train and that sample; one and the same unless some devices only sample.

  Args:
    settings: `config.mesh`. Its `sampling` says how many devices, the last ones, are left to
      sampling: the product of `data`, `fsdp` and `tensor`, or none if `data` is 0.

  Raises:
    ValueError: one of the meshes does not fit the devices; says what would.
  """
  axes = {axis: settings[axis] for axis in sharding.AXES}
  wanted = {axis: settings["sampling"][axis] for axis in sharding.AXES}
  if wanted["data"] == 0:
    mesh = sharding.make_mesh(**axes)
    return mesh, mesh
  devices = chips.devices()
  where = "config.mesh.sampling (" + ", ".join(f"{a}={n}" for a, n in wanted.items()) + ")"
  if min(wanted.values()) < 1:
    raise ValueError(f"{where}: every axis is a number of devices, at least 1; data=0 samples on "
                     "the devices that train")
  count = int(np.prod(list(wanted.values())))
  if count >= len(devices):
    raise ValueError(f"{where} takes {count} of {len(devices)} devices and leaves none to train: "
                     "use fewer, or --config.mesh.sampling.data=0 to sample where training is")
  try:
    mesh = sharding.make_mesh(**axes, devices=devices[:-count])
  except ValueError as error:
    raise ValueError(f"{error} (of {len(devices)} devices, {count} only sample, see "
                     "config.mesh.sampling)") from error
  return mesh, sharding.make_mesh(**wanted, devices=devices[-count:])


def copier(source: Any, mesh: Mesh) -> Callable[[Any], Any]:
  """A function that copies parameters to where they sample, whatever becomes of the originals.

  JAX copies from device to device where source and target are cut into the same pieces, and else
  passes everything through the host. So parameters are cut anew first, by a program on either side:
  on the target's if the source's pieces can be laid out there, on the source's otherwise.

  Args:
    source: shardings of the parameters, of one mesh of `sharding.make_mesh`.
    mesh: where the copies go: the same mesh, or one of other devices.

  Raises:
    ValueError: neither mesh can be cut as the other one is.
  """
  home = jax.tree.leaves(source)[0].mesh
  target = _moved(source, mesh)
  pieces, wanted = (tuple(m.shape[axis] for axis in ("fsdp", "tensor")) for m in (home, mesh))
  if mesh == home or pieces == wanted:
    return lambda params: jax.block_until_ready(jax.device_put(params, target, may_alias=False))
  if mesh.size % (pieces[0] * pieces[1]) == 0:
    between = _moved(source, _cut(mesh, pieces))
    cut = jax.jit(lambda params: params, out_shardings=target)
    return lambda params: jax.block_until_ready(cut(jax.device_put(params, between)))
  if home.size % (wanted[0] * wanted[1]) == 0:
    cut = jax.jit(lambda params: params, out_shardings=_moved(source, _cut(home, wanted)))
    return lambda params: jax.block_until_ready(jax.device_put(cut(params), target))
  raise ValueError(
      f"config.mesh cuts parameters into fsdp x tensor = {pieces[0] * pieces[1]} pieces, which do "
      f"not divide the {mesh.size} devices of config.mesh.sampling, and config.mesh.sampling into "
      f"{wanted[0] * wanted[1]}, which do not divide the {home.size} that train: make one of them "
      f"fit, such as --config.mesh.sampling.fsdp={pieces[0]} --config.mesh.sampling.tensor="
      f"{pieces[1]} with {pieces[0] * pieces[1]} devices or a multiple")


def _cut(mesh, pieces):
  """The devices of a mesh in the same order, with other sizes of `fsdp` and `tensor`."""
  return Mesh(mesh.devices.reshape(-1, *pieces), sharding.AXES,
              axis_types=(jax.sharding.AxisType.Auto,) * 3)


def _moved(shardings, mesh):
  return jax.tree.map(lambda s: NamedSharding(mesh, s.spec), shardings)
