"""Which rollouts are trained on: a small network learns it, over fresh ones and some of earlier batches.

`config.rollout.edits` names the edit `jaxrl.rollouts.replay:choose_rollouts`.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxrl import compose
from jaxrl.batch import Trajectory
from jaxrl.rollouts.edits import Step

MEMORY = "rollout_bandit"  # key of `Step.memory`
FEATURES = ("reward", "group_mean", "group_std", "advantage", "length", "logprob", "age", "uses",
            "truncated")
KEPT = ("tokens", "loss_mask", "behaviour_logprobs", "turn_ids", "tag_ids", "signals",
        "prompt_length", "text", "task_id", "finish", "weight")


@compose.supplies(columns=("advantage",))
def choose_rollouts(step: Step, *, share: float = 0.5, count: int = 0, buffer: int = 4,
                    rule: str = "bandit", explore: float = 0.1, entropy_weight: float = 0.1,
                    entropy_floor: float = 0.3, smoothing: float = 0.5, window: int = 20,
                    width: int = 64, learning_rate: float = 1e-3, passes: int = 4,
                    epsilon: float = 1e-4) -> list[Trajectory]:
  """Trains on the rollouts that a bandit expects most of (CBS, arXiv:2602.08499).

  Candidates are the fresh rollouts and those of the last `buffer` batches. Each has a vector of
  `FEATURES`; a network of two layers scores it, the best are chosen, and a fraction `explore` of the
  places goes to others uniformly at random. One update later all that were chosen get the target

    rho = V' - V - entropy_weight * [E > floor] * (E' - E)

  with V the smoothed mean reward and E the mean of -log-probability of fresh rollouts, then and one
  update later, and the network regresses on the last `window` updates. As published, the second part
  favours falling entropy above the floor.

  Advantages are `(r - mean) / (std + epsilon)` over the whole fresh group, so choosing shifts no
  baseline; a replayed rollout keeps its own, and its behaviour log-probabilities for the ratio. Use
  `advantages.stored_advantages`.

  Args:
    step: the batch; sequences that are not scored are no candidates.
    share: of the candidates that are chosen, fresh ones and remembered ones together.
    count: how many are chosen, instead of a share; 0 is the share.
    buffer: batches that are remembered, first in, first out; 0 chooses among fresh ones only.
    rule: "bandit", or for comparison "random", "advantage" (the largest by magnitude).
    explore: share of the places that are drawn at random.
    entropy_weight, entropy_floor: of the target; the floor is a share of the first update's E.
    smoothing: share that V keeps at each update.
    window: updates that the network learns from.
    width: of its hidden layer.
    learning_rate, passes: of its gradient descent (Adam), per update.
    epsilon: of the advantage.

  Returns:
    The chosen rollouts, with `columns["advantage"]`. Metrics: `bandit_target` (rho of the last
    choice), `bandit_error` (mean square), `replayed` (share of the chosen), `chosen_reward`.

  Raises:
    ValueError: another rule, or numbers out of range.
  """
  if rule not in ("bandit", "random", "advantage"):
    raise ValueError(f"choose_rollouts: rule={rule!r}; valid are 'bandit', 'random' and 'advantage'")
  if not 0 < share <= 1 or not 0 <= explore <= 1 or min(buffer, count) < 0 or window < 1:
    raise ValueError(f"choose_rollouts: share={share}, explore={explore}, buffer={buffer}, count="
                     f"{count}, window={window}; use 0 < share <= 1, 0 <= explore <= 1, window >= 1")
  rng = np.random.default_rng([step.seed, step.index, 2602])
  memory = step.memory.setdefault(MEMORY, {
      "network": _network(rng, width), "adam": 0, "past": [], "store": [], "pending": None,
      "seen": None, "batches": 0})
  now = memory["batches"]  # `step.index` counts updates, of which a batch may have several
  memory["batches"] += 1
  fresh = [_record(t, a, now) for t, a in _with_advantages(step, epsilon)]
  if not fresh:
    return [dataclasses.replace(t, columns={**t.columns, "advantage": 0.0})
            for t in step.trajectories]
  _learn(memory, fresh, step, entropy_weight, entropy_floor, smoothing, window, learning_rate, passes)
  candidates = fresh + memory["store"]
  contexts = np.array([_context(c, now) for c in candidates])
  places = min(count or max(1, round(share * len(candidates))), len(candidates))
  chosen = _choose(memory, candidates, contexts, places, rule, explore, rng)
  memory["pending"] = contexts[chosen]
  for i in chosen:
    candidates[i]["uses"] += 1
  oldest = now - buffer
  memory["store"] = [c for c in candidates if c["index"] > oldest] if buffer else []
  step.metrics |= {"replayed": float(np.mean([candidates[i]["index"] < now for i in chosen])),
                   "chosen_reward": float(np.mean([candidates[i]["reward"] for i in chosen]))}
  mine = {id(c): t for c, t in zip(
      fresh, (t for group in step.groups() for t in group if t.scored))}
  return [_trajectory(candidates[i], mine.get(id(candidates[i])), -1 - place)
          for place, i in enumerate(sorted(chosen))]


def _with_advantages(step, epsilon):
  for group in step.groups():
    scored = [t for t in group if t.scored]
    rewards = np.array([t.reward for t in scored], np.float64)
    if len(rewards):
      deviations = rewards - rewards.mean()
      std = rewards.std(ddof=1) if len(rewards) > 1 else 0.0
      yield from zip(scored, deviations / (std + epsilon) if std > 0 else np.zeros(len(rewards)))


def _record(t: Trajectory, advantage: float, index: int) -> dict[str, Any]:
  """What is remembered of a rollout: NumPy arrays and plain values."""
  return {**{name: getattr(t, name) for name in KEPT}, "reward": float(t.reward), "index": index,
          "advantage": float(advantage), "uses": 0, "group": int(t.group),
          "weight": float(t.weight),
          "columns": {**{k: float(v) for k, v in t.columns.items()}, "advantage": float(advantage)}}


def _context(record, index) -> list[float]:
  mask = record["loss_mask"]
  tokens = max(int(mask.sum()), 1)
  return [record["reward"], record["mean"], record["std"], record["advantage"], np.log1p(tokens) / 5,
          float(record["behaviour_logprobs"][mask].sum()) / tokens, (index - record["index"]) / 4,
          record["uses"] / 4, float(record["finish"] == "length")]


def _trajectory(record, fresh, group):
  """The rollout itself, or once more what is remembered of it, in a group of its own."""
  if fresh is not None:
    return dataclasses.replace(fresh, columns=dict(record["columns"]))
  return Trajectory(**{name: record[name] for name in KEPT}, group=group, reward=record["reward"],
                    columns=dict(record["columns"]))


def _choose(memory, candidates, contexts, places, rule, explore, rng):
  """Indices of the chosen."""
  order = rng.permutation(len(candidates))
  if rule == "random":
    return order[:places].tolist()
  if rule == "advantage":
    scores = np.abs([c["advantage"] for c in candidates])
  else:
    scores = predict(memory["network"], contexts)
  at_random = int(rng.binomial(places, explore))
  best = order[np.argsort(-np.asarray(scores)[order], kind="stable")]
  chosen = best[:places - at_random].tolist()
  rest = [i for i in order.tolist() if i not in set(chosen)]
  return chosen + rest[:at_random]


def _learn(memory, fresh, step, entropy_weight, entropy_floor, smoothing, window, rate, passes):
  """Says what became of the last choice, and fits the network to the latest ones."""
  by_group: dict[int, list[float]] = {}
  for c in fresh:
    by_group.setdefault(c["group"], []).append(c["reward"])
  for c in fresh:
    c["mean"], c["std"] = (float(f(by_group[c["group"]])) for f in (np.mean, np.std))
  reward = float(np.mean([c["reward"] for c in fresh]))
  masks = [c["loss_mask"] for c in fresh]
  surprise = -float(sum(c["behaviour_logprobs"][m].sum() for c, m in zip(fresh, masks))
                    ) / max(int(sum(m.sum() for m in masks)), 1)
  seen = memory["seen"]
  if seen is None:
    memory["seen"] = dict(reward=reward, surprise=surprise, first=surprise)
    return
  value = smoothing * seen["reward"] + (1 - smoothing) * reward
  above = seen["surprise"] > entropy_floor * seen["first"]
  rho = value - seen["reward"] - entropy_weight * above * (surprise - seen["surprise"])
  memory["seen"] = dict(reward=value, surprise=surprise, first=seen["first"])
  memory["past"] = [*memory["past"], dict(contexts=memory["pending"], rho=float(rho))][-window:]
  error = fit(memory, rate, passes)
  step.metrics |= {"bandit_target": float(rho), "bandit_error": error}


def _network(rng, width):
  inputs = len(FEATURES)
  return {"w1": rng.normal(0, inputs ** -0.5, (inputs, width)), "b1": np.zeros(width),
          "w2": rng.normal(0, width ** -0.5, width), "b2": np.zeros(()),
          **{f"{kind}_{name}": np.zeros(shape) for kind in ("m", "v") for name, shape in (
              ("w1", (inputs, width)), ("b1", (width,)), ("w2", (width,)), ("b2", ()))}}


def predict(network: dict[str, np.ndarray], contexts: np.ndarray) -> np.ndarray:
  """Expected targets of feature vectors. [candidates, features] -> [candidates]"""
  return np.tanh(contexts @ network["w1"] + network["b1"]) @ network["w2"] + network["b2"]


def fit(memory: dict[str, Any], rate: float, passes: int) -> float:
  """Some steps of Adam on the mean squared error over what is remembered; the error before them."""
  network = memory["network"]
  x = np.concatenate([p["contexts"] for p in memory["past"]])
  y = np.concatenate([np.full(len(p["contexts"]), p["rho"]) for p in memory["past"]])
  first = None
  for _ in range(passes):
    hidden = np.tanh(x @ network["w1"] + network["b1"])
    residual = hidden @ network["w2"] + network["b2"] - y
    first = float(np.mean(residual ** 2)) if first is None else first
    to_output = 2 * residual / len(y)
    to_hidden = np.outer(to_output, network["w2"]) * (1 - hidden ** 2)
    gradients = {"w1": x.T @ to_hidden, "b1": to_hidden.sum(0), "w2": hidden.T @ to_output,
                 "b2": to_output.sum()}
    memory["adam"] += 1
    for name, g in gradients.items():
      network[f"m_{name}"] = 0.9 * network[f"m_{name}"] + 0.1 * g
      network[f"v_{name}"] = 0.999 * network[f"v_{name}"] + 0.001 * g ** 2
      m = network[f"m_{name}"] / (1 - 0.9 ** memory["adam"])
      v = network[f"v_{name}"] / (1 - 0.999 ** memory["adam"])
      network[name] = np.asarray(network[name] - rate * m / (np.sqrt(v) + 1e-8))
  return first
