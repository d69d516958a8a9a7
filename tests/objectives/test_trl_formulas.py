"""Whole objectives against the formulas of TRL's GRPOTrainer, in float64 on padded tensors.

TRL pads `[sequences, completion]`, differentiates with PyTorch and averages with masks; written out
here from its documented equations ("loss_type", "importance_sampling_level", `beta`).
"""

import functools

import jax
import numpy as np
import pytest
import torch

from jaxrl.objectives import clipped_surrogate, kl
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms

LONGEST = 16.0
LOSS_TYPES = {"grpo": "sequence_mean", "bnpo": "token_mean", "dr_grpo": "constant"}


def pad(batch, per_token, sequences):
  """[sequences, 16] float64: the loss tokens of each sequence, then zeros."""
  result = np.zeros((len(sequences), int(LONGEST)))
  for k, (_, rows, columns) in enumerate(sequences):
    result[k, :len(rows)] = per_token[rows, columns]
  return torch.tensor(result)


def trl_loss(logprobs, old, reference, advantages, mask, *, loss_type, level, low, high, beta):
  log_ratio = logprobs - old
  if level == "sequence":
    log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
  ratio = torch.exp(log_ratio)
  clipped = torch.clamp(ratio, 1 - low, 1 + high)
  per_token = -torch.min(ratio * advantages[:, None], clipped * advantages[:, None])
  difference = reference - logprobs
  per_token = per_token + beta * (torch.exp(difference) - difference - 1)
  if loss_type == "grpo":
    return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
  if loss_type == "bnpo":
    return (per_token * mask).sum() / mask.sum().clamp(min=1)
  return (per_token * mask).sum() / (per_token.shape[0] * LONGEST)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_equal_trl_s(packed, loss_type, level):
  settings = dict(level=level, low=0.1, high=0.15)
  objective = sum_of_terms([functools.partial(clipped_surrogate, **settings),
                            functools.partial(kl, beta=0.04)])

  @jax.jit
  def run(outputs, batch):
    weights = loss_weights(batch, LOSS_TYPES[loss_type], constant=LONGEST)
    return jax.value_and_grad(lambda o: objective(o, batch, weights, mean_weights(batch))[0])(
        outputs)

  for seed in range(3):
    batch, outputs = packed.batch(seed)
    batch = batch.replace(weights=np.ones_like(batch.weights))
    value, gradient = run(outputs, batch)
    sequences = list(packed.sequences(batch))
    logprobs = pad(batch, outputs.logprobs, sequences).requires_grad_()
    mask = pad(batch, batch.loss_mask, sequences)
    loss = trl_loss(logprobs, pad(batch, batch.behaviour_logprobs, sequences),
                    pad(batch, batch.signals["reference_logprobs"], sequences),
                    pad(batch, batch.signals["advantages"], sequences)[:, 0], mask,
                    loss_type=loss_type, beta=0.04, **settings)
    loss.backward()
    packed.close(value, loss.item())
    packed.close(pad(batch, np.asarray(gradient.logprobs), sequences).numpy(),
                 logprobs.grad.numpy())
