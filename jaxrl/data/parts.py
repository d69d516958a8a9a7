"""Answers made of parts: steps that are labelled one by one, and critiques that follow an answer."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from jaxrl.batch import CRITIQUE
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.data.tokenizers import Tokenizer

STEP_LABELS = "step_labels"  # the signal with the label of a step at its last token
Step = tuple[str, float | None]  # text, and the probability that it is right, None if nobody says


def stepwise(task: Task, steps: Sequence[Step], tokenizer: Tokenizer, *, max_completion_tokens: int = 0,
             end_id: int | None = None) -> Trajectory:
  """Prompt, steps and what ends answers as one sequence, with the loss on the last tokens of the labelled steps.

  Steps are encoded one by one, so that each ends with a token of its own; `tag_ids` count them from 1.

  Args:
    task: the prompt.
    steps: with what ends them.
    tokenizer: the one that wrote the prompt.
    max_completion_tokens: a longer completion keeps the tokens at its start, and the labels of the steps
      that are whole; 0 for no limit.
    end_id: token that ends answers, such as that of a turn; None is EOS.

  Returns:
    A trajectory with the signal `step_labels`.
  """
  tokens, tags, mask, labels = [], [], [], []
  for number, (text, label) in enumerate(steps, start=1):
    ids = tokenizer.encode(text)
    tokens += ids
    tags += [number] * len(ids)
    mask += [False] * (len(ids) - 1) + [label is not None]
    labels += [0.0] * (len(ids) - 1) + [label or 0.0]
  kept = len(tokens) + 1
  if max_completion_tokens and kept > max_completion_tokens:
    kept = max_completion_tokens
  start, end_id = len(task.prompt), tokenizer.eos_id if end_id is None else end_id

  def whole(values, before, end):
    return np.array([before] * start + [*values, end][:kept])

  return Trajectory(
      tokens=np.array(task.prompt + [*tokens, end_id][:kept], np.int32),
      loss_mask=whole(mask, False, False), tag_ids=whole(tags, 0, 0),
      signals={STEP_LABELS: whole(labels, 0.0, 0.0)}, task_id=task.id, prompt_length=start,
      text="".join(text for text, _ in steps), finish="stop" if kept > len(tokens) else "length")


def split_steps(text: str, end: str) -> list[str]:
  """The steps of a text, each with its `end`, also the last; blank ones are left out."""
  return [step + end for step in (text.split(end) if end else [text]) if step.strip()]


def with_critique(trajectory: Trajectory, critique: str, tokenizer: Tokenizer, *,
                  max_completion_tokens: int = 0, end_id: int | None = None) -> Trajectory:
  """The sequence, then the critique and what ends it, which have the tag `CRITIQUE` and a loss.

  That is `end_id` or, if it is None, EOS. A critique that is longer than `max_completion_tokens`, unless this
  is 0, keeps its start.
  """
  if not critique:
    return trajectory
  more = tokenizer.encode(critique) + [tokenizer.eos_id if end_id is None else end_id]
  more = more[:max_completion_tokens or None]

  def longer(values, value):
    return np.concatenate([values, np.full(len(more), value, values.dtype)])
  return dataclasses.replace(
      trajectory, tokens=np.concatenate([trajectory.tokens, np.array(more, np.int32)]),
      loss_mask=longer(trajectory.loss_mask, True), tag_ids=longer(trajectory.tag_ids, CRITIQUE),
      behaviour_logprobs=longer(trajectory.behaviour_logprobs, 0),
      turn_ids=longer(trajectory.turn_ids, 0),
      signals={name: longer(values, 0) for name, values in trajectory.signals.items()})
