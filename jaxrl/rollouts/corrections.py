"""Self-correction: first and second answers to a task, recombined."""

import asyncio
from collections.abc import Sequence
import dataclasses
import re

import numpy as np

from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rewards import ok
from jaxrl.rollouts.context import EpisodeContext
from jaxrl.rollouts.prefixes import FIRST, SECOND

ANCHOR = 3  # `Trajectory.tag_ids` of first answers that only `anchor_first_answers` trains on
CORRECTION = {(False, True): 1.0, (True, True): 0.75, (False, False): 0.0, (True, False): -0.25}


@dataclasses.dataclass
class _Part:
  """A first or a second answer: its tokens, what it says, and whether that is right."""

  tokens: list[int]
  text: str
  formed: bool = False
  right: bool = False
  scored: bool = True
  evidence: dict = dataclasses.field(default_factory=dict)


async def recombined_corrections(ctx: EpisodeContext, task: Task, *, samples: int, separator: str,
                                 max_tokens: int, answer: str = r".+", stage: int = 1,
                                 anchored: bool = True) -> list[Trajectory]:
  """A group of n answers and n spliced corrections (Octopus, arXiv:2602.08503).

    (y1, y2) in Y1 x Y2 of one task  ->  y1 separator y2

  Y1 are all first answers, also of samples that have no second one, Y2 all second answers; a third
  is cut off. `select` picks n of the pairs so that about half of the 2n are right. Rewards are
  those of `correction_reward`. The log-probabilities of a spliced y2 are the policy's own behind
  its new y1, so ratios begin at 1; the sample is still one that was drawn behind another y1.

  Stage 1 trains second answers only. Stage 2 trains first ones too where both are right or both
  wrong, so that nothing teaches to answer wrongly first. A sample without correction is trained
  whole in both.

  Args:
    ctx: serves samples, scores and log-probabilities.
    task: the problem; a part is right if its reward is at least 1.
    samples: n.
    separator: text between two answers, such as an empty pair of tags.
    max_tokens: tokens of a completion, at most; longer pairs are left out.
    answer: regular expression that the whole of a well-formed answer matches.
    stage: 1 or 2.
    anchored: in stage 1, return the first answers that are masked once more, as sequences of their
      own with `tag_ids` 3 and no comparison, for `objectives.anchor_first_answers`.

  Returns:
    2n answers, group 0, then anchors, each a group of its own. `tag_ids` are 1 up to the second
    answer and 2 in it. Evidence: that of the final answer, `first_right`, `final_right`,
    `corrected` (wrong, then right) and `spoiled` (right, then wrong). Weights leave the mean over
    a task's answers what it is without anchors; a task weighs as it has sequences, those included.

  Raises:
    ValueError: an empty separator, another stage, or no sample.
  """
  marker = ctx.encode(separator)
  if not marker or stage not in (1, 2) or samples < 1:
    raise ValueError(f"recombined_corrections: separator={separator!r}, stage={stage}, samples="
                     f"{samples}; use a text, 1 or 2, and at least 1")
  found = await ctx.sample(task.prompt, n=samples, train=True)
  pairs = [_split(ctx, t, marker, answer) for t in found]
  await _judge(ctx, task, [part for pair in pairs for part in pair if part])
  group = [_original(t, *pair, marker) for t, pair in zip(found, pairs)]

  firsts = [first for first, _ in pairs if first.formed and first.scored]
  seconds = [second for _, second in pairs if second and second.formed and second.scored]
  spliced = [(first, second) for first in firsts for second in seconds
             if len(first.tokens) + len(marker) + len(second.tokens) <= max_tokens]
  rng = ctx.rng()
  right = sum((second or first).right for first, second in pairs)
  chosen = select([(a.right, b.right) for a, b in spliced], samples, right, rng)
  new = await asyncio.gather(*[_splice(ctx, task, *spliced[i], marker) for i in chosen])
  group += new
  both = pairs + [spliced[i] for i in chosen]
  again = rng.integers(samples, size=2 * samples - len(group))
  group += [dataclasses.replace(group[i], loss_mask=group[i].loss_mask.copy()) for i in again]
  both += [pairs[i] for i in again]

  anchors = []
  for t, (first, second) in zip(group, both):
    _reward(t, first, second)
    if second and (stage == 1 or first.right != second.right):
      t.loss_mask[t.tag_ids != SECOND] = False
      if stage == 1 and anchored and first.tokens:
        anchors.append(_anchor(t, len(first.tokens), len(anchors) + 1))
  scored = [t.reward for t in group if t.scored]
  for t in anchors:  # what is compared with nothing leaves the mean reward of the batch what it is
    t.reward = float(np.mean(scored)) if scored else 0.0
  for t in group + anchors:
    t.weight = (len(group) + len(anchors)) / len(group)
  return group + anchors


def select(pairs: Sequence[tuple[bool, bool]], count: int, right: int, rng: np.random.Generator
           ) -> list[int]:
  """Picks corrections, so that they and the samples are right about as often as wrong.

  With half = (count - right) // 2, classes named by what is first and second, correct or wrong:
  half wc, half cc, one cw, ww as long as there are some, more cw, then what is left of wc and cc.

  Args:
    pairs: whether first and second answer are right.
    count: wanted, as many as there are samples.
    right: samples whose final answer is right.
    rng: decides which of a class.

  Returns:
    Indices, fewer than `count` only if there are fewer pairs.
  """
  classes = {kind: [] for kind in CORRECTION}
  for i in rng.permutation(len(pairs)):
    classes[tuple(map(bool, pairs[i]))].append(int(i))
  wc, cc, cw, ww = (classes[k] for k in ((False, True), (True, True), (True, False),
                                         (False, False)))
  half = (count - right) // 2
  order = wc[:half] + cc[:half] + cw[:1] + ww + cw[1:] + wc[half:] + cc[half:]
  return order[:count]


def correction_reward(first_right: bool, second_right: bool | None, *, same: bool = False,
                      first_formed: bool = True, second_formed: bool = True) -> float:
  """0.9 S + 0.1 F (Octopus, arXiv:2602.08503).

  S of a correction is 1 for wrong to right, 0.75 for right twice, 0 for wrong twice, -0.25 for
  right to wrong; at most 0.5 if both are the same text or the second is malformed, at most 0 if the first
  is. Without correction (`second_right` is None) it is 0.5 if right, else -0.5. F is 1 for two
  well-formed answers, else 0.
  """
  if second_right is None:
    return 0.9 * (first_right - 0.5)
  score = CORRECTION[bool(first_right), bool(second_right)]
  if same or not second_formed:
    score = min(score, 0.5)
  if not first_formed:
    score = min(score, 0.0)
  return 0.9 * score + 0.1 * (first_formed and second_formed)


def _split(ctx, t, marker, answer):
  """First and second answer of a sample, the second None without a separator."""
  tokens = t.tokens[t.prompt_length:].tolist()
  ends = [i for i in range(len(tokens)) if tokens[i:i + len(marker)] == marker]
  # A stop token, which ends the text, belongs to an answer that is not followed by another.
  stop = t.finish == "stop" and ctx.decode(tokens[:-1]) == t.text
  if not ends:
    return _part(ctx, tokens[:len(tokens) - stop], False, answer), None
  start = ends[0] + len(marker)
  later = [i for i in ends if i >= start]
  second = tokens[start:later[0]] if later else tokens[start:]
  return _part(ctx, tokens[:ends[0]], False, answer), _part(ctx, second, stop and not later, answer)


def _part(ctx, tokens, stop, answer):
  text = ctx.decode(tokens[:len(tokens) - stop])
  return _Part(tokens, text, formed=re.fullmatch(answer, text, re.DOTALL) is not None)


async def _judge(ctx, task, parts):
  asked = [Trajectory(np.concatenate([task.prompt, p.tokens]), np.zeros(
      len(task.prompt) + len(p.tokens), bool), prompt_length=len(task.prompt), text=p.text,
      finish="stop") for p in parts]
  await ctx.score(task, asked)
  for part, t in zip(parts, asked):
    part.right, part.scored, part.evidence = t.scored and t.reward >= 1, t.scored, t.evidence


def _original(t, first, second, marker):
  """A sample without any third answer, its answers tagged."""
  length = len(t.tokens)
  if second:
    length = t.prompt_length + len(first.tokens) + len(marker) + len(second.tokens)
    t = dataclasses.replace(
        t, tokens=t.tokens[:length], loss_mask=t.loss_mask[:length], tag_ids=t.tag_ids[:length],
        turn_ids=t.turn_ids[:length], behaviour_logprobs=t.behaviour_logprobs[:length])
    t.tag_ids[length - len(second.tokens):] = SECOND
  t.tag_ids[t.prompt_length:length - (len(second.tokens) if second else 0)] = FIRST
  return t


async def _splice(ctx, task, first, second, marker):
  head = [*first.tokens, *marker]
  tokens = [*task.prompt, *head, *second.tokens]
  start, length = len(task.prompt), len(tokens)
  logprobs = np.zeros(length, np.float32)
  logprobs[start:] = await ctx.logprobs(task.prompt, tokens[start:], model="policy")
  at = np.arange(length)
  tags = np.where(at < start, 0, np.where(at < start + len(head), FIRST, SECOND))
  return Trajectory(tokens, at >= start, logprobs, tag_ids=tags, prompt_length=start,
                    text=f"{first.text}{ctx.decode(marker)}{second.text}", finish="stop")


def _reward(t, first, second):
  final = second or first
  t.scored, t.evidence = first.scored and final.scored, dict(final.evidence)
  t.reward = float(correction_reward(
      first.right, second.right if second else None,
      same=bool(second) and first.text.strip() == second.text.strip(), first_formed=first.formed,
      second_formed=bool(second) and second.formed))
  t.evidence |= {"first_right": ok(first.right), "final_right": ok(final.right),
                 "corrected": ok(final.right and not first.right),
                 "spoiled": ok(first.right and not final.right)}


def _anchor(t, tokens, group):
  end = t.prompt_length + tokens
  at = np.arange(end)
  return Trajectory(t.tokens[:end], at >= t.prompt_length, t.behaviour_logprobs[:end],
                    tag_ids=np.where(at < t.prompt_length, 0, ANCHOR), group=group,
                    prompt_length=t.prompt_length, text=t.text, finish="length", scored=t.scored,
                    evidence=dict(t.evidence))
