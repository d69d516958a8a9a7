"""How an update and a decoding step scale: FLOPs, bytes, collectives and time for any mesh.

What a step communicates is not guessed: it is read from compiled programs (`hlo.py`) and scaled.
A program partitioned over `data x fsdp x tensor` has three sorts of collectives: those of weights
and gradients over `fsdp` (a device's part falls with `tensor`), those of gradient slices over
`data` (it falls with `fsdp x tensor`), and those of activations over `tensor` (it grows with the
rows of a micro-batch). FLOPs and memory are counted here from the model's shape.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math

import numpy as np

from jaxrl import chips

AXES = ("data", "fsdp", "tensor")
ACTIVATION_OPS = ("all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Shape:
  """Shape of a decoder; fields as in `jaxrl.models.DecoderConfig`."""

  vocab_size: int
  layers: int
  d_model: int
  heads: int
  kv_heads: int
  d_ff: int
  tie_embeddings: bool = False
  qkv_bias: bool = False

  @property
  def width(self) -> int:
    """Of one head."""
    return self.d_model // self.heads

  @property
  def layer_products(self) -> int:
    """Parameters of a layer that are factors of matrix products."""
    attention = self.d_model * self.width * 2 * (self.heads + self.kv_heads)
    return attention + 3 * self.d_model * self.d_ff

  @property
  def vocabulary(self) -> int:
    """Parameters of the output embedding."""
    return self.vocab_size * self.d_model

  @property
  def products(self) -> int:
    """Parameters that are factors of matrix products, the output embedding included."""
    return self.layers * self.layer_products + self.vocabulary

  @property
  def parameters(self) -> int:
    """All of them."""
    norms = (2 * self.layers + 1) * self.d_model
    biases = self.layers * self.width * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
    return self.products + norms + biases + (0 if self.tie_embeddings else self.vocabulary)

  @property
  def cache_bytes(self) -> int:
    """Of keys and values of one token in bfloat16."""
    return 2 * 2 * self.layers * self.kv_heads * self.width


SHAPES = {  # Llama 3: arXiv:2407.21783, table 3; Qwen2.5: arXiv:2412.15115, table 1
    "8b": Shape(128_256, 32, 4096, 32, 8, 14_336),
    "70b": Shape(128_256, 80, 8192, 64, 8, 28_672),
    "qwen2.5-0.5b": Shape(151_936, 24, 896, 14, 2, 4864, tie_embeddings=True, qkv_bias=True),
    "qwen2.5-1.5b": Shape(151_936, 28, 1536, 12, 2, 8960, tie_embeddings=True, qkv_bias=True),
    "toy": Shape(512, 2, 64, 8, 8, 128),
}


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each axis; neighbouring ids differ in `tensor` first, then `fsdp`."""

  data: int
  fsdp: int
  tensor: int

  @property
  def size(self) -> int:
    """Number of devices."""
    return self.data * self.fsdp * self.tensor

  @property
  def wide(self) -> tuple[str, ...]:
    """Axes with more than one device."""
    return tuple(axis for axis in AXES if getattr(self, axis) > 1)

  def group(self, axes: Sequence[str]) -> list[int]:
    """Devices that differ from device 0 in these axes only."""
    ids = np.arange(self.size).reshape(self.data, self.fsdp, self.tensor)
    return ids[tuple(slice(None) if a in axes else 0 for a in AXES)].reshape(-1).tolist()

  def axes_of(self, group: Sequence[int]) -> tuple[str, ...]:
    """Axes that the devices of a group differ in."""
    places = np.unravel_index(list(group), (self.data, self.fsdp, self.tensor))
    return tuple(axis for axis, place in zip(AXES, places) if len(set(place.tolist())) > 1)

  def __str__(self) -> str:
    return f"{self.data}x{self.fsdp}x{self.tensor}"


@dataclasses.dataclass(frozen=True)
class Load:
  """What one update does.

  Attributes:
    kind: `sft`, or `grpo`: with a pass of the reference before the update.
    length: tokens of a row.
    rows: of a micro-batch, for each of the data x fsdp shares.
    micro_batches: one after the other.
    chunk: of the vocabulary.
  """

  kind: str
  length: int
  rows: int
  micro_batches: int
  chunk: int = 4096

  def tokens(self, mesh: Mesh) -> int:
    """Of the whole update."""
    return self.length * self.rows * self.micro_batches * mesh.data * mesh.fsdp


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind in an update: all of one `op` over the same mesh axes.

  Attributes:
    payload: bytes, summed over all that run.
    times: how many run.
  """

  op: str
  axes: tuple[str, ...]
  payload: float
  times: float


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled update, as measured in its HLO: where it ran and what it communicates."""

  mesh: Mesh
  load: Load
  flops: float
  traffic: tuple[Traffic, ...]


def scale(program: Program, mesh: Mesh, load: Load) -> tuple[Traffic, ...]:
  """The collectives of the same update on another mesh, with other numbers of rows."""
  old, was = program.mesh, program.load
  passes = load.micro_batches / was.micro_batches
  found = []
  for t in program.traffic:
    axes = tuple(a for a in t.axes if a in mesh.wide)
    if not axes:
      continue
    if t.axes == ("tensor",) or t.op in ACTIVATION_OPS:
      factor = load.rows / was.rows
    elif "fsdp" in t.axes:
      factor = old.tensor / mesh.tensor
    else:
      factor = old.fsdp * old.tensor / (mesh.fsdp * mesh.tensor)
    found.append(Traffic(t.op, axes, t.payload * factor * passes, t.times * passes))
  return tuple(found)


def update_flops(shape: Shape, mesh: Mesh, load: Load) -> float:
  """FLOPs per device of matrix products of an update, full rematerialisation included.

  Per parameter and token of a layer: 2 forward, 2 once more, 4 backward; the last product of a
  layer is not computed again. The vocabulary's logits are computed once more too. Attention is
  over all pairs of positions of a row: two products forward, two once more, four backward.
  """
  tokens = load.rows * load.length * load.micro_batches
  layer = 8 * shape.layer_products - 2 * shape.d_model * shape.d_ff
  pairs = 2 * load.length * shape.heads * shape.width  # a product, per token and layer
  total = shape.layers * (layer + 8 * pairs) + 8 * shape.vocabulary
  if load.kind == "grpo":
    total += shape.layers * (2 * shape.layer_products + 2 * pairs) + 2 * shape.vocabulary
  return total * tokens / mesh.tensor


def useful_flops(shape: Shape, length: int, tokens: float) -> float:
  """FLOPs of forward and backward pass without anything twice: what MFU counts.

  6 per parameter of a matrix product and token, and attention over half of all pairs.
  """
  attention = 6 * length * shape.heads * shape.width * shape.layers
  return tokens * (6 * shape.products + attention)


# ------------------------------------------------------------------------------------------ memory


def state_bytes(shape: Shape, mesh: Mesh, kind: str) -> float:
  """Per device: float32 parameters, two moments, and the reference of GRPO."""
  return shape.parameters * 4 * (4 if kind == "grpo" else 3) / (mesh.fsdp * mesh.tensor)


def score_bytes(shape: Shape, mesh: Mesh, load: Load) -> float:
  """Per device: one float32 array of the attention scores of a layer."""
  return 4.0 * load.rows * load.length ** 2 * shape.heads / mesh.tensor


def working_bytes(shape: Shape, mesh: Mesh, load: Load, *, scores: bool) -> float:
  """Per device: what an update needs beside its state, at its peak; an estimate.

  Args:
    scores: attention scores exist in memory (three arrays at a time), as without a fused kernel.
  """
  share, tokens = mesh.fsdp * mesh.tensor, load.rows * load.length
  # The sum over micro-batches, and the gradient of one, which the scan over layers stacks up.
  gradients = 2 * 4 * shape.parameters / share
  table = 2 * 4 * shape.vocabulary / mesh.tensor if mesh.fsdp > 1 else 0  # and its gradient, whole
  weights = 2 * 2 * shape.layer_products / mesh.tensor if mesh.fsdp > 1 else 0  # two layers
  inputs = 2 * tokens * shape.d_model * shape.layers  # of every layer, for the backward pass
  one_layer = 2 * tokens * (8 * shape.d_model + (
      4 * shape.d_ff + 2 * shape.width * (shape.heads + shape.kv_heads)) / mesh.tensor)
  logits = 3 * 4 * tokens * min(load.chunk, shape.vocab_size) / mesh.tensor
  attention = 3 * score_bytes(shape, mesh, load) if scores else 0
  return gradients + table + weights + inputs + max(one_layer + attention, logits)


def moved_bytes(shape: Shape, mesh: Mesh, load: Load, *, scores: bool) -> float:
  """Per device: memory traffic of an update; an estimate.

  Weights are gathered twice and read three times per micro-batch, whose gradient is written, read
  and added up; the optimiser reads and writes 28 bytes per parameter, and each of four passes reads
  and writes a layer's activations.
  """
  share, passes = mesh.fsdp * mesh.tensor, load.micro_batches
  tokens = load.rows * load.length
  weights = 7 * 2 * shape.products / mesh.tensor + 16 * shape.parameters / share
  wide = 6 * shape.d_ff + 4 * shape.width * (shape.heads + shape.kv_heads)
  activations = 4 * 2 * tokens * shape.layers * (10 * shape.d_model + wide / mesh.tensor)
  attention = 18 * score_bytes(shape, mesh, load) * shape.layers if scores else 0
  return passes * (weights + activations + attention) + 28 * shape.parameters / share


# -------------------------------------------------------------------------------------------- time


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of an update, each as if it were alone.

  Attributes:
    compute, memory: at the machine's peak.
    weights: collectives over `fsdp` and `data`, which run beside the compute.
    tensor: those over `tensor`, which the next product waits for.
  """

  compute: float
  memory: float
  weights: float
  tensor: float

  @property
  def step(self) -> float:
    """Seconds of the whole, at best."""
    return max(self.compute, self.memory, self.weights) + self.tensor

  @property
  def serial(self) -> float:
    """Seconds of the whole if no collective ran beside compute."""
    return max(self.compute, self.memory) + self.weights + self.tensor

  @property
  def bound(self) -> str:
    """What most of the time is spent on."""
    parts = {"compute": self.compute, "HBM": self.memory,
             "interconnect (weights)": self.weights, "interconnect (tensor)": self.tensor}
    return max(parts, key=parts.get)


def times(shape: Shape, mesh: Mesh, load: Load, traffic: Sequence[Traffic],
          machine: chips.Machine, *, scores: bool = False) -> Times:
  """Roofline of an update; `scores` as in `moved_bytes`."""
  seconds = {True: 0.0, False: 0.0}
  for t in traffic:
    one = machine.collective_seconds(t.op, t.payload / t.times, mesh.group(t.axes),
                                     len(mesh.wide))
    seconds[t.axes == ("tensor",)] += t.times * one
  return Times(update_flops(shape, mesh, load) / machine.flops,
               moved_bytes(shape, mesh, load, scores=scores) / machine.hbm_rate,
               seconds[False], seconds[True])


def meshes(devices: int, shape: Shape, rows: int) -> Iterator[tuple[Mesh, Load]]:
  """Every mesh of powers of two on which a model splits evenly, and how `rows` go over it.

  Yields:
    The mesh, and (rows per share in a micro-batch, micro-batches) for 1, 2, ... rows at a time.
  """
  for tensor in (1, 2, 4, 8):
    if devices % tensor or shape.kv_heads % tensor:
      continue
    shares = devices // tensor
    if shares > rows or rows % shares:
      continue
    for power in range(int(math.log2(shares)) + 1):
      mesh = Mesh(shares >> power, 1 << power, tensor)
      each = rows // shares
      for at_once in (1, 2, 4, 8):
        if each % at_once == 0:
          yield mesh, (at_once, each // at_once)
