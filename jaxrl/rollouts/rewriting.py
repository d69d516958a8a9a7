"""Questions that the policy puts in other words for itself."""

from collections.abc import Sequence
import functools
import re

import numpy as np

from jaxrl import compose
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rewards import ok
from jaxrl.rollouts.context import EpisodeContext
from jaxrl.rollouts.edits import Step
from jaxrl.rollouts.engine import GROUPS_PER_EPISODE

REWRITTEN = {"both": ("hard", "medium"), "hard": ("hard",), "medium": ("medium",), "none": ()}


@compose.supplies(columns=("kl_weight",))
async def rewrite_and_answer(ctx: EpisodeContext, task: Task, *, samples: int, mode: str = "both",
                             hard: float = 0.3, medium: float = 0.7, rewrite_tokens: int = 400,
                             kl_hard: float = 0.5, right_from: float = 1.0, oracle: Sequence[str] = ()
                             ) -> list[Trajectory]:
  """Hard questions are simplified, middling ones varied, and all are answered (CLPO,
  arXiv:2509.25004).

  With acc the share of right answers: a question is hard up to `hard`, middling up to `medium`, and
  easy beyond. The policy rewrites it, without a gradient, seeing the reference answer, and a second
  group answers the new question, judged by the same reference. Only groups with right and wrong
  answers are trained on; a question that is never answered survives through its rewriting.

  Args:
    ctx: serves samples and scores; `config.rollout.templates` has "simplify" and "vary" with
      `{question}` and `{answer}`, and "rewritten", with `{question}`, which asks the new question.
    task: the problem.
    samples: answers of each group; `mode="none"` draws one group only.
    mode: what is rewritten: "both", "hard", "medium" or "none".
    hard, medium: shares of right answers.
    rewrite_tokens: of a rewriting, at most.
    kl_hard: `columns["kl_weight"]` of answers to hard questions, old and new, for
      `objectives.kl(weight="kl_weight")`; 1 elsewhere.
    right_from: smallest reward of a right answer.
    oracle: a pattern and what takes its place (`re.sub`) in the question; the new question is then made
      by this rule, as if by a perfect rewriter, and the policy is not asked. Where nothing matches the
      question is asked again as it is. () asks the policy.

  Returns:
    Group 0, answers to the question; group 1, those to the rewritten one. Evidence: `share_right`, acc, and of
    the latter `rescued`, whether they make a question teach that did not, and `leaked`, whether the
    rewriting contains the reference answer.

  Raises:
    ValueError: another mode, shares out of order, or an oracle that is no pattern with a replacement.
  """
  if mode not in REWRITTEN or not 0 <= hard <= medium <= 1:
    raise ValueError(f"rewrite_and_answer: mode={mode!r}, hard={hard}, medium={medium}; modes are "
                     f"{', '.join(map(repr, REWRITTEN))}, and 0 <= hard <= medium <= 1")
  rule = _rule(oracle)
  group = await ctx.sample(task.prompt, n=samples, train=True)
  await ctx.score(task, group)
  right = [t.reward >= right_from for t in group if t.scored]
  share = sum(right) / len(right) if right else 1.0
  level = "hard" if share <= hard else "medium" if share <= medium else "easy"
  teaches = _filter(group, right_from)
  second = []
  if right and level in REWRITTEN[mode]:
    if rule:
      text = rule(task.question)
    else:
      asked = ctx.prompt("simplify" if level == "hard" else "vary", question=task.question,
                         answer=task.answer)
      rewriting, = await ctx.sample(asked, max_tokens=rewrite_tokens)
      text = rewriting.text
    if ctx.render("rewritten", question=text):
      prompt = ctx.prompt("rewritten", question=text)
      second = await ctx.sample(prompt, n=samples, train=True)
      await ctx.score(task, second)
      rescued = _filter(second, right_from) and not teaches
      leaked = bool(task.answer) and task.answer in text
      for t in second:
        t.group = 1
        t.evidence |= {"rescued": ok(float(rescued)), "leaked": ok(float(leaked))}
  for t in group + second:
    if right:
      t.evidence["share_right"] = ok(share)
    t.columns = {"kl_weight": kl_hard if level == "hard" else 1.0}
  return group + second


def log_rescues(step: Step, *, hard: float = 0.3, medium: float = 0.7) -> list[Trajectory]:
  """Logs what rewritten questions add to the batches of `rewrite_and_answer` (CLPO, arXiv:2509.25004).

  Args:
    step: the batch, which stays as it is.
    hard, medium: as in the episode.

  Returns:
    The trajectories. Metrics, each where there are such questions: `rescue_rate`, of those that no answer got
    right the share whose rewriting is trained on; `included_hard`, `included_medium` and `included_easy`, of the
    questions of a level the share that is trained on, as it was or rewritten.
  """
  questions: dict[int, list[Trajectory]] = {}
  for t in step.sampled:
    if "share_right" in t.evidence:
      questions.setdefault(t.group // GROUPS_PER_EPISODE, []).append(t)
  found: dict[str, list[bool]] = {}
  for members in questions.values():
    share = members[0].evidence["share_right"].score
    level = "hard" if share <= hard else "medium" if share <= medium else "easy"
    found.setdefault(f"included_{level}", []).append(any(t.scored for t in members))
    if share == 0:
      found.setdefault("rescue_rate", []).append(found[f"included_{level}"][-1])
  step.metrics |= {name: float(np.mean(values)) for name, values in found.items()}
  return step.trajectories


def _rule(oracle):
  """The function of a question that an oracle is, None for none."""
  if not oracle:
    return None
  try:
    pattern, replacement = oracle
    return functools.partial(re.compile(pattern).sub, replacement)
  except (TypeError, ValueError, re.error) as error:
    raise ValueError(f"rewrite_and_answer: oracle={oracle!r} has to be a pattern and its replacement, such "
                     rf"as (r'(\d+)\+(\d+)', r'\2+\1'): {error}") from error


def _filter(group: list[Trajectory], right_from: float) -> bool:
  """Takes a group out that is answered rightly by all or by none; whether it stays."""
  verdicts = {t.reward >= right_from for t in group if t.scored}
  if len(verdicts) < 2:
    for t in group:
      t.scored = False
  return len(verdicts) == 2
