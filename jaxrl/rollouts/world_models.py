"""A forward and an inverse model of a world reward each other; the actions are not known."""

import asyncio
from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from jaxrl import compose
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rewards import ok
from jaxrl.rollouts.context import EpisodeContext


@compose.needs("reference")
async def imagine_next_states(ctx: EpisodeContext, task: Task, *, samples: int,
                              temperature: float = 1.0, floor: float = -10.0, total: bool = False
                              ) -> list[Trajectory]:
  """The forward model learns what the inverse model recognises (SWIRL, arXiv:2602.06130, phase I).

    z ~ Q_ref(. | x, y),    y_k ~ P(. | x, z),    R_k = max(floor, mean_t log Q_ref(z_t | x, y_k))

  As -H(Z | Y, X) >= E[log Q_ref(z | x, y)], this raises a lower bound of the mutual information of
  action and imagined state. Both models are one network with two prompts; the frozen one is the
  phase's reference.

  Args:
    ctx: serves samples of both; `config.rollout.templates` has a "forward" of `{state}` and
      `{action}`, and an "inverse" of `{state}` and `{next}`.
    task: its row has the texts `state` and `next`; an `action` is not read.
    samples: next states, a group.
    temperature: of the frozen model's action.
    floor: least reward.
    total: the sum over tokens, as in the theory, instead of the released code's mean.

  Returns:
    The group, with the evidence `recovered`, exp(R), and `matches`, whether it is the real state.
  """
  row = _row(task)
  inverse = ctx.prompt("inverse", state=row["state"], next=row["next"])
  action, = await ctx.sample(inverse, temperature=temperature, model="reference")
  forward = ctx.prompt("forward", state=row["state"], action=action.text)
  group = await ctx.sample(forward, n=samples, train=True)
  prompts = [ctx.prompt("inverse", state=row["state"], next=t.text) for t in group]
  await _reward(ctx, group, prompts, [action.tokens[action.prompt_length:]] * samples, floor, total)
  return _matched(group, row["next"])


@compose.needs("reference")
async def explain_transitions(ctx: EpisodeContext, task: Task, *, samples: int,
                              floor: float = -10.0, total: bool = False) -> list[Trajectory]:
  """The inverse model learns actions that explain what happened (SWIRL, arXiv:2602.06130, phase II).

    z_k ~ Q(. | x, y),    R_k = max(floor, mean_t log P_ref(y_t | x, z_k))

  With `objectives.kl` to the reference, the prior, this raises log P(y | x) >= E_Q[log P_ref(y | x,
  z)] - KL(Q || prior); the correspondence is exact for sums and a coefficient of 1.

  Args:
    ctx, task, samples, floor, total: as in `imagine_next_states`.

  Returns:
    The group, with the evidence `recovered`, exp(R), and `matches`, whether it is the row's
    `action`, where it has one.
  """
  row = _row(task)
  group = await ctx.sample(ctx.prompt("inverse", state=row["state"], next=row["next"]), n=samples,
                           train=True)
  prompts = [ctx.prompt("forward", state=row["state"], action=t.text) for t in group]
  await _reward(ctx, group, prompts, [np.asarray(ctx.encode(row["next"]))] * samples, floor, total)
  return _matched(group, row.get("action"))


@compose.needs("reference")
async def label_transitions(ctx: EpisodeContext, task: Task, *, samples: int) -> list[Trajectory]:
  """Real next states behind actions that the inverse model makes up: SWIRL's supervised baseline.

    z_k ~ Q_ref(. | x, y),    examples of P(y | x, z_k), for a loss such as `objectives.cross_entropy`

  Args:
    ctx, task: as in `imagine_next_states`.
    samples: actions of a transition, and so examples.

  Returns:
    The examples, each alone in its group, with the evidence `matches`, whether the made-up action is the
    row's `action`, where it has one.
  """
  row = _row(task)
  inverse = ctx.prompt("inverse", state=row["state"], next=row["next"])
  actions = await ctx.sample(inverse, n=samples, model="reference")
  following = dataclasses.replace(task, solution=row["next"])
  examples = []
  for k, action in enumerate(actions):
    prompt = ctx.prompt("forward", state=row["state"], action=action.text)
    example = ctx.solved(dataclasses.replace(following, prompt=prompt))
    example.group = k
    examples.append(example)
  found = await asyncio.gather(*[ctx.logprobs(t.tokens[:t.prompt_length], t.tokens[t.prompt_length:],
                                              model="policy") for t in examples])
  for t, action, logprobs in zip(examples, actions, found):
    t.behaviour_logprobs[t.prompt_length:] = logprobs
    if row.get("action") is not None:
      t.evidence["matches"] = ok(float(action.text.strip() == row["action"]))
  return examples


async def _reward(ctx, group, prompts, targets, floor, total):
  """Gives each sample the log-likelihood of a target behind its prompt, of the frozen model."""
  found = await asyncio.gather(*[ctx.logprobs(*pair) for pair in zip(prompts, targets)])
  for t, logprobs in zip(group, found):
    if not len(logprobs):
      raise ValueError("a transition without a text: neither state nor action may be empty")
    value = float(np.sum(logprobs) if total else np.mean(logprobs))
    t.reward = max(floor, value)
    t.evidence = {"recovered": ok(float(np.exp(t.reward)))}


def _matched(group, expected):
  for t in group:
    if expected is not None:
      t.evidence["matches"] = ok(float(t.text.strip() == expected))
  return group


def _row(task: Task) -> Mapping[str, Any]:
  if missing := {"state", "next"} - set(task.row):
    raise ValueError(f"task {task.id!r} has no {sorted(missing)[0]!r}: transitions are rows with the "
                     "texts state and next, such as those of task:transitions")
  return task.row
