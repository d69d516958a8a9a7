"""Low-rank adapters: what is learned beside frozen matrices (LoRA, arXiv:2106.09685).

`config.model.adapters` names them. Beside the kernel `W` of each matrix that its `targets` match, an
adapter has two matrices in float32, and all adapters of a model act together:

    y = x W + sum over adapters of scale * (x A) B,      A: inputs x rank,   B: rank x outputs

`scale` is `alpha / rank`, or `alpha / sqrt(rank)` with `rank_stabilized` (rsLoRA, arXiv:2312.03732). `A` is
drawn as PEFT draws it and `B` is 0, so that a new adapter changes nothing. Experts have none, but their
router has. In a model with adapters nothing else is trained but heads and a critic: gradients, moments and
frozen models are of these parameters only.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxrl.compose import nearest

A, B = "lora_a", "lora_b"  # of an adapter, below its name, below the module of the matrix
RESERVED = ("kernel", "bias", "scale", "blocks", "base")  # names beside it, above it, and of its base's directory
BLOCK = re.compile(r"blocks(_(\d+))?")  # one layer; or all in one stack, with `scan_layers`


@dataclasses.dataclass(frozen=True)
class Adapter:
  """One adapter.

  Attributes:
    name: a word.
    rank: of what is added to a matrix, at most.
    alpha: numerator of the scale.
    targets: pattern that is searched for in the names of matrices without their layer, such as
      `attention.query` or `mlp.down`.
    layers: numbers of the layers that have it; () is all.
    rank_stabilized: the scale falls with the root of the rank.
  """

  name: str
  rank: int = 8
  alpha: float = 16.0
  targets: str = "attention|mlp"
  layers: tuple[int, ...] = ()
  rank_stabilized: bool = False

  @property
  def scale(self) -> float:
    """What the product of the two matrices is multiplied with."""
    return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

  def covers(self, module: Sequence[str]) -> bool:
    """Whether the module at a path, such as `("blocks_3", "attention", "query")`, gets it."""
    block = BLOCK.fullmatch(module[0])
    if not block or not re.search(self.targets, ".".join(module[1:])):
      return False
    return not (self.layers and block[2]) or int(block[2]) in self.layers


def read(specs: Mapping[str, Any]) -> tuple[Adapter, ...]:
  """The adapters that `config.model.adapters` describes.

  Raises:
    ValueError: a name that is no word, an unknown field, or a value out of range.
  """
  fields = [field.name for field in dataclasses.fields(Adapter) if field.name != "name"]
  found = []
  for name, spec in specs.items():
    where = f"config.model.adapters.{name}"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in RESERVED:
      raise ValueError(f"{where}: an adapter is called by a word of small letters, digits and '_', other than "
                       f"{', '.join(RESERVED)}")
    if not hasattr(spec, "items"):
      raise ValueError(f"{where}={spec!r}, but it is a section: dict(rank=..., alpha=..., targets=...)")
    if unknown := [field for field in spec if field not in (*fields, "source")]:
      raise ValueError(f"{where} has no field {unknown[0]!r}{nearest(unknown[0], [*fields, 'source'])}")
    own = {field: value for field, value in spec.items() if field != "source"}  # it has filled the others in
    own["layers"] = _layers(own.get("layers", ()), where)
    found.append(_checked(Adapter(name, **own), where))
  return tuple(found)


def _layers(given, where):
  if isinstance(given, str) or not all(type(layer) is int for layer in given):
    raise ValueError(f"{where}.layers={given!r} must list numbers of layers, from 0; () is all")
  return tuple(sorted(set(given)))


def _checked(adapter, where):
  if type(adapter.rank) is not int or adapter.rank < 1:
    raise ValueError(f"{where}.rank={adapter.rank!r} must be a whole number, at least 1")
  if type(adapter.alpha) not in (int, float) or not adapter.alpha > 0:
    raise ValueError(f"{where}.alpha={adapter.alpha!r} must be a positive number; with alpha=rank the scale "
                     "is 1")
  if type(adapter.rank_stabilized) is not bool:
    raise ValueError(f"{where}.rank_stabilized={adapter.rank_stabilized!r} must be True or False")
  try:
    re.compile(adapter.targets)
  except (re.error, TypeError) as error:
    raise ValueError(f"{where}.targets={adapter.targets!r} is no regular expression: {error}") from error
  return adapter


def check_layers(adapters: Sequence[Adapter], layers: int) -> None:
  """Refuses layers that a model of so many does not have.

  Raises:
    ValueError: names them.
  """
  for adapter in adapters:
    if lost := [layer for layer in adapter.layers if not 0 <= layer < layers]:
      raise ValueError(f"adapters.{adapter.name}.layers names {lost}, but there are layers 0 to {layers - 1}")


def check_targets(adapters: Sequence[Adapter], params: PyTree) -> None:
  """Refuses adapters that have no matrix.

  Args:
    params: of the model, `{"params": ...}`; shapes are enough.

  Raises:
    ValueError: with the names of all matrices.
  """
  paths = list(traverse_util.flatten_dict(params["params"]))
  there = sorted({".".join(path[1:-1]) for path in paths if path[-1] == "kernel" and BLOCK.fullmatch(path[0])})
  for adapter in adapters:
    if not any(path[-2:] == (adapter.name, A) for path in paths):
      raise ValueError(f"config.model.adapters.{adapter.name}.targets={adapter.targets!r} matches no matrix; "
                       f"there are {', '.join(there)}")


class LowRank(nn.Module):
  """What an adapter adds to the outputs of one matrix.

  Attributes:
    adapter: its settings.
    inputs, outputs: logical axes of the matrix.
    shape: of the outputs.
    dtype: of the computation.
  """

  adapter: Adapter
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]
  shape: tuple[int, ...]
  dtype: str

  @nn.compact
  def __call__(self, x):
    n, rank = len(self.inputs), self.adapter.rank
    # Uniform in +-1 / sqrt(inputs), as nn.Linear and so PEFT has it.
    draw = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=tuple(range(n)))
    a = self.param(A, nn.with_logical_partitioning(draw, (*self.inputs, "rank")),
                   (*x.shape[-n:], rank), jnp.float32)
    b = self.param(B, nn.with_logical_partitioning(nn.initializers.zeros, ("rank", *self.outputs)),
                   (rank, *self.shape), jnp.float32)
    low = jnp.tensordot(x, a.astype(self.dtype), n)
    return jnp.tensordot(low, (self.adapter.scale * b).astype(self.dtype), 1)  # rounded once


def of_module(module: nn.Module, adapters: Sequence[Adapter]) -> list[Adapter]:
  """Those that a module has, or gets while it is initialised."""
  if module.is_initializing():
    return [adapter for adapter in adapters if adapter.covers(module.path)]
  return [adapter for adapter in adapters if module.has_variable("params", adapter.name)]


def without_other_layers(params: PyTree, adapters: Sequence[Adapter]) -> PyTree:
  """New parameters of a decoder, with A = 0 in those layers of a stack that an adapter leaves out.

  Where A and B are 0, so are both gradients, and no update will move them.
  """
  layers, flat = {a.name: a.layers for a in adapters if a.layers}, traverse_util.flatten_dict(params)

  def kept(x, wanted):
    chosen = jnp.isin(jnp.arange(len(x)), jnp.array(wanted))
    return jnp.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
  for path, x in flat.items():
    if path[0] == "blocks" and path[-1] == A and path[-2] in layers:
      flat[path] = jax.tree.map(lambda x, wanted=layers[path[-2]]: kept(x, wanted), x)  # x may be boxed
  return traverse_util.unflatten_dict(flat)


def trained(params: PyTree, adapters: Sequence[Adapter], names: Sequence[str] = ()) -> PyTree:
  """The part of the parameters that updates change: all of them, in a model without adapters.

  Args:
    params: `{"params": ...}`, and a critic if there is one; boxed or not.
    adapters: of the model.
    names: of the adapters that are trained; () is all.
  """
  if not adapters:
    return params
  names = names or [adapter.name for adapter in adapters]
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict({path: x for path, x in flat.items() if (
      path[0] != "params" or path[1].endswith("_head") or path[-1] in (A, B) and path[-2] in names)})


def joined(params: PyTree, part: PyTree) -> PyTree:
  """The parameters with a part, such as `trained` gives, in place of what they hold there."""
  return traverse_util.unflatten_dict(traverse_util.flatten_dict(params) | traverse_util.flatten_dict(part))


def off(params: PyTree) -> PyTree:
  """The same, or a part of them, with adapters that change nothing."""
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict({path: jnp.zeros_like(x) if path[-1] == B else x
                                       for path, x in flat.items()})


def merged(params: PyTree, adapters: Sequence[Adapter]) -> PyTree:
  """The parameters of a model without these adapters, which its matrices hold instead.

  The sum is made in float32 and rounded once, to the type of the matrix.
  """
  scales, flat = {adapter.name: adapter.scale for adapter in adapters}, traverse_util.flatten_dict(params)
  sums: dict[tuple[str, ...], Any] = {}
  for path in [path for path in flat if path[-1] == A and path[-2] in scales]:
    a, b, kernel = flat.pop(path), flat.pop((*path[:-1], B)), (*path[:-2], "kernel")
    before = sums.get(kernel, flat[kernel].astype(jnp.float32))
    sums[kernel] = before + scales[path[-2]] * _product(a, b, stacked="blocks" in path)
  return traverse_util.unflatten_dict({**flat, **{path: x.astype(flat[path].dtype) for path, x in sums.items()}})


def _product(a, b, stacked):
  """A B, of every layer of a stack. [(layers), inputs..., outputs...]"""
  def one(a, b):
    return jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
  return (jax.vmap(one) if stacked else one)(a, b)
