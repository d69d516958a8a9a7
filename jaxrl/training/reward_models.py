"""A reward model that a run has trained, as a judge: scores of answers, in batches, on a mesh."""

from collections.abc import Sequence
import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxrl import data
from jaxrl import sharding
from jaxrl.batch import Task
from jaxrl.models import DecoderConfig
from jaxrl.models.outputs import VALUE_HEAD
from jaxrl.sampling import Likelihood
from jaxrl.training import inputs
from jaxrl.training import state as states
from jaxrl.training.checkpoints import read_parameters

LOADED = 4  # models that are kept


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """A trained model with heads that score, and all that it takes to ask it.

  Scores do not depend on what else is asked at the same time: every answer is a row of its own.

  Attributes:
    run: directory of the run that trained it.
    config: of that run.
    tokenizer, builder: of that run; they write what the model reads.
    decoder: its architecture.
    params: on the mesh.
    reader: what runs it.
  """

  run: pathlib.Path
  config: ml_collections.ConfigDict
  tokenizer: data.Tokenizer
  builder: data.TaskBuilder
  decoder: DecoderConfig
  params: Any
  reader: Likelihood

  @classmethod
  def load(cls, run: str | pathlib.Path, mesh: jax.sharding.Mesh | None = None) -> "RewardModel":
    """The newest checkpoint of a run. Reading it again gives the model that is there already.

    Args:
      run: the --workdir of a run whose model has a head beside the value.
      mesh: that it is distributed over; all devices along `data` if None.

    Raises:
      ValueError: there is no such run, or its model has no such head.
      CheckpointError: its checkpoint is damaged.
    """
    place = pathlib.Path(run).absolute()
    check(place)
    newest = max(int(p.name) for p in (place / "checkpoints").glob("[0-9]*"))
    return _load(place, mesh or sharding.make_mesh(), newest)

  def scores(self, asked: Sequence[tuple[Task, str, bool]]) -> list[np.ndarray | ValueError]:
    """What the heads say at the end of each answer. [heads] each, float32

    Args:
      asked: a task, whose row has the fields that the model's prompts are made of, an answer to it,
        and whether the answer is whole; one that was cut off is read without EOS.

    Returns:
      For each, the numbers of all heads but `value`, in the order of the config; or why the model
      cannot read it.
    """
    sequences, found = [], []
    for task, text, whole in asked:
      try:
        sequences.append(self.sequence(task, text, whole))
        found.append(None)
      except ValueError as error:
        found.append(error)
    if sequences:
      read = iter(self.reader.scores(self.params["params"], sequences))
      found = [next(read)[-1] if x is None else x for x in found]
    return found

  def sequence(self, task: Task, text: str, whole: bool) -> list[int]:
    """Token ids of a prompt and an answer, as in the run's own training.

    Raises:
      ValueError: the row lacks a field, or the tokenizer cannot write it.
    """
    own = self.builder.parse(task.row or {}, f"task {task.id!r}", False)
    limit = self.config.data.max_completion_tokens
    trajectory = data.supervised(dataclasses.replace(own, solution=text), self.tokenizer,
                                 max_completion_tokens=limit)
    ids = trajectory.tokens.tolist()
    return ids[:-1] if trajectory.finish == "stop" and not whole else ids


def check(run: str | pathlib.Path) -> int:
  """How many numbers the heads of a run's model give.

  Raises:
    ValueError: there is no run with a checkpoint, or its model has no head but the value.
  """
  place = pathlib.Path(run)
  for needed in ("config.json", "tokenizer", "checkpoints"):
    if not (place / needed).exists():
      raise ValueError(f"run={str(run)!r} has no {needed}: name the --workdir of a run that has "
                       "trained a reward model and saved a checkpoint")
  if not any((place / "checkpoints").glob("[0-9]*")):
    raise ValueError(f"run={str(run)!r} has no checkpoint yet")
  heads = json.loads((place / "config.json").read_text())["model"]["heads_on_top"]
  count = sum(width for name, width in heads if name != VALUE_HEAD)
  if not count:
    raise ValueError(f"run={str(run)!r} has trained no reward model: its config.model.heads_on_top="
                     f"{heads} has no head beside the value")
  return count


@functools.lru_cache(maxsize=LOADED)
def _load(place, mesh, newest):
  del newest  # one that has been trained on is another model
  config = ml_collections.ConfigDict(json.loads((place / "config.json").read_text()))
  tokenizer = data.load_tokenizer(place / "tokenizer")
  decoder = inputs.decoder_config(config.model, tokenizer.vocab_size)
  sharding.check_divisible(decoder, mesh)
  rng = jax.random.key_data(jax.random.key(0))
  params = read_parameters(place / "checkpoints", states.initial_parameters(decoder, rng, mesh))
  return RewardModel(place, config, tokenizer, inputs.builder(config, tokenizer), decoder, params,
                     Likelihood(decoder, mesh=mesh))


def rating(heads: np.ndarray, head: int, levels: int) -> float:
  """One number from those of the heads: that of one head, or with `levels` the expected rating
  `1 + sum of s(z_k)` of `objectives.ordinal`, whose first logit is `head`."""
  if not levels:
    return float(heads[head])
  z = heads[head:head + levels - 1].astype(np.float64)
  return 1 + math.fsum(1 / (1 + np.exp(-z)))
