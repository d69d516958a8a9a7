"""Losses of reward models with a label of its own for every answer, or for every step of it."""

import jax
import jax.numpy as jnp

from jaxrl.batch import PREFERENCE, ModelOutputs, TokenBatch
from jaxrl.batch import column_of, to_tokens
from jaxrl.compose import by_sequence, needs, ranges
from jaxrl.objectives.aggregate import TermOutput
from jaxrl.objectives.pairs import diagnostics, loss_of_sequences, of_other
from jaxrl.objectives.reward_model import at_ends, scores_of_head, sequence_scores


@by_sequence
@needs("scores", lambda full: ("yes_logprobs",) if full else ())
@ranges(lambda label: {label: (0, 1)})
def binary_label(outputs: ModelOutputs, batch: TokenBatch, *, label: str = PREFERENCE, head: int = 0,
                 full: bool = False) -> TermOutput:
  """Whether an answer satisfies what its prompt asks for, yes or no (RLBFF, arXiv:2509.21319).

    loss = -(y log s(r) + (1 - y) log s(-r)),    y the label, r the score

  The score may be that of any head. With `config.model.verdict` it is r = log p(yes) - log p(no), so that
  this is the cross-entropy of a softmax over these two tokens. `full` takes all tokens instead, so that
  the others lose their mass too:

    loss = -(y log p(yes) + (1 - y) log p(no))

  Unlike `bradley_terry` it knows an absolute zero: r > 0 says yes, whatever the prompt.

  Args:
    outputs: supplies `scores`, and `yes_logprobs` if `full`.
    batch: supplies the column, with probabilities of yes.
    label: its name. By default the chosen answer of a pair is a yes and the other one a no.
    head: that scores.
    full: as above; the head has to be the verdict, the last of all.

  Returns:
    Loss of its sequence at each token; metrics by sequence `label_accuracy`, the share of labels on the
    side of the score's sign, and those of `bradley_terry`, which are about pairs.

  Raises:
    ValueError: no such head or column, or `full` with another head than the verdict.
  """
  score, y = sequence_scores(outputs, batch, head), column_of(batch, label, "binary_label")
  if full and head != outputs.scores.shape[-1] - 1:
    raise ValueError(f"binary_label: head={head} with full=True, but log-probabilities belong to the "
                     f"verdict: use head={outputs.scores.shape[-1] - 1}")
  if full:
    yes = at_ends(batch, outputs.yes_logprobs)
    loss = -yes + (1 - y) * score  # log p(no) = log p(yes) - r
  else:
    loss = jax.nn.softplus(score) - y * score
  right = (score > 0) == (y > 0.5)
  return loss_of_sequences(batch, loss), {
      "label_accuracy": to_tokens(batch, right.astype(jnp.float32)),
      **diagnostics(batch, score, score - of_other(batch, score), "score")}


@needs("scores", "step_labels")
def label_steps(outputs: ModelOutputs, batch: TokenBatch, *, head: int = 0) -> TermOutput:
  """Whether every step of an answer is right: a process reward model (arXiv:2305.20050, section 2.4).

    loss_t = -(y_t log s(z_t) + (1 - y_t) log s(-z_t))    at the last token t of every labelled step

  These tokens are the loss mask, so "token_mean" is the mean over the steps of the batch and
  "sequence_mean" the mean over answers of the means over their steps.

  Args:
    outputs: supplies `scores`.
    batch: supplies the signal `step_labels`, probabilities that steps are right, as rows with
      `data.step_labels` do.
    head: z.

  Returns:
    Loss per token; metrics `step_accuracy`, the share of labels on the side of the logit's sign, and
    `right_steps`, the share of labels above 1/2.

  Raises:
    ValueError: no such head.
  """
  z, y = scores_of_head(outputs, head), batch.signals["step_labels"]
  z = jnp.where(batch.loss_mask, z, 0)
  accuracy, right = (z > 0) == (y > 0.5), y > 0.5
  values = {"step_accuracy": accuracy, "right_steps": right}
  return (jnp.where(batch.loss_mask, jax.nn.softplus(z) - y * z, 0),
          {name: jnp.where(batch.loss_mask, x, False).astype(jnp.float32) for name, x in values.items()})
