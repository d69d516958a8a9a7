"""Answers, and now and then verdicts on answers of one's own.

The episode asks; the edit, `jaxrl.rollouts.self_verification:collect_answers` in `config.rollout.edits`,
remembers what is to be judged.
"""

from typing import Any

import numpy as np

from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rewards import ok
from jaxrl.rollouts.context import EpisodeContext
from jaxrl.rollouts.edits import Step

MEMORY = "to_verify"  # key of `Step.memory`


async def answer_or_verify(ctx: EpisodeContext, task: Task, *, samples: int, interval: int = 5,
                           yes: str = "Yes", no: str = "No", train_answers: bool = True
                           ) -> list[Trajectory]:
  """Every `interval`-th batch the policy learns to judge its own answers (arXiv:2602.07594).

  Such a batch (the last of every interval, if anything is remembered) asks `verify` about a
  remembered question and answer instead of the task: a group of judgements, reward 1 for the right
  one. No gradient goes through the answer that is judged.

  Args:
    ctx: serves samples and scores; `config.rollout.templates` has a "verify" of `{question}` and
      `{answer}`.
    task: the problem of other batches.
    samples: answers or judgements, a group.
    interval: batches; 1 would leave nothing to judge.
    yes, no: what judgements have to say, white space around them aside.
    train_answers: False learns from judgements alone.

  Returns:
    The group. Evidence of judgements: `verdict`, whether it is right, and `answer_was_right`.

  Raises:
    ValueError: an interval below 2.
  """
  if interval < 2:
    raise ValueError(f"answer_or_verify: interval={interval} leaves no batch that answers; use 2 or "
                     "more")
  memory = ctx.memory.get(MEMORY, _nothing())
  items = memory["items"]
  if not is_verifying(memory["batches"], interval) or not items:
    return await ctx.sample(task.prompt, n=samples, train=train_answers)
  item = items[ctx.episode % len(items)]
  prompt = ctx.prompt("verify", question=item["question"], answer=item["answer"])
  group = await ctx.sample(prompt, n=samples, train=True)
  for t in group:
    right = t.text.strip() == (yes if item["right"] else no)
    t.reward = float(right)
    t.evidence = {"verdict": ok(right), "answer_was_right": ok(item["right"])}
  return group


def is_verifying(index: int, interval: int) -> bool:
  """Whether a batch is one of judgements: the last of every interval."""
  return index % interval == interval - 1


def _nothing():
  """The memory of a phase that begins; updates are no count of batches, which may have several."""
  return {"items": [], "batches": 0}


def collect_answers(step: Step, *, interval: int = 5, right_from: float = 1.0) -> list[Trajectory]:
  """Remembers answers of the batch that judgements are about, half of them right.

  Of P questions, at most 2 * floor(P / 2) answers: from each that is answered both ways one right and
  one wrong answer, and one more of each to fill up with; from each that is always answered rightly
  one to fill up with. Either half is filled without, then with replacement. Empty answers and those
  that are not scored are left out. What is remembered is shuffled, so that judgements are about answers of
  all batches since the last ones. After judgements, everything is forgotten.

  Args:
    step: the batch.
    interval: as of the episode `answer_or_verify`.
    right_from: smallest reward of a right answer.

  Returns:
    The trajectories as they are. Metrics: `to_verify`, answers that are remembered, and after
    judgements `verdict_accuracy`.
  """
  memory = step.memory.setdefault(MEMORY, _nothing())
  judged = [t.evidence["verdict"].score for t in step.trajectories if "verdict" in t.evidence]
  if judged:
    step.metrics["verdict_accuracy"] = float(np.mean(judged))
    memory["items"] = []
  else:
    memory["items"] += _balanced(step, right_from)
    np.random.default_rng([step.seed, step.index, 7595]).shuffle(memory["items"])
  if is_verifying(memory["batches"], interval):
    memory["items"] = []  # also where no answer could be judged
  memory["batches"] += 1
  step.metrics["to_verify"] = float(len(memory["items"]))
  return step.trajectories


def _balanced(step: Step, right_from: float) -> list[dict[str, Any]]:
  rng = np.random.default_rng([step.seed, step.index, 7594])
  halves, spare, groups = {True: [], False: []}, {True: [], False: []}, step.groups()
  for group in groups:
    valid = [t for t in group if t.scored and t.text.strip()]
    by_verdict = {v: [t for t in valid if (t.reward >= right_from) == v] for v in (True, False)}
    for members in by_verdict.values():
      rng.shuffle(members)
    if by_verdict[True] and by_verdict[False]:
      for v, members in by_verdict.items():
        halves[v].append(members[0])
        spare[v] += members[1:2]
    elif by_verdict[True]:
      spare[True].append(by_verdict[True][0])
  found, wanted = [], len(groups) // 2
  if not (halves[True] + spare[True]) or not halves[False]:
    return []  # one label alone teaches nothing
  for v in (True, False):
    rng.shuffle(spare[v])
    chosen = (halves[v] + spare[v])[:wanted]
    while len(chosen) < wanted:
      chosen.append((halves[v] + spare[v])[int(rng.integers(len(halves[v] + spare[v])))])
    found += [dict(question=step.tasks[t.task_id].question, answer=t.text.strip(), right=v)
              for t in chosen]
  rng.shuffle(found)
  return found
