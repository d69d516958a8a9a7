"""A small network says for which prompts samples are worth buying, and how much known pairs count.

`config.rollout.episode` names `known_and_bought_pairs`, `config.rollout.edits` `weigh_pairs`.
"""

import asyncio
from typing import Any

import numpy as np

from jaxrl import compose
from jaxrl.batch import PREFERENCE
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rollouts.context import EpisodeContext
from jaxrl.rollouts.edits import Step
from jaxrl.rollouts.engine import GROUPS_PER_EPISODE

MEMORY = "meta_learner"  # key of `Step.memory`
WIDTH = 100
KNOWN, BOUGHT = 0, 1  # groups of an episode
SIZES = {"w1": (WIDTH,), "b1": (WIDTH,), "w2": (WIDTH,), "b2": ()}


def initial_memory() -> dict[str, Any]:
  """The network as it begins, weights 0.1 and biases 0, its optimiser and an empty buffer.

  All hidden units begin alike and see the same gradient, so they stay one: h rises with its input, and where
  it should fall it goes to 0 instead.
  """
  memory = {name: np.full(shape, 0.1 if name.startswith("w") else 0.0) for name, shape in SIZES.items()}
  moments = {f"{m}_{name}": np.zeros(shape) for m in "mv" for name, shape in SIZES.items()}
  return {**memory, **moments, "steps": 0, "batches": 0, "buffer": np.zeros((0, 3))}


def weight_of(network: dict[str, Any], score: np.ndarray) -> np.ndarray:
  """`s(w2 . tanh(w1 score + b1) + b2)`: what known pairs of such scores count. [...] -> [...]"""
  hidden = np.tanh(np.asarray(score)[..., None] * network["w1"] + network["b1"])
  return 1 / (1 + np.exp(-(hidden @ network["w2"] + network["b2"])))


def log_sigmoid(x: np.ndarray) -> np.ndarray:
  """log s(x), without overflow."""
  return -np.logaddexp(0, -np.asarray(x, np.float64))


@compose.needs("reference", "pairs")
@compose.supplies(columns=(PREFERENCE, "log_ratio"))
async def known_and_bought_pairs(ctx: EpisodeContext, task: Task, *, samples: int, always: bool = False,
                                 keep_others: bool = False) -> list[Trajectory]:
  """The pair of answers that a row holds, and perhaps the best and worst of some samples (MetaAPO,
  arXiv:2509.23371).

    d = sum over its answers of (2 preference - 1) (log pi - log pi_reference),    l = log s(d)
    samples are bought if u > h(l),    u uniform on [0, 1)

  with h the network of `weigh_pairs`. A prompt leaves the batch if nothing is bought for it, or if all
  samples are as good.

  Args:
    ctx: serves samples, scores and log-probabilities.
    task: the problem; its row holds two answers, see `data.PairBuilder`.
    samples: that are bought.
    always: buys for every prompt.
    keep_others: a prompt stays when nothing is bought, with its known pair alone.

  Returns:
    Group 0, the known pair; group 1, the best and the worst sample. Columns: `preference` and
      `log_ratio`, log pi - log pi_reference. Known answers were not drawn: their behaviour
      log-probabilities are what the policy says of them.
  """
  known = ctx.compared(task)
  await asyncio.gather(*(_read(ctx, t, drawn=False) for t in known))
  network = ctx.memory.get(MEMORY) or initial_memory()
  chance = float(weight_of(network, log_sigmoid(margin_of(known))))
  u = ctx.rng(23371).random()
  bought = []
  if always or u > chance:
    answers = await ctx.sample(task.prompt, n=samples, train=True)
    scores = await ctx.score(task, answers)
    if scores.count() and scores.max() > scores.min():
      bought = [answers[int(scores.argmax())], answers[int(scores.argmin())]]
      await asyncio.gather(*(_read(ctx, t, drawn=True) for t in bought))
      for t, preference in zip(bought, (1.0, 0.0)):
        t.group, t.columns[PREFERENCE] = BOUGHT, preference
  await ctx.score(task, known)
  for t in known:
    t.group, t.scored = KNOWN, bool(bought) or keep_others
  return known + bought


async def _read(ctx, t, drawn):
  """Writes the log ratio of an answer into it, and its log-probabilities if it was not drawn."""
  start = t.prompt_length
  prompt, answer = t.tokens[:start], t.tokens[start:]
  if not drawn:
    t.behaviour_logprobs[start:] = await ctx.logprobs(prompt, answer, model="policy")
  reference = await ctx.logprobs(prompt, answer, model="reference")
  t.columns = {**t.columns, "log_ratio": float(np.sum(t.behaviour_logprobs[start:] - reference))}


def margin_of(pair: list[Trajectory]) -> float:
  """`sum of (2 preference - 1) log_ratio`: of a pair, the difference of its log ratios."""
  return sum((2 * t.columns[PREFERENCE] - 1) * t.columns["log_ratio"] for t in pair)


def weigh_pairs(step: Step, *, beta: float = 0.1, every: int = 8, learning_rate: float = 5e-3,
                weight_decay: float = 1e-4, chunk: int = 128) -> list[Trajectory]:
  """Weighs known and bought pairs by a network that learns from both (MetaAPO, arXiv:2509.23371).

    loss of a prompt = w L_known + (1 - w) L_bought,    w = h(l_known),    L = -log s(beta d)

  With `sequence_mean` the loss of the batch is the mean over prompts. Every `every` batches the network
  makes one pass of AdamW over the numbers of those batches, in chunks, to make the same mixture small:
  d loss / d w = L_known - L_bought, so w falls where bought pairs are fitted better. A prompt without
  bought pair has the known one in both places.

  Args:
    step: a batch of `known_and_bought_pairs`.
    beta: of the loss, such as `dpo`'s.
    every: batches between two passes; 0 is never.
    learning_rate, weight_decay: of AdamW.
    chunk: prompts of one of its steps.

  Returns:
    The same trajectories, weighted. Metrics: `known_weight` (mean w), `bought_share` (of the prompts)
    and `meta_loss` (before each pass).
  """
  memory = step.memory.setdefault(MEMORY, initial_memory())
  prompts: dict[int, dict[int, list[Trajectory]]] = {}
  for group in step.groups():
    prompts.setdefault(group[0].group // GROUPS_PER_EPISODE, {})[
        group[0].group % GROUPS_PER_EPISODE] = group
  left = [p for p in prompts.values() if p[KNOWN][0].scored]
  sequences = sum(len(pair) for p in left for pair in p.values())
  weights, rows = [], []
  for pairs in left:
    known = margin_of(pairs[KNOWN])
    score = log_sigmoid(known)
    share = float(weight_of(memory, score))
    counts = {KNOWN: share, BOUGHT: 1 - share} if BOUGHT in pairs else {KNOWN: 1.0}
    for number, pair in pairs.items():
      for t in pair:  # `sequence_mean` divides by sequences, of which a pair has two
        t.weight *= counts[number] * sequences / (2 * len(left))
    if BOUGHT in pairs:
      weights.append(share)
      rows.append([score, *(-log_sigmoid(beta * d) for d in (known, margin_of(pairs[BOUGHT])))])
  memory["batches"] += 1
  memory["buffer"] = np.concatenate([memory["buffer"], np.reshape(rows, (-1, 3))])
  step.metrics |= {"known_weight": float(np.mean(weights)) if weights else float("nan"),
                   "bought_share": len(rows) / max(len(prompts), 1)}
  if every and memory["batches"] % every == 0 and len(memory["buffer"]):
    step.metrics["meta_loss"] = learn(memory, memory["buffer"], learning_rate, weight_decay, chunk)
    memory["buffer"] = np.zeros((0, 3))
  return step.trajectories


def learn(memory: dict[str, Any], rows: np.ndarray, learning_rate: float, weight_decay: float,
          chunk: int) -> float:
  """One pass of AdamW over rows of (l, L_known, L_bought); the mean loss before it. [prompts, 3]"""
  first = float(np.mean(_mixture(memory, rows)))
  for start in range(0, len(rows), chunk):
    gradients = gradient(memory, rows[start:start + chunk])
    memory["steps"] += 1
    for name, g in gradients.items():
      m = memory[f"m_{name}"] = 0.9 * memory[f"m_{name}"] + 0.1 * g
      v = memory[f"v_{name}"] = 0.999 * memory[f"v_{name}"] + 0.001 * g ** 2
      m, v = m / (1 - 0.9 ** memory["steps"]), v / (1 - 0.999 ** memory["steps"])
      memory[name] = np.asarray(memory[name] - learning_rate * (
          m / (np.sqrt(v) + 1e-8) + weight_decay * memory[name]))
  return first


def gradient(network: dict[str, Any], rows: np.ndarray) -> dict[str, np.ndarray]:
  """Of the mean mixture over rows of (l, L_known, L_bought), by parameter."""
  score, known, bought = rows.T
  hidden = np.tanh(score[:, None] * network["w1"] + network["b1"])
  w = weight_of(network, score)
  to_output = (known - bought) * w * (1 - w) / len(rows)
  to_hidden = to_output[:, None] * network["w2"] * (1 - hidden ** 2)
  return {"w1": score @ to_hidden, "b1": to_hidden.sum(0), "w2": to_output @ hidden,
          "b2": to_output.sum()}


def _mixture(network, rows):
  score, known, bought = rows.T
  w = weight_of(network, score)
  return w * known + (1 - w) * bought
