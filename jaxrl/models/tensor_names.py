"""Tensors of published models: which rows of which tensor each parameter here is."""

from collections.abc import Iterator
import dataclasses
import math

from jaxrl.models.decoder_config import DecoderConfig
from jaxrl.models.families import BY_ARCHITECTURE, SCORE

TEXT = "language_model."  # in front of every name, where the text part is one of several
NOT_TEXT = ("vision_tower.", "multi_modal_projector.")


@dataclasses.dataclass(frozen=True)
class Piece:
  """One parameter here, or one layer or expert of it, as rows of a published tensor.

  Attributes:
    path: of the parameter, below `params`; several pieces share one where layers or experts are
      stacked.
    layer, expert: which one it is of; None outside of layers or experts.
    stacked: whether layers are stacked, in front of experts, which always are.
    shape: here, without the axes of the stack.
    name: of the published tensor.
    rows: first and last of its rows, the last excluded, in each of its groups.
    groups: of rows, one after the other; 1, or as many as there are heads.
    columns: None if the tensor has one axis.
    transpose: whether it lies there as `[outputs, inputs]`.
  """

  path: tuple[str, ...]
  layer: int | None
  expert: int | None
  stacked: bool
  shape: tuple[int, ...]
  name: str
  rows: tuple[int, int]
  groups: int
  columns: int | None
  transpose: bool

  @property
  def slot(self) -> tuple[int, ...]:
    """Where in the stack the piece lies; () if it is the whole parameter."""
    return (self.layer,) * self.stacked + ((self.expert,) if self.expert is not None else ())


def tensors(decoder: DecoderConfig, architecture: str) -> dict[str, tuple[Piece, ...]]:
  """Published tensors of a decoder, in their order, each with the pieces that it is made of, in the
  order of its rows.

  The bias of the score, which published ones lack, the value head and a critic have no part in it.
  """
  family = BY_ARCHITECTURE[architecture]
  found: dict[str, tuple[Piece, ...]] = {}
  for piece in _pieces(decoder, family, architecture == family.classifier):
    if architecture == family.multimodal:
      piece = dataclasses.replace(piece, name=TEXT + piece.name)
    before = found.get(piece.name, ())
    start = before[-1].rows[1] if before else 0
    rows = (start, start + piece.rows[1])
    found[piece.name] = (*before, dataclasses.replace(piece, rows=rows))
  return found


def shape_of(pieces: tuple[Piece, ...]) -> tuple[int, ...]:
  """Shape of the published tensor that is made of these pieces."""
  last = pieces[-1]
  rows = last.groups * last.rows[1]
  return (rows,) if last.columns is None else (rows, last.columns)


def embedding_of(architecture: str) -> str:
  """The tensor of input embeddings."""
  return _prefix(architecture) + BY_ARCHITECTURE[architecture].names["embedding"] + ".weight"


def unembedding_of(architecture: str) -> str:
  """The tensor that makes logits, which files of tied models may hold a copy of."""
  return _prefix(architecture) + BY_ARCHITECTURE[architecture].names["unembedding"] + ".weight"


def ignored(architecture: str) -> tuple[str, ...]:
  """How the names of tensors begin that belong to other parts of a model than its text part."""
  return NOT_TEXT if _prefix(architecture) else ()


def _prefix(architecture):
  return TEXT if architecture == BY_ARCHITECTURE[architecture].multimodal else ""


def _pieces(c, family, classifies) -> Iterator[Piece]:
  table = (c.vocab_size,), (c.d_model,)
  yield _piece(c, ("embedding",), None, family.names["embedding"] + ".weight", *table)
  for layer in range(c.layers):
    yield from _layer(c, family, layer)
  yield from _norm(c, ("final_norm",), None, family.names["final_norm"], c.d_model)
  if classifies:
    yield _piece(c, (f"{SCORE}_head", "kernel"), None, "score.weight", (1,), (c.d_model,), transpose=True)
  elif not c.tie_embeddings:
    yield _piece(c, ("unembedding",), None, family.names["unembedding"] + ".weight", *table)


def _layer(c, family, layer) -> Iterator[Piece]:
  """The pieces of one layer."""
  names, at = family.names, f"{family.names['layers']}.{layer}."
  own = ("blocks",) if c.scan_layers else (f"blocks_{layer}",)
  d, f, heads, kv = (c.d_model,), (c.d_ff,), (c.heads, c.width), (c.kv_heads, c.width)
  groups = c.heads if family.by_head else 1

  def projection(part, ours, outputs, inputs, bias, groups=1):
    path, name = (*own, part, ours), at + names[ours]
    yield _piece(c, (*path, "kernel"), layer, name + ".weight", outputs, inputs, groups, transpose=True)
    if bias:
      yield _piece(c, (*path, "bias"), layer, name + ".bias", outputs, groups=groups)
  for ours, outputs in (("query", heads), ("key", kv), ("value", kv)):
    yield from projection("attention", ours, outputs, d, c.qkv_bias, groups)
  yield from projection("attention", "output", d, heads, c.output_bias)
  if c.qk_norm:
    for ours, (number, width) in (("query_norm", heads), ("key_norm", kv)):
      size = number * width if c.qk_norm_across_heads else width
      yield _piece(c, (*own, "attention", ours, "scale"), layer, f"{at}{names[ours]}.weight", (size,))
  if c.is_sparse[layer]:
    yield from _experts(c, names, at, (*own, "experts"), layer)
  else:
    for ours in ("gate", "up")[not c.gated_mlp:]:
      yield from projection("mlp", ours, f, d, c.mlp_bias)
    yield from projection("mlp", "down", d, f, c.mlp_bias)
  for ours, there in (("attention_norm", c.pre_norms), ("attention_post_norm", c.post_norms),
                      ("mlp_norm", c.pre_norms), ("mlp_post_norm", c.post_norms)):
    if there:
      yield from _norm(c, (*own, ours), layer, at + names[ours], c.d_model)


def _experts(c, names, at, path, layer) -> Iterator[Piece]:
  """The router of one layer, and its experts one by one."""
  d, f = (c.d_model,), (c.expert_d_ff,)
  yield _piece(c, (*path, "router", "kernel"), layer, f"{at}{names['router']}.weight", (c.experts,), d,
               transpose=True)
  for expert in range(c.experts):
    for ours, outputs, inputs in (("gate", f, d), ("up", f, d), ("down", d, f)):
      name = f"{at}{names['experts']}.{expert}.{names['expert_' + ours]}.weight"
      yield _piece(c, (*path, ours, "kernel"), layer, name, outputs, inputs, expert=expert, transpose=True)


def _norm(c, path, layer, name, size) -> Iterator[Piece]:
  yield _piece(c, (*path, "scale"), layer, name + ".weight", (size,))
  if c.norm == "layer":
    yield _piece(c, (*path, "bias"), layer, name + ".bias", (size,))


def _piece(c, path, layer, name, outputs, inputs=(), groups=1, *, expert=None, transpose=False):
  shape = (*inputs, *outputs) if transpose else (*outputs, *inputs)
  return Piece(path, layer, expert, c.scan_layers and layer is not None, shape, name,
               (0, math.prod(outputs) // groups), groups, math.prod(inputs) if inputs else None, transpose)
