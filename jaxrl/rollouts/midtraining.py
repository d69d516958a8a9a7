"""Reinforcement mid-training: some tokens of a text are thought about, the others imitated.

The edit of this file is named `jaxrl.rollouts.midtraining:remember_difficulty`.
"""

import asyncio
from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from jaxrl import compose
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.objectives.next_tokens import TEXT
from jaxrl.rewards import ok
from jaxrl.rollouts.documents import document_of, opening
from jaxrl.rollouts.context import EpisodeContext
from jaxrl.rollouts.edits import Step
from jaxrl.rollouts.prefixes import boundary_end

TIERS = 3  # easy, medium, hard
UNMEASURED = -1.0  # entropy of tokens that nobody asked about
KEY = "difficulty"  # in `Trajectory.signals` and `Step.memory`


@compose.needs("reference")
@compose.supplies(KEY)
async def predict_tokens(ctx: EpisodeContext, task: Task, *, samples: int, boundary: str,
                         budget: int, steps: int, shrink: float = 0.2, smallest: int = 1,
                         length_weight: float = 0.1, largest_length_reward: float = 1.0,
                         early: Sequence[float] = (0.5, 0.4, 0.1),
                         late: Sequence[float] = (0.1, 0.3, 0.6),
                         change: Sequence[float] = (0.3, 0.7), probes: int = 8, first: int = 1,
                         field: str = "") -> list[Trajectory]:
  """Thoughts about one token of a text, in a budget, and the text without it (RMT,
  arXiv:2509.24375).

    d ~ tier_probabilities(t),   tau_c uniform over the tokens of tier d,   (thought, y)_i ~ policy
    r_i = (1 - w) * r(y_i, tau_c) + w * length_reward(thought_i, B_t),      B_t = budget_at(t)

  Tiers are the terciles of H_pos, the entropy of the frozen reference at each token, over the texts
  so far (`remember_difficulty`), at first over the text itself. H_pos is estimated without bias by
  the mean -log p of `probes` samples of a token. The other tokens are for `objectives.next_tokens`,
  which adds the mean over them to that of the policy gradient under aggregation "sequence_mean".

  Args:
    ctx: serves samples, scores and log-probabilities; `config.rollout.templates` has a "think" of
      `{budget}`, which follows the text.
    task: a text; its own prompt and answer are for evaluations.
    samples: G, of the token.
    boundary: text that ends a thought. Without one the length earns nothing.
    budget, smallest, shrink: B_0, B_min and g, see `budget_at`.
    steps: updates over which budget and tiers change, those of the phase.
    length_weight: w.
    largest_length_reward: r_max, at a thought of B_t tokens.
    early, late, change: p1, p2 and the shares of `steps` at which the change begins and ends. In a
      text that lacks a tier the others share its probability in proportion.
    probes: samples behind H_pos.
    first: index in the text of the first token that may be thought about.
    field: field of the row that holds the text; "" is question and solution together.

  Returns:
    The group, then the text, a group of its own with `tag_ids` 4 and no comparison; nothing for a
    text without a token from `first` on. Evidence beside the reward's own: `thought_tokens`,
    `length_reward`, `budget` and `tier`, 0 to 2.

  Raises:
    ValueError: numbers out of range, or an empty boundary.
  """
  marker = ctx.encode(boundary)
  if not marker or samples < 1 or probes < 1 or first < 0 or not 0 <= length_weight <= 1:
    raise ValueError(f"predict_tokens: boundary={boundary!r}, samples={samples}, probes={probes}, "
                     f"first={first}, length_weight={length_weight}; use a text, at least 1, 1 and "
                     "0, and a share")
  allowed = budget_at(ctx.step, steps, budget=budget, smallest=smallest, shrink=shrink)
  probabilities = tier_probabilities(ctx.step, steps, early=early, late=late, change=change)
  head, text = opening(ctx, task), ctx.encode(document_of(task, field))
  tokens = np.array([*head, *text], np.int32)
  places = list(range(max(len(head) + first, 1), len(tokens)))
  if not places:
    return []
  entropies = await _entropies(ctx, tokens, places, probes)
  known = ctx.memory.get(KEY, ())
  tiers = np.searchsorted(thresholds(known if len(known) else entropies), entropies)
  rng = ctx.rng()
  place, tier = _draw(places, tiers, probabilities, rng)

  prompt = tokens[:place].tolist() + ctx.render("think", budget=str(allowed))
  group = await ctx.sample(prompt, n=samples, train=True)
  await ctx.score(dataclasses.replace(task, answer=ctx.decode(tokens[place:place + 1])), group)
  for t in group:
    end = boundary_end(t, marker)
    length = end - len(marker) - t.prompt_length if end else len(t.tokens) - t.prompt_length
    value = length_reward(length, allowed, largest_length_reward) if end else 0.0
    t.reward = (1 - length_weight) * t.reward + length_weight * value
    t.evidence |= {"thought_tokens": ok(length), "length_reward": ok(value),
                   "budget": ok(allowed), "tier": ok(tier)}
    t.signals[KEY] = np.full(len(t.tokens), UNMEASURED, np.float32)
  rest = await _text(ctx, tokens, len(head), place)
  rest.text, rest.evidence = document_of(task, field), {"entropy": ok(np.mean(entropies))}
  rest.signals[KEY][places] = entropies
  _weigh(group, rest)
  return [*group, rest]


def remember_difficulty(step: Step, *, window: int = 4096) -> list[Trajectory]:
  """Keeps the entropies of the last tokens, whose terciles `predict_tokens` reads.

  Args:
    step: the batch, which stays as it is.
    window: tokens.

  Returns:
    The trajectories. Metrics `easy_below` and `hard_above`, the terciles in nats.

  Raises:
    ValueError: an empty window, or trajectories of another episode.
  """
  if window < 1:
    raise ValueError(f"remember_difficulty: window={window}; keep at least 1 token")
  if any(KEY not in t.signals for t in step.trajectories):
    raise ValueError("remember_difficulty reads what the episode predict_tokens measures: name it "
                     "in config.rollout.episode")
  new = [t.signals[KEY][t.signals[KEY] != UNMEASURED] for t in step.trajectories]
  kept = np.concatenate([np.asarray(step.memory.get(KEY, ()), np.float32), *new])[-window:]
  if len(kept):
    step.memory[KEY] = kept
    low, high = thresholds(kept)
    step.metrics |= dict(easy_below=float(low), hard_above=float(high))
  return step.trajectories


def budget_at(step: int, steps: int, *, budget: int, smallest: int, shrink: float) -> int:
  """Tokens that a thought may take: max(B_min, floor(B_0 * g^(t / T))).

  Raises:
    ValueError: budgets that are not 1 <= smallest <= budget, or a shrink not in (0, 1].
  """
  if steps < 1 or not 1 <= smallest <= budget or not 0 < shrink <= 1:
    raise ValueError(f"predict_tokens: budget={budget}, smallest={smallest}, shrink={shrink}, "
                     f"steps={steps}; use 1 <= smallest <= budget, 0 < shrink <= 1, and at least "
                     "1 step")
  # The addend takes 7 * 1 / 7 and the like for what they are.
  return max(smallest, math.floor(budget * shrink ** min(step / steps, 1.0) + 1e-9))


def tier_probabilities(step: int, steps: int, *, early: Sequence[float], late: Sequence[float],
                       change: Sequence[float]) -> np.ndarray:
  """Probabilities of easy, medium and hard tokens: p1 before t1, p2 from t2 on, linear between. [3]

  Raises:
    ValueError: three numbers that are no distribution, or changes out of order.
  """
  for name, p in (("early", early), ("late", late)):
    if len(p) != TIERS or min(p) < 0 or abs(sum(p) - 1) > 1e-6:
      raise ValueError(f"predict_tokens: {name}={list(p)} must be {TIERS} probabilities, of easy, "
                       "medium and hard tokens, that add up to 1")
  if len(change) != 2 or not 0 <= change[0] <= change[1] <= 1:
    raise ValueError(f"predict_tokens: change={list(change)} must be two shares of the updates in "
                     "order")
  begin, end = (share * steps for share in change)
  u = 0.0 if step < begin else 1.0 if step >= end else (step - begin) / (end - begin)
  return (1 - u) * np.asarray(early, np.float64) + u * np.asarray(late, np.float64)


def length_reward(length: int, budget: int, largest: float = 1.0) -> float:
  """A triangle over the length of a thought: 0 at 0, `largest` at the budget, 0 from twice that."""
  return largest * max(0.0, 1.0 - abs(length / budget - 1.0))


def thresholds(entropies: Sequence[float]) -> np.ndarray:
  """The terciles; an entropy that equals one is of the tier below. [2]"""
  return np.quantile(np.asarray(entropies, np.float64), [1 / TIERS, 2 / TIERS])


async def _entropies(ctx, tokens, places, probes):
  """Mean -log p of tokens that the reference samples at each place. [places]"""
  found = await asyncio.gather(*[
      ctx.sample(tokens[:place].tolist(), n=probes, max_tokens=1, model="reference")
      for place in places])
  return np.array([-np.mean([t.behaviour_logprobs[-1] for t in some]) for some in found])


def _draw(places, tiers, probabilities, rng):
  present = np.isin(np.arange(TIERS), tiers)
  p = probabilities * present
  p = p / p.sum() if p.sum() > 0 else present / present.sum()
  tier = int(rng.choice(TIERS, p=p))
  return int(rng.choice(np.asarray(places)[tiers == tier])), tier


async def _text(ctx, tokens, start, left_out):
  """The text as a sequence whose loss is on all of its tokens but one."""
  start = max(start, 1)
  logprobs = np.zeros(len(tokens), np.float32)
  logprobs[start:] = await ctx.logprobs(tokens[:start].tolist(), tokens[start:].tolist(),
                                        model="policy")
  at = np.arange(len(tokens))
  return Trajectory(tokens, (at >= start) & (at != left_out), logprobs,
                    tag_ids=np.where(at >= start, TEXT, 0), group=1, prompt_length=start,
                    finish="stop", signals={KEY: np.full(len(tokens), UNMEASURED, np.float32)})


def _weigh(group, rest):
  """Weights under which a mean over all sequences is that of the group plus that of texts."""
  scored = [t for t in group if t.scored]
  for t in scored:
    t.weight = (len(scored) + 1) / len(scored)
  rest.weight = float(len(scored) + 1)
  # Its reward is compared with nothing; this leaves the mean over the batch what it is.
  rest.reward = float(np.mean([t.reward for t in scored])) if scored else 0.0
