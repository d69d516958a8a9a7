"""Parallel answers that set out differently: outlines first, then a path behind each."""

import asyncio
from collections.abc import Sequence
import re

import numpy as np

from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.evaluation.voting import vote
from jaxrl.rewards import ok
from jaxrl.rollouts.context import EpisodeContext
from jaxrl.rollouts.prefixes import FIRST, continued, sample_prefixes

TRAIN = ("alternate", "outlines", "paths", "both")


async def outlines_then_paths(ctx: EpisodeContext, task: Task, *, samples: int, outlines: int,
                              sets: int, outline_tokens: int, separator: str, boundary: str = "",
                              train: str = "alternate", period: int = 10, answer: str = "",
                              alpha: float = 0.5, form: float = 0.1, repetition: float = 0.1
                              ) -> list[Trajectory]:
  """N outlines in one sequence, then a path from each (OPE, arXiv:2602.08344).

    o_i ~ policy(. | q, o_1, .., o_{i-1}),    P_i ~ policy(. | q, o_i)

  Each outline sees those before it, a path only its own. Outlines and paths are trained in turn:

    outlines  `sets` sets of outlines are a group, each tried with one path per outline:
              R = alpha * [majority right] + (1 - alpha) * mean_i r(P_i)
                  + form * (share of outlines that can be continued) - repetition * (share repeated)
    paths     of one set, `samples / N` paths behind each of its outlines are a group; reward r(P)

  Costs `sets * N` and `samples` paths, beside the outlines. What is not trained in a turn has
  no gradient. An outline that ends by itself is a whole answer: it is its own path, and no path
  follows it.

  Args:
    ctx: serves samples and scores; the reward sees outline and path as one text.
    task: the problem.
    samples: paths that are trained on, a multiple of N.
    outlines: N, of a set.
    sets: sets of outlines that are compared.
    outline_tokens: tokens of an outline, at most.
    separator: text put between two outlines, not trained on.
    boundary: text that ends an outline; empty ends it after `outline_tokens`.
    train: "alternate", or one of the two throughout, or "both" in every update.
    period: updates before it is the other's turn; outlines begin.
    answer: regular expression with one group, whose last match in outline and path is the answer
      that votes; empty is all of the text. Of equally frequent answers the first wins.
    alpha, form, repetition: of the reward of outlines.

  Returns:
    Sets of outlines, group 0, whose evidence also holds `any_right`, `majority_right` and
    `distinct_outlines`, and paths, group i for outline i. `tag_ids` are 1 in outlines, 2 in paths.

  Raises:
    ValueError: another `train`, a number below 1, or samples that do not divide.
  """
  numbers = dict(outlines=outlines, samples=samples, sets=sets, outline_tokens=outline_tokens,
                 period=period)
  if train not in TRAIN:
    raise ValueError(f"outlines_then_paths: train={train!r}; valid are "
                     f"{', '.join(map(repr, TRAIN))}")
  if low := [name for name, value in numbers.items() if value < 1]:
    raise ValueError(f"outlines_then_paths: {low[0]}={numbers[low[0]]} has to be at least 1")
  if samples % outlines:
    raise ValueError(f"outlines_then_paths: samples={samples} are not the same number of paths "
                     f"behind each of outlines={outlines}: make samples a multiple of outlines")
  turn = ("outlines", "paths")[ctx.step // period % 2] if train == "alternate" else train

  def plan(count):
    return asyncio.gather(*[_plan(ctx, task, outlines, outline_tokens, separator, boundary)
                            for _ in range(count)])

  found = []
  if turn != "paths":
    planned = await plan(sets)
    tried = await asyncio.gather(*[_follow(ctx, heads, 1, train=False) for _, heads in planned])
    leaves = [[path[0] if path else head for (head, _), path in zip(heads, branches)]
              for (_, heads), branches in zip(planned, tried)]
    await ctx.score(task, [t for some in leaves for t in some])
    for (whole, heads), some in zip(planned, leaves):
      _judge(whole, heads, some, answer, alpha, form, repetition)
      found.append(whole)
  if turn != "outlines":
    (_, heads), = await plan(1)
    for group, branch in enumerate(await _follow(ctx, heads, samples // outlines, train=True), 1):
      for t in branch:
        t.group = group
      found += branch
  return found


async def _plan(ctx, task, count, max_tokens, separator, boundary):
  """A sequence of outlines, and each as (the beginning of an answer, whether it can go on)."""
  context, between = list(task.prompt), ctx.encode(separator)
  mask, logprobs, heads, texts = [False] * len(context), [0.0] * len(context), [], []
  for i in range(count):
    if i:
      context, mask, logprobs = (x + y for x, y in zip(
          (context, mask, logprobs), (between, [False] * len(between), [0.0] * len(between))))
    (outline,), (is_open,) = await sample_prefixes(ctx, context, 1, max_tokens=max_tokens,
                                                   boundary=boundary, train=True)
    new = outline.tokens[len(context):].tolist()
    heads.append((_beginning(task.prompt, new, outline), is_open))
    context, mask = context + new, mask + [True] * len(new)
    logprobs += outline.behaviour_logprobs[-len(new):].tolist()
    texts.append(outline.text)
    if outline.finish == "stop" and not is_open:
      break  # nothing follows the end of a sequence
  whole = Trajectory(context, mask, logprobs, prompt_length=len(task.prompt),
                     text=separator.join(texts), finish=outline.finish,
                     tag_ids=np.where(mask, FIRST, 0))
  return whole, heads + [heads[-1]] * (count - len(heads))


def _beginning(prompt, new, outline):
  tokens = [*prompt, *new]
  tags = np.where(np.arange(len(tokens)) < len(prompt), 0, FIRST)
  return Trajectory(tokens, [False] * len(tokens), tag_ids=tags, prompt_length=len(prompt),
                    text=outline.text, finish=outline.finish)


async def _follow(ctx, heads, count, *, train):
  """`count` paths behind each outline, none behind one that has ended."""
  found = iter(await asyncio.gather(*[ctx.sample(head.tokens.tolist(), n=count, train=train)
                                      for head, is_open in heads if is_open]))
  return [continued(head, next(found)) if is_open else [] for head, is_open in heads]


def _judge(whole: Trajectory, heads: Sequence[tuple[Trajectory, bool]], leaves: list[Trajectory],
           answer: str, alpha: float, form: float, repetition: float) -> None:
  """Gives a set of outlines its reward and evidence, from one scored path for each."""
  scored = [t for t in leaves if t.scored]
  texts = [head.text for head, _ in heads]
  distinct = len(set(texts)) / len(texts)
  whole.scored, whole.evidence = bool(scored), {"distinct_outlines": ok(distinct)}
  if not scored:
    return
  rewards = [t.reward for t in scored]
  answers = [_answer(t.text, answer) for t in scored]
  winner = vote(answers)
  right = [rewards[answers.index(winner)] >= 1 if winner is not None else False,
           max(rewards) >= 1]
  whole.reward = float(alpha * right[0] + (1 - alpha) * np.mean(rewards)
                       + form * np.mean([is_open for _, is_open in heads])
                       - repetition * (1 - distinct))
  whole.evidence |= {"majority_right": ok(right[0]), "any_right": ok(right[1])}
  for label in scored[0].evidence:
    scores = [t.evidence[label].score for t in scored if t.evidence[label].status == "ok"]
    if scores:
      whole.evidence[label] = ok(float(np.mean(scores)))


def _answer(text, pattern):
  if not pattern:
    return text.strip()
  matches = re.findall(pattern, text)
  return matches[-1].strip() if matches else None
