"""How losses per token become one number: weights of tokens, and the sum of terms.

The weights belong to a whole optimiser step; a micro-batch takes its rows of them. What is summed
with them then adds up over micro-batches and devices to the same loss, gradient and metrics:

  weights, means = loss_weights(batch, "token_mean"), mean_weights(batch)    # once per step
  loss, metrics = sum_of_terms(terms)(outputs, rows, weights_of_rows, means_of_rows)   # summed
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl.batch import TokenBatch, sum_by_sequence, to_tokens
from jaxrl.compose import labels_of, named, nearest, signals_of
from jaxrl.schedule import Schedule

# What a term returns: a loss per token, and diagnostics per token by name.
TermOutput = tuple[Float[Array, "rows length"], dict[str, Float[Array, "rows length"]]]

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")


@dataclasses.dataclass(frozen=True)
class Aggregation:
  """How a term's losses per token become its share of the loss: arguments of `loss_weights`, and what
  that is multiplied by, a number that may change over the updates."""

  kind: str
  constant: float | None = None
  weight: float | Schedule = 1.0

  def weight_at(self, step: Any) -> Any:
    """The weight at an update."""
    return self.weight(step) if isinstance(self.weight, Schedule) else self.weight


def loss_weights(batch: TokenBatch, aggregation: str, *, constant: float | None = None
                 ) -> Float[Array, "rows length"]:
  """What each token counts, so that `loss = sum(weights * losses_per_token)`.

  With w the weight of a token's sequence, N the scored sequences (those without a loss token
  included), T the loss tokens of the batch and T_s those of the sequence:

    token_mean     w / T                every token counts the same (DAPO, arXiv:2503.14476)
    sequence_mean  w / (N * T_s)        every sequence counts the same (GRPO, arXiv:2402.03300)
    sequence_sum   w / N                the policy gradient's own sum over time
    constant       w / (N * constant)   the same with a fixed scale (Dr. GRPO, arXiv:2503.20783)

  Args:
    batch: all sequences of the optimiser step.
    aggregation: one of `AGGREGATIONS`.
    constant: for "constant" only: tokens that a sum is divided by, such as the longest completion.

  Returns:
    Weights that are exactly 0 off the loss mask; all 0 where nothing is left to train on.

  Raises:
    ValueError: unknown aggregation, or "constant" without a positive constant.
  """
  check_aggregation(aggregation, constant)
  mask = _scored_tokens(batch)
  sequences = jnp.maximum(jnp.sum(batch.sequence_mask), 1)
  if aggregation == "token_mean":
    denominator = jnp.maximum(jnp.sum(mask), 1)
  elif aggregation == "sequence_mean":
    lengths = sum_by_sequence(batch, mask.astype(batch.weights.dtype))
    denominator = sequences * jnp.maximum(to_tokens(batch, lengths), 1)
  elif aggregation == "sequence_sum":
    denominator = sequences
  else:
    denominator = sequences * constant
  return jnp.where(mask, to_tokens(batch, batch.weights) / denominator, 0)


def check_aggregation(aggregation: str, constant: float | None) -> None:
  """Refuses arguments of `loss_weights`.

  Raises:
    ValueError: unknown aggregation, or "constant" without a positive constant.
  """
  if aggregation not in AGGREGATIONS:
    raise ValueError(f"unknown aggregation {aggregation!r}"
                     f"{nearest(str(aggregation), AGGREGATIONS)}")
  if aggregation == "constant" and not (constant and constant > 0):
    raise ValueError(f"aggregation 'constant' divides by constant={constant}: set it to a positive "
                     "number, such as the largest number of completion tokens")


def mean_weights(batch: TokenBatch, by_sequence: bool = False) -> Float[Array, "rows length"]:
  """Weights under which diagnostics are averaged: 1 / T at each loss token of the batch, or, over
  sequences, 1 / (N T_s)."""
  return loss_weights(batch.replace(weights=jnp.ones_like(batch.weights)),
                      "sequence_mean" if by_sequence else "token_mean")


def sum_of_terms(terms: Sequence[Callable[..., TermOutput]]
                 ) -> Callable[..., tuple[Float[Array, ""], dict]]:
  """Adds terms up to one loss.

  Args:
    terms: as `compose.build` returns them; each carries its own coefficient (`beta`, ...).

  Returns:
    `loss_and_metrics(outputs, batch, weights, mean_weights)` -> (loss, metrics): both are sums over
    the tokens at hand, under `weights` and `mean_weights`. Both are one array, or a sequence with
    one for each term. Metrics are those of the terms, and `loss/<term>` for each, with a term's label
    of `compose.labels_of`. What an earlier term reports under the same name is `<term>/<metric>`.

  Raises:
    ValueError: no term; from the returned function: a signal that a term declared is missing.
  """
  names = labels_of(terms)
  if not names:
    raise ValueError("objective lists no term: name at least one, such as 'clipped_surrogate'")

  def loss_and_metrics(outputs, batch, weights, mean_weights):
    each, means = [x if isinstance(x, Sequence) else [x] * len(terms)
                   for x in (weights, mean_weights)]
    loss, metrics = jnp.zeros((), each[0].dtype), {}
    for index, (name, term, own, mean) in enumerate(zip(names, terms, each, means, strict=True)):
      for signal in signals_of(term):
        if signal not in batch.signals and outputs.get(signal) is None:
          raise missing(f"config.objective[{index}] ({name})", signal, batch)
      with named(f"config.objective[{index}] ({name})"):
        values, diagnostics = term(outputs, batch)
      metrics[f"loss/{name}"] = jnp.sum(own * values)
      loss += metrics[f"loss/{name}"]
      for key, per_token in diagnostics.items():
        metrics[f"{name}/{key}" if key in metrics else key] = jnp.sum(mean * per_token)
    return loss, metrics

  return loss_and_metrics


def _scored_tokens(batch: TokenBatch) -> Bool[Array, "rows length"]:
  """The loss mask, without sequences that were taken out after packing."""
  return batch.loss_mask & to_tokens(batch, batch.sequence_mask).astype(bool)


def missing(where: str, signal: str, batch: TokenBatch, hint: str = "") -> ValueError:
  """What to raise when the term at `where` in the config declared a signal that nothing gives."""
  return ValueError(f"{where} needs {signal!r}, which is neither among the "
                    f"batch's signals ({', '.join(batch.signals) or 'none'}) nor in the model's "
                    "outputs: the trainer computes what the term declares with compose.needs if "
                    "it is a model's; others come from a piece of config.advantage or from the "
                    f"episode{hint}")
