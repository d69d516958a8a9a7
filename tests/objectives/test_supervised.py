"""Cross-entropy against PyTorch's, on logits."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives import cross_entropy
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms


def test_cross_entropy_and_its_gradient_equal_pytorch_s():
  rng = np.random.default_rng(0)
  trajectories = [Trajectory(rng.integers(0, 9, n), np.arange(n) >= start)
                  for n, start in [(7, 3), (12, 1), (2, 1), (5, 5)]]
  batch = pack(trajectories, row_length=16)
  logits = rng.normal(size=(*batch.tokens.shape, 9)).astype(np.float32)

  def loss(logits):
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[..., None], -1)[..., 0]
    return sum_of_terms([cross_entropy])(ModelOutputs(logprobs=logprobs), batch,
                                         loss_weights(batch, "token_mean"), mean_weights(batch))

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
  inputs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
  labels = torch.tensor(np.where(batch.loss_mask, batch.tokens, -100), dtype=torch.long)
  expected = torch.nn.functional.cross_entropy(inputs.reshape(-1, 9), labels.reshape(-1))
  expected.backward()
  np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
  np.testing.assert_allclose(metrics["nll"], expected.item(), rtol=1e-5)
  np.testing.assert_allclose(gradient, inputs.grad.numpy(), rtol=1e-5, atol=1e-7)


def test_off_the_loss_mask_nothing_is_read(packed):
  batch, outputs = packed.batch(0)
  for garbage in (np.nan, np.inf, -np.inf):
    spoiled = np.where(batch.loss_mask, outputs.logprobs, np.float32(garbage))
    gradient = jax.grad(
        lambda x: jnp.sum(cross_entropy(outputs.replace(logprobs=x), batch)[0]))(spoiled)
    np.testing.assert_array_equal(gradient, -batch.loss_mask.astype(np.float32))
