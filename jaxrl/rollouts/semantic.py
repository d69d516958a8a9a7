"""Rewards without labels: how many answers of a group mean the same.

These are edits; `config.rollout.edits` names them `jaxrl.rollouts.semantic:semantic_frequency`.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

from jaxrl import compose, rewards
from jaxrl.batch import Trajectory
from jaxrl.rewards.criterion import judge as judged
from jaxrl.rollouts.edits import Step


def clusters(answers: Sequence[str], same: Callable[[int, int], bool]) -> list[int]:
  """Numbers answers by what they mean.

  Each joins the first cluster, in order of appearance, whose first answer is the same. An empty one
  is a cluster of its own, which nothing joins.

  Args:
    answers: of a group.
    same: `(first, other)`, by index, is whether two answers mean the same. It need not be
      transitive.

  Returns:
    The cluster of each answer, counted from 0.
  """
  firsts: list[int] = []
  found = []
  for i, answer in enumerate(answers):
    cluster = next((k for k, first in enumerate(firsts)
                    if answer and answers[first] and same(first, i)), len(firsts))
    if cluster == len(firsts):
      firsts.append(i)
    found.append(cluster)
  return found


def semantic_frequency(step: Step, *, judge: str | Mapping[str, Any] = "exact_match",
                       pattern: str = "", min_entropy: float = -math.inf,
                       max_entropy: float = math.inf, min_confidence: float = 0.0
                       ) -> list[Trajectory]:
  """Rewards an answer with the share of its group that means the same (EMPO, arXiv:2504.05812).

    p_k = |cluster k| / G,    H = -sum_k p_k log p_k,    r_i = p_k(i)

  The mean reward of a group is sum_k p_k^2, the chance that two answers agree, so its ascent lowers
  the entropy of what is meant. No label is read: what criteria say about labels is only logged. The
  largest cluster wins, right or wrong. A group of two, centred, teaches nothing.

  Args:
    step: the batch; sequences that are not scored neither count nor get a reward. Where tasks have
      no answers, `config.reward` needs a criterion that does without, such as `finished`.
    judge: criterion of `config.reward` that decides whether two answers mean the same: the first of
      a cluster is given to it as the reference. It runs in this process, without a time-out.
    pattern: regular expression whose one group is the answer, of which the last match counts;
      without a match the answer is empty, its reward 0. Empty takes the whole completion.
    min_entropy, max_entropy: all rewards of a group are 0 unless min_entropy < H < max_entropy. 0
      leaves groups out that agree, which no group baseline learns from anyhow.
    min_confidence: all rewards of a group are 0 where max_k p_k is below.

  Returns:
    The trajectories with these rewards. Metrics, means over groups: `semantic_entropy`,
    `semantic_confidence` (max_k p_k), `semantic_reward`, `semantic_gated` (share of groups left
    out).

  Raises:
    ValueError: a pattern without exactly one group, or a gate that nothing passes.
  """
  _check(pattern, min_entropy, max_entropy, min_confidence)
  criterion = compose.build(judge, rewards, where="semantic_frequency.judge")
  found: dict[int, float] = {}
  entropies, confidences, gated = [], [], []
  for members in step.groups():
    members = [t for t in members if t.scored]
    if not members:
      continue
    answers = [_answer(t.text, pattern) for t in members]
    ids = clusters(answers, _relation(criterion, step.tasks, members, answers))
    shares = [ids.count(k) / len(ids) for k in range(max(ids) + 1)]
    entropies.append(-math.fsum(p * math.log(p) for p in shares))
    confidences.append(max(shares))
    gated.append(not (min_entropy < entropies[-1] < max_entropy
                      and confidences[-1] >= min_confidence))
    for t, k, answer in zip(members, ids, answers):
      found[id(t)] = 0.0 if gated[-1] or not answer else shares[k]
  if entropies:
    step.metrics |= dict(semantic_entropy=_mean(entropies), semantic_confidence=_mean(confidences),
                         semantic_gated=_mean(gated), semantic_reward=_mean(found.values()))
  return [dataclasses.replace(t, reward=found.get(id(t), t.reward)) for t in step.trajectories]


def _answer(text, pattern):
  if not pattern:
    return text.strip()
  matches = re.findall(pattern, text)
  return matches[-1].strip() if matches else ""


@compose.supplies(columns=("answer_id",))
def number_answers(step: Step, *, judge: str | Mapping[str, Any] = "exact_match", pattern: str = ""
                   ) -> list[Trajectory]:
  """Says which answers of a group mean the same, for credit that votes.

  Args:
    step: the batch.
    judge, pattern: as in `semantic_frequency`.

  Returns:
    The trajectories with `columns["answer_id"]`: the cluster within the group, counted from 0 in
    order of appearance, and -1 for answers that are empty or not scored, which do not vote.

  Raises:
    ValueError: a pattern without exactly one group.
  """
  _check(pattern, 0, 1, 0, who="number_answers")
  criterion = compose.build(judge, rewards, where="number_answers.judge")
  found: dict[int, int] = {}
  for group in step.groups():
    members = [t for t in group if t.scored]
    answers = [_answer(t.text, pattern) for t in members]
    ids = clusters(answers, _relation(criterion, step.tasks, members, answers))
    found |= {id(t): k if answer else -1 for t, k, answer in zip(members, ids, answers)}
  return [dataclasses.replace(t, columns={**t.columns, "answer_id": float(found.get(id(t), -1))})
          for t in step.trajectories]


def _relation(criterion, tasks, members, answers):
  def same(first, other):
    if answers[first] == answers[other]:
      return True
    task = dataclasses.replace(tasks[members[other].task_id], answer=answers[first])
    verdict = judged(criterion, task, dataclasses.replace(members[other], text=answers[other]))
    return verdict.status == "ok" and verdict.score >= 1
  return same


def _mean(values):
  values = list(values)
  return math.fsum(values) / len(values)


def _check(pattern, min_entropy, max_entropy, min_confidence, who="semantic_frequency"):
  try:
    groups = re.compile(pattern).groups
  except re.error as error:
    raise ValueError(f"{who}: pattern={pattern!r} is not a regular expression: {error}"
                     ) from error
  if pattern and groups != 1:
    raise ValueError(f"{who}: pattern={pattern!r} has {groups} groups; it needs "
                     "exactly one, around the answer; write others as (?:...)")
  if not min_entropy < max_entropy or not 0 <= min_confidence <= 1:
    raise ValueError(f"semantic_frequency: no group passes min_entropy={min_entropy}, max_entropy="
                     f"{max_entropy}, min_confidence={min_confidence}: make the first less than the "
                     "second, the last 0 to 1")
