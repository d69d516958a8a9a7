"""A short spell of imitation when reinforcement has hit its worst moment.

`config.rollout.edits` names the edit `jaxrl.rollouts.annealing:heat_once`.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxrl import compose
from jaxrl.batch import Trajectory
from jaxrl.rollouts.edits import Step

MEMORY = "annealing"  # key of `Step.memory`


@compose.supplies(columns=("imitate",))
def heat_once(step: Step, *, updates: int = 30, examples: int = 64, at: int = -1, smoothing: float = 0.8,
              patience: int = 10, knee: float = 0.5, hard_below: float = 0.2, right_from: float = 1.0
              ) -> list[Trajectory]:
  """Imitates known solutions of hard questions for a while, once (Annealed-RLVR, arXiv:2509.23629).

  Two moving averages are watched: the mean reward and the mean length of right answers. Heating
  begins at the first batch at which the length has had its minimum `patience` batches ago or
  earlier, while the reward gains less over `patience` batches than `knee` of the most that it ever
  did. Then `updates` batches consist of right answers, the policy's own of earlier updates, to
  questions that it has answered rightly in less than `hard_below` of all samples so far. What was
  sampled meanwhile is not trained on, only remembered. Afterwards reinforcement goes on. Every
  question is remembered, in checkpoints too: this is for data of some thousands that come again.

  Args:
    step: the batch.
    updates: batches of imitation.
    examples: answers in each of them, going round through the hard questions.
    at: the update at which heating begins, whatever the averages say; -1 waits for these.
    smoothing: share that moving averages keep at each batch.
    patience: batches.
    knee: share of the fastest gain of reward.
    hard_below: success rate of hard questions.
    right_from: smallest reward of a right answer.

  Returns:
    The trajectories as they are, with `columns["imitate"]` 0, or the examples, each a group of its own
    with the column 1, for `objectives.imitate_marked`. Metrics: `heating`, `hard_questions`,
    `right_tokens`, the moving average of the length.

  Raises:
    ValueError: numbers out of range.
  """
  if updates < 1 or examples < 1 or patience < 1 or not 0 <= smoothing < 1:
    raise ValueError(f"heat_once: updates={updates}, examples={examples}, patience={patience}, "
                     f"smoothing={smoothing}; use at least 1, and 0 <= smoothing < 1")
  memory = step.memory.setdefault(MEMORY, {
      "rewards": [], "lengths": [], "questions": {}, "began": -1, "next": 0, "batches": 0})
  now = memory["batches"]  # `step.index` counts updates, of which a batch may have several
  memory["batches"] += 1
  _remember(memory, step, right_from)
  _watch(memory, step, smoothing, right_from)
  if memory["began"] < 0 and (step.index >= at if at >= 0 else is_worst_moment(
      memory["rewards"], memory["lengths"], patience, knee)):
    memory["began"] = now
  hard = [q for q in memory["questions"].values()
          if q["solution"] and q["right"] < hard_below * q["seen"]]
  heating = memory["began"] >= 0 and now - memory["began"] < updates
  heating = heating and bool(hard)
  step.metrics |= {"heating": float(heating), "hard_questions": float(len(hard))}
  if memory["lengths"]:
    step.metrics["right_tokens"] = memory["lengths"][-1]
  if not heating:
    return [dataclasses.replace(t, columns={**t.columns, "imitate": 0.0}) for t in step.trajectories]
  count = min(examples, len(hard))
  chosen = [hard[(memory["next"] + i) % len(hard)] for i in range(count)]
  memory["next"] = (memory["next"] + count) % len(hard)
  return [_example(q["solution"], group) for group, q in enumerate(chosen)]


def is_worst_moment(rewards: list[float], lengths: list[float], patience: int, knee: float) -> bool:
  """Whether right answers were shortest `patience` batches ago or earlier, and rewards rise slowly.

  Args:
    rewards, lengths: moving averages, one per batch.
    patience, knee: as in `heat_once`.
  """
  if len(rewards) <= 2 * patience or len(lengths) <= 2 * patience:
    return False
  since = len(lengths) - 1 - int(np.argmin(lengths))
  gains = np.subtract(rewards[patience:], rewards[:-patience])
  return bool(since >= patience and gains.max() > 0 and gains[-1] < knee * gains.max())


def _remember(memory: dict[str, Any], step: Step, right_from: float) -> None:
  """Counts successes of each question, and keeps its shortest right answer."""
  for t in step.sampled:
    if not t.scored:
      continue
    question = memory["questions"].setdefault(
        step.tasks[t.task_id].question, {"seen": 0, "right": 0, "solution": None})
    question["seen"] += 1
    if t.reward >= right_from:
      question["right"] += 1
      kept = question["solution"]
      if kept is None or len(t.tokens) < len(kept["tokens"]):
        question["solution"] = dict(tokens=t.tokens.tolist(), prompt=t.prompt_length, text=t.text,
                                    task=t.task_id, logprobs=t.behaviour_logprobs.tolist(),
                                    columns={k: float(v) for k, v in t.columns.items()},
                                    signals={k: v.tolist() for k, v in t.signals.items()})


def _watch(memory, step, smoothing, right_from):
  """Goes on with the moving averages; a batch without right answers says nothing of lengths."""
  scored = [t for t in step.sampled if t.scored]
  lengths = [len(t.tokens) - t.prompt_length for t in scored if t.reward >= right_from]
  for name, values in (("rewards", [t.reward for t in scored]), ("lengths", lengths)):
    if values:
      now, past = float(np.mean(values)), memory[name]
      past.append(smoothing * past[-1] + (1 - smoothing) * now if past else now)


def _example(solution, group):
  length = len(solution["tokens"])
  return Trajectory(
      solution["tokens"], np.arange(length) >= solution["prompt"], solution["logprobs"], group=group,
      prompt_length=solution["prompt"], text=solution["text"], task_id=solution["task"], finish="stop",
      columns={**solution["columns"], "imitate": 1.0}, signals=solution["signals"])
