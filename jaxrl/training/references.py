"""Losses on data of their own, whose gradients transformations of a phase's gradient read.

A mapping in a config says what differs from the phase: `data` (fields of `config.data`), `kind` (sft,
preference or reward), `objective`, `aggregation`, and how many `examples`, the first of the train split,
in how many `parts`. The batches become part of the optimiser's state.
"""

from collections.abc import Callable, Mapping
import copy
import dataclasses
from typing import Any

import jax
import ml_collections

from jaxrl import compose
from jaxrl import data
from jaxrl.batch import TokenBatch
from jaxrl.batch import pack
from jaxrl.models import DecoderConfig
from jaxrl.objectives.aggregate import Aggregation
from jaxrl.training import inputs
from jaxrl.training import refusals
from jaxrl.training.shapes import PAIRED
from jaxrl.training.shapes import shape_of

FIELDS = ("data", "kind", "objective", "aggregation", "examples", "parts")


@dataclasses.dataclass(frozen=True)
class Reference:
  """A loss and what it is taken of.

  Attributes:
    terms, aggregations: as in `learning.Learning`.
    batches: on the host, rows in order; shapes do not depend on the mesh, so that any mesh continues.
  """

  terms: list[Callable]
  aggregations: list[Aggregation]
  batches: list[TokenBatch]


def settings_of(spec: Mapping[str, Any], settings: ml_collections.ConfigDict, where: str
                ) -> tuple[ml_collections.ConfigDict, int]:
  """The settings of a phase that would train on a reference, and the parts of its examples.

  Raises:
    ValueError: a field that there is not, or numbers out of range.
  """
  if not isinstance(spec, Mapping):
    raise ValueError(f"{where}={spec!r} must be a mapping: dict(data=..., objective=[...])")
  for field in spec:
    if field not in FIELDS:
      raise ValueError(f"{where} has no field {field!r}{compose.nearest(field, FIELDS)}")
  own, more = copy.deepcopy(settings), dict(spec.get("data", {}))
  if "train" in more:
    own.data.task = ml_collections.ConfigDict(more.pop("task", {}))
  for field in more:
    if field not in own.data:
      raise ValueError(f"{where}.data has no field {field!r}{compose.nearest(field, own.data)}")
  own.data.update(more)
  own.kind = spec.get("kind", "sft" if settings.kind == "rl" else settings.kind)
  kinds = ("sft", *PAIRED)
  if own.kind not in kinds:
    raise ValueError(f"{where}.kind={own.kind!r}{compose.nearest(str(own.kind), kinds)}")
  own.objective = spec.get("objective", settings.objective)
  aggregation = spec.get("aggregation", {})
  own.aggregation.update({"kind": aggregation} if isinstance(aggregation, str) else aggregation)
  own.batch.examples, parts = spec.get("examples", settings.batch.examples), spec.get("parts", 1)
  if not (isinstance(parts, int) and 1 <= parts <= own.batch.examples):
    raise ValueError(f"{where}: parts={parts} must be 1 to examples={own.batch.examples}")
  return own, parts


def build(own: ml_collections.ConfigDict, parts: int, terms: list[Callable],
          aggregations: list[Aggregation], to_trajectories: Callable, *, decoder: DecoderConfig,
          mesh: jax.sharding.Mesh, tokenizer: data.Tokenizer, where: str) -> Reference:
  """Reads the data of a reference.

  Args:
    own, parts: of `settings_of`.
    to_trajectories: makes the sequences of a list of examples.
    where: in the config, for errors.

  Raises:
    ValueError: bad data, fewer usable rows than examples, or a term that remembers something.
  """
  for term in terms:
    if compose.initial_of(term):
      raise ValueError(f"{where}: {compose.name_of(term)} remembers something from batch to batch, and "
                       "a reference is no series of batches")
  examples = _examples(own, tokenizer, where, compose.ranges_of(terms))
  refusals.check_pairs(terms, [to_trajectories([example]) for example in examples[:inputs.FIRST_ROWS]],
                       where=f"{where}: ")
  size = -(-len(examples) // parts)
  return Reference(terms, aggregations, [
      _batch(own, to_trajectories(examples[start:start + size]), decoder, mesh)
      for start in range(0, len(examples), size)])


def _examples(own, tokenizer, where, ranges):
  source, wanted = inputs.open_split(own, "train"), own.batch.examples
  if source is None:
    raise ValueError(f"{where}.data.train is empty; name a file, tfds:NAME:SPLIT or task:NAME")
  tasks = inputs.builder(own, tokenizer)
  read = inputs.pair_builder(own, tasks, ranges).read if own.kind in PAIRED else tasks.read_solved
  found = []
  for index in range(len(source)):
    example = read(source, index)
    found += [] if example is None else [example]
    if len(found) == wanted:
      return found
  raise ValueError(f"{where}: {len(found)} usable rows, and examples={wanted} are wanted")


def _batch(own, trajectories, decoder, mesh):
  """Packed rows, to be gone through so many at a time as suit the mesh."""
  together = own.kind in PAIRED
  batch = pack(trajectories, row_length=own.batch.row_length, together=together)
  sizes = [batch.tokens.shape[1]] if together else []
  wanted = shape_of(own, decoder, mesh, sizes).micro_batch_rows
  return batch.replace(micro_batch_rows=min(batch.tokens.shape[0], 1 << (wanted.bit_length() - 1)))
