"""How many directions the hidden states of a model use."""

import pathlib

import jax
import numpy as np

from jaxrl import data
from jaxrl import sharding
from jaxrl.batch import CRITIQUE, pack
from jaxrl.models import model_outputs
from jaxrl.training import inputs
from jaxrl.training.reward_models import RewardModel

TOGETHER = 64  # comparisons whose states are computed at a time


def effective_rank(features) -> float:
  """Exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007).

    p_i = s_i / sum of s,    rank = exp(-sum of p_i log p_i)

  Args:
    features: [n, d], not all 0.

  Returns:
    From 1, all rows on one line, to min(n, d), equal spread in all directions.
  """
  s = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
  p = s[s > 0] / s.sum()
  return float(np.exp(-np.sum(p * np.log(p))))


def of_reward_model(workdir: pathlib.Path) -> dict[str, float]:
  """`effective_rank` of the states that a run's reward model reads its scores from (JRM,
  arXiv:2602.07533), of both answers of its held-out pairs."""
  features = states_of(RewardModel.load(workdir, sharding.make_mesh(devices=jax.devices()[:1])))
  return {"effective_rank": effective_rank(features),
          "centred_rank": effective_rank(features - features.mean(axis=0))}


def states_of(model: RewardModel, *, layer: int = -1) -> np.ndarray:
  """The hidden state where each answer of the test pairs of a model's run ends. [answers, width]

  Args:
    model: on one device.
    layer: as in the signal `hidden@layer`; -1 is the final state.
  """
  config, found = model.config, []
  pairs = inputs.read_tasks(inputs.pair_builder(config, model.builder), inputs.open_split(config, "test"),
                            config.evaluate.pairs)
  signal = f"hidden@{layer}"
  read = jax.jit(lambda params, batch: model_outputs(model.decoder, params, batch, signals=(signal,),
                                                     logprobs=False).layers[signal])
  limit = config.data.max_completion_tokens
  for start in range(0, len(pairs), TOGETHER):
    some = [t for group, pair in enumerate(pairs[start:start + TOGETHER])
            for t in data.compared(pair, model.tokenizer, group=group, max_completion_tokens=limit)]
    batch = pack(some, row_length=config.batch.row_length)
    hidden = np.asarray(read(model.params, batch))
    for item in range(len(some)):
      own = (batch.sequence_ids == item) & batch.loss_mask & (batch.tag_ids != CRITIQUE)
      found.append(hidden[tuple(np.argwhere(own)[-1])])
  return np.array(found)
