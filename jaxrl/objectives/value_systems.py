"""Annotators who weigh several values differently, learnt from what they prefer."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.batch import column_of, sum_by_sequence, to_tokens
from jaxrl.compose import carries, needs, of_pairs, prepares, ranges
from jaxrl.objectives.aggregate import TermOutput
from jaxrl.objectives.pairs import check_numbers, in_pairs, loss_of_pairs, mean_of_pairs, of_other
from jaxrl.objectives.pairs import preferences
from jaxrl.objectives.reward_model import sequence_scores

MOST_AGENTS, MOST_CLUSTERS, MOST_VALUES = 256, 8, 8  # sizes of what is remembered
FLATTEST = 0.05  # of the weight that a cluster begins with, on the values that are not its own


def _start():
  own = np.eye(MOST_CLUSTERS, MOST_VALUES, dtype=np.float32)
  return {"logits": jnp.asarray(np.log(FLATTEST + own)), "seen": jnp.zeros(MOST_AGENTS),
          "losses": jnp.zeros((MOST_AGENTS, MOST_CLUSTERS)),
          "leaning": jnp.zeros((MOST_AGENTS, MOST_VALUES))}


def _prepare(batch, memory, *, values, clusters, agent, value, head, rate, decay):
  """The E-step, and the M-step of the weights; that of the model is the gradient of the loss."""
  check_numbers("value_systems", above_0=dict(rate=rate), at_least_0=dict(decay=decay))
  if not (1 <= values <= MOST_VALUES and 1 <= clusters <= MOST_CLUSTERS):
    raise ValueError(f"value_systems: values={values} must be 1 to {MOST_VALUES}, and clusters="
                     f"{clusters} 1 to {MOST_CLUSTERS}")
  apart = _differences(ModelOutputs(scores=batch.signals["old_scores"]), batch, values, head)
  overall = in_pairs(batch) & (column_of(batch, value, "value_systems") < 0)
  better = jnp.where(overall, preferences(batch), 0)  # both answers of a pair count once together
  who = jax.nn.one_hot(column_of(batch, agent, "value_systems").astype(jnp.int32), MOST_AGENTS)
  used = jnp.arange(MOST_CLUSTERS) < clusters

  def losses_of(logits):
    return -jax.nn.log_sigmoid(apart @ jax.nn.softmax(logits[:, :values]).T)  # [sequences, clusters]

  def gathered(x):
    return jnp.einsum("sa,s,sx->ax", who, better, x)
  losses = decay * memory["losses"] + gathered(losses_of(memory["logits"]))
  leaning = decay * memory["leaning"] + gathered(_padded(jnp.tanh(apart)))
  seen = decay * memory["seen"] + gathered(jnp.ones_like(better)[:, None])[:, 0]
  logits, losses = _seed_again(memory["logits"], losses, leaning, seen, used)
  belongs = who @ _belongs(losses, used)  # [sequences, clusters]
  share = better[:, None] * belongs / jnp.maximum(jnp.sum(better[:, None] * belongs, axis=0), 1)
  slope = jax.grad(lambda logits: jnp.sum(share * losses_of(logits)))(logits)
  logits = logits - rate * slope
  weights = belongs @ jax.nn.softmax(logits[:, :values])
  return ({"value_weights": jax.vmap(lambda w: to_tokens(batch, w), 1, -1)(weights)},
          {"logits": logits, "losses": losses, "leaning": leaning, "seen": seen})


@carries(_start)
@prepares(_prepare)
@of_pairs
@ranges(lambda agent, value, values: {agent: (0, MOST_AGENTS - 1), value: (-1, values - 1)})
@needs("scores", "old_scores")
def value_systems(outputs: ModelOutputs, batch: TokenBatch, *, values: int, clusters: int,
                  agent: str = "agent", value: str = "value", head: int = 0, rate: float = 0.5,
                  decay: float = 0.99) -> TermOutput:
  """One head per value, and few weightings of them that annotators share (SVSL-P, arXiv:2602.08835).

    grounding       -log s(A_i(y) - A_i(y'))         where an annotator compares by value i
    value systems   -log s(w . (A(y) - A(y')))       where one compares overall
    E-step          cluster(j) = argmin over l of the losses of j's overall comparisons under w_l
    M-step          this loss for A; one gradient step per batch for the logits of each w_l

  w_l is a softmax, so weights are above 0 and sum to 1. Clusters begin near one value each. One that
  nobody belongs to begins again at what the worst explained annotator leans to. Assignments are hard.
  Weights, losses and leanings are carried, so parts of checkpoints.

  Args:
    outputs: supplies `scores`.
    batch: supplies `columns["preference"]` and the columns below, equal in both answers.
    values: heads, 8 at most.
    clusters: 8 at most.
    agent: column with the number of the annotator, 0 to 255.
    value: column with the number of the value that the answers were compared by; -1 is overall.
    head: of the first value.
    rate: of the weights' gradient descent.
    decay: of the losses, per batch: earlier ones are of other models and weights.

  Returns:
    Loss per token; metrics by sequence `preference_accuracy` and `preference_margin`, of the difference
    that the pair was compared by.

  Raises:
    ValueError: no such head or column, or numbers out of range.
  """
  apart = _differences(outputs, batch, values, head)
  signal = batch.signals["value_weights"]
  tokens = jnp.maximum(sum_by_sequence(batch, jnp.ones(batch.tokens.shape, jnp.float32)), 1)
  weights = jnp.stack([sum_by_sequence(batch, signal[..., i]) / tokens for i in range(values)], -1)
  by = column_of(batch, value, "value_systems")
  alone = jax.nn.one_hot(by.astype(jnp.int32), values)
  h = jnp.sum(apart * jnp.where(by[:, None] < 0, weights, alone), axis=-1)
  right = (h > 0) + 0.5 * (h == 0)
  return loss_of_pairs(batch, -jax.nn.log_sigmoid(h)), {
      "preference_accuracy": mean_of_pairs(batch, right), "preference_margin": mean_of_pairs(batch, h)}


def _differences(outputs, batch, values, head):
  """Scores by value, minus those of the other answer. [sequences, values]"""
  each = [sequence_scores(outputs, batch, head + i) for i in range(values)]
  return jnp.stack([x - of_other(batch, x) for x in each], axis=-1)


def _belongs(losses, used):
  """The cluster of every annotator. [agents, clusters], one 1 in each row"""
  return jax.nn.one_hot(jnp.argmin(jnp.where(used, losses, jnp.inf), axis=1), MOST_CLUSTERS)


def _seed_again(logits, losses, leaning, seen, used):
  """Gives an empty cluster, if there is one, to the annotator that the others explain worst."""
  members = jnp.sum(_belongs(losses, used) * (seen > 0)[:, None], axis=0)
  empty = used & (members == 0) & (jnp.sum(seen > 0) > jnp.sum(used))
  this = empty & (jnp.arange(MOST_CLUSTERS) == jnp.argmax(empty))
  best = jnp.min(jnp.where(used, losses, jnp.inf), axis=1)
  worst = jnp.argmax(jnp.where(seen > 0, best / jnp.maximum(seen, 1e-9), -jnp.inf))
  lean = jax.nn.relu(leaning[worst])
  begin = jnp.log(FLATTEST + lean / jnp.maximum(jnp.sum(lean), 1e-9))
  # Others stay where they are until new comparisons speak for the new weights.
  entry = jnp.where(jnp.arange(MOST_AGENTS) == worst, 0, 1.01 * best + 1e-3)
  return jnp.where(this[:, None], begin, logits), jnp.where(this, entry[:, None], losses)


def _padded(x):
  return jnp.pad(x, ((0, 0), (0, MOST_VALUES - x.shape[1])))
