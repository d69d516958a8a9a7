"""A reward model that a run has trained, as a judge: scores of answers, in batches, on a mesh."""

from collections.abc import Sequence
import dataclasses
import functools
import json
import math
import operator
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxrl import compose
from jaxrl import config as configs
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
    return _load(place, mesh or sharding.make_mesh(), newest(place))

  def scores(self, asked: Sequence[tuple[Task, str, bool]]) -> list[np.ndarray | ValueError]:
    """What the heads say at the end of each answer, or of its last step. [heads] each, float32

    Args:
      asked: a task, whose row has the fields that the model's prompts are made of, an answer to it,
        and whether the answer is whole; one that was cut off is read without EOS.

    Returns:
      For each, the numbers of all heads but `value`, in the order of the config, and the verdict; or why
      the model cannot read it.
    """
    return [x if isinstance(x, ValueError) else x[-1] for x in self.step_scores(asked)]

  def step_scores(self, asked: Sequence[tuple[Task, str, bool]]) -> list[np.ndarray | ValueError]:
    """As `scores`, at the end of every step. [steps, heads] each

    Steps end with `data.step_end` of the model's run; without `data.step_labels` there is one.
    """
    sequences, places, found = [], [], []
    for task, text, whole in asked:
      try:
        ids, ends = self._read(task, text, whole)
        sequences.append(ids)
        places.append(ends)
        found.append(None)
      except ValueError as error:
        found.append(error)
    if sequences:
      read = zip(self.reader.scores(self.params["params"], sequences), places)
      found = [operator.getitem(*next(read)) if x is None else x for x in found]
    return found

  def sequence(self, task: Task, text: str, whole: bool) -> list[int]:
    """Token ids of a prompt and an answer, as in the run's own training.

    Raises:
      ValueError: the row lacks a field, or the tokenizer cannot write it.
    """
    return self._read(task, text, whole)[0]

  def _read(self, task, text, whole):
    """Token ids, and the places at which the answer or a step of it ends."""
    d = self.config.data
    own = self.builder.parse(task.row or {}, f"task {task.id!r}", False, solution=text)
    limit = dict(max_completion_tokens=d.max_completion_tokens)
    if d.get("step_labels"):
      steps = [(step, 1.0) for step in data.split_steps(text, d.step_end)]
      trajectory = data.stepwise(own, steps, self.tokenizer, end_id=self.builder.turn_end, **limit)
      if not trajectory.loss_mask.any():
        raise ValueError(f"there is no whole step in {text[:60]!r}")
      return trajectory.tokens.tolist(), np.flatnonzero(trajectory.loss_mask)
    trajectory = data.supervised(own, self.tokenizer, **limit)
    ids = trajectory.tokens.tolist()
    # What a template writes behind an answer ends it, whole or not.
    bare = self.builder.solution_template == data.AS_IT_IS
    ids = ids[:-1] if trajectory.finish == "stop" and bare and not whole else ids
    return ids, np.array([len(ids) - 1])


def check(run: str | pathlib.Path) -> int:
  """How many numbers the heads of a run's model give.

  Raises:
    ValueError: there is no run with a checkpoint, or its model has no head but the value.
  """
  place = pathlib.Path(run)
  configs.check_run(place, f"run={str(run)!r}", "name the --workdir of a run that has trained a reward "
                    "model and saved a checkpoint")
  newest(place)
  model = _model_of(place)
  count = sum(width for name, width in model["heads_on_top"] if name != VALUE_HEAD)
  count += bool(model.get("verdict"))
  if not count:
    raise ValueError(f"run={str(run)!r} has trained no reward model: its config.model.heads_on_top="
                     f"{model['heads_on_top']} has no head beside the value, and there is no verdict")
  return count


def newest(run: str | pathlib.Path) -> int:
  """The number of a run's last checkpoint; one that is being saved, or was given up, is none.

  Raises:
    ValueError: there is none.
  """
  numbers = [int(p.name) for p in (pathlib.Path(run) / "checkpoints").glob("[0-9]*") if p.name.isdigit()]
  if not numbers:
    raise ValueError(f"run={str(run)!r} has no checkpoint yet")
  return max(numbers)


def index_of(run: str | pathlib.Path, head: int | str) -> int:
  """The number of a head: itself, or the first of those that a name of `heads_on_top` has; "yes_no" is the
  verdict.

  Raises:
    ValueError: no head of that name.
  """
  if not isinstance(head, str):
    return head
  model, names = _model_of(pathlib.Path(run)), []
  for name, width in model["heads_on_top"]:
    names += [name] * width * (name != VALUE_HEAD)
  names += ["yes_no"] * bool(model.get("verdict"))
  if head not in names:
    raise ValueError(f"the model of run={str(run)!r} has no head {head!r}{compose.nearest(head, names)}")
  return names.index(head)


def _model_of(place):
  """`config.model` of a run."""
  return json.loads((place / "config.json").read_text())["model"]


@functools.lru_cache(maxsize=LOADED)
def _load(place, mesh, newest):
  del newest  # one that has been trained on is another model
  config = configs.of_run(place)
  tokenizer = data.load_tokenizer(place / "tokenizer")
  decoder = inputs.decoder_config(config.model, tokenizer)
  sharding.check_divisible(decoder, mesh)
  rng = jax.random.key_data(jax.random.key(0))
  params = read_parameters(place / "checkpoints", states.initial_parameters(decoder, rng, mesh))
  return RewardModel(place, config, tokenizer, inputs.builder(config, tokenizer), decoder, params,
                     Likelihood(decoder, mesh=mesh))


def rating(heads: np.ndarray, head: int, levels: int, ordered: bool = False) -> float:
  """One number from those of the heads: that of one head, or with `levels` the expected rating
  `1 + sum of s(z_k)` of `objectives.ordinal`, whose first number is `head`."""
  if not levels:
    return float(heads[head])
  z = heads[head:head + levels - 1 + ordered].astype(np.float64)
  if ordered:
    z = z[0] - np.cumsum([z[1], *np.logaddexp(0, z[2:])])
  return 1 + math.fsum(1 / (1 + np.exp(-z)))
