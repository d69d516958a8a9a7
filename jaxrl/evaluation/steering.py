"""Whether demonstrations steer a reward model, and how sure they make it."""

import copy
import pathlib

import jax
import numpy as np

from jaxrl import sharding
from jaxrl.training import inputs
from jaxrl.training.reward_models import RewardModel

COUNTS = (0, 1, 2, 4, 8, 16)


def by_demonstrations(workdir: pathlib.Path, *, least_confidence: float = 0.01) -> dict[str, float]:
  """Pair accuracy of a run's model on its test pairs, by the number of demonstrations in front.

  Args:
    workdir: of a run whose `config.data.transforms` have `demonstrations` for its test split; the number
      of these is varied up to theirs.
    least_confidence: as in `objectives.beta_preference`, for runs with a second head.

  Returns:
    `accuracy_K` for every number K of `COUNTS` in reach; with a second head `confidence_K`, the mean of tau,
    and `confidence_growth`, its ratio of the largest number to none.
  """
  model, found = RewardModel.load(workdir, sharding.make_mesh(devices=jax.devices()[:1])), {}
  most = max(spec.get("k", 0) for spec in model.config.data.transforms)
  counts = [k for k in COUNTS if k <= most]
  for k in counts:
    scores = _scores(model, k)
    found[f"accuracy_{k}"] = float(np.mean(_right(scores[:, 0, 0], scores[:, 1, 0])))
    if scores.shape[-1] > 1:
      tau = least_confidence + np.logaddexp(0, scores[..., 1]).sum(axis=1)
      found[f"confidence_{k}"] = float(tau.mean())
  if f"confidence_{counts[-1]}" in found:
    found["confidence_growth"] = found[f"confidence_{counts[-1]}"] / found["confidence_0"]
  return found


def _right(chosen, rejected):
  return (chosen > rejected) + 0.5 * (chosen == rejected)


def _scores(model, k):
  """Heads at both answers of every test pair behind k demonstrations. [pairs, 2, heads]"""
  config = copy.deepcopy(model.config)
  config.data.transforms = [{**spec, "k": k, "fewest": k} if spec.get("name") == "demonstrations" else spec
                            for spec in map(dict, config.data.transforms)]
  pairs = inputs.read_tasks(inputs.pair_builder(config, model.builder), inputs.open_split(config, "test"),
                            config.evaluate.pairs)
  fields = config.data.chosen, config.data.rejected
  scores = model.scores([(pair.task, pair.task.row[name], True) for pair in pairs for name in fields])
  return np.array(scores, np.float64).reshape(len(pairs), 2, -1)
