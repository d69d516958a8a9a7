"""How well a few value systems stand for a society, and what a set of policies offers it."""

from collections.abc import Sequence
import json
import pathlib

from jaxtyping import Float, Int
import numpy as np
import orbax.checkpoint as ocp

from jaxrl.tasks import societies

NEWTON_STEPS, RIDGE = 30, 1e-3


def fit_clusters(differences: Float[np.ndarray, "comparisons values"], agents: Int[np.ndarray, "comparisons"],
                 clusters: int, *, restarts: int = 8, rounds: int = 50, seed: int = 0
                 ) -> tuple[Float[np.ndarray, "clusters values"], Int[np.ndarray, "agents"], float]:
  """Weights and members of clusters of annotators, by hard expectation-maximisation (SVSL-P,
  arXiv:2602.08835, for values that are known).

    P(comparison | w) = s(w . difference),    difference = values of the preferred minus the other one

  Weights have any scale here, which says how decided a cluster is; directions are what is compared.

  Args:
    differences: of every comparison.
    agents: who made it, counted from 0.
    clusters: at most.
    restarts: beginnings, of which the likeliest end is taken.
    rounds: of either step at most.
    seed: of the beginnings.

  Returns:
    Weights, the cluster of every annotator, and the mean log-likelihood of a comparison.
  """
  rng, count = np.random.default_rng(seed), int(agents.max()) + 1
  best = None
  for _ in range(restarts):
    member = rng.integers(clusters, size=count)
    for _ in range(rounds):
      weights = np.stack([_logistic(differences[member[agents] == l]) for l in range(clusters)])
      logs = -np.logaddexp(0, -differences @ weights.T)  # [comparisons, clusters]
      by_agent = np.stack([np.bincount(agents, weights=logs[:, l], minlength=count)
                           for l in range(clusters)], axis=1)
      new = by_agent.argmax(axis=1)
      if empty := sorted(set(range(clusters)) - set(new.tolist())):
        new[by_agent.max(axis=1).argsort()[:len(empty)]] = empty
      elif (new == member).all():
        break
      member = new
    likelihood = float(by_agent[np.arange(count), member].sum() / len(agents))
    if best is None or likelihood > best[2]:
      best = weights, member, likelihood
  return best


def representativeness(differences: Float[np.ndarray, "comparisons values"],
                       agents: Int[np.ndarray, "comparisons"],
                       weights: Float[np.ndarray, "clusters values"], members: Int[np.ndarray, "agents"]
                       ) -> float:
  """Mean over annotators of the share of their comparisons that the weights of their cluster get
  right; a tie is half right."""
  h = np.sum(differences * weights[members[agents]], axis=1)
  right = (h > 0) + 0.5 * (h == 0)
  count = np.bincount(agents, minlength=len(members))
  return float(np.mean((np.bincount(agents, weights=right, minlength=len(members)) / np.maximum(count, 1)
                        )[count > 0]))


def conciseness(weights: Float[np.ndarray, "clusters values"]) -> float:
  """The smallest distance of two clusters' weights, each normalised to sum 1; inf for one cluster."""
  shares = weights / weights.sum(axis=1, keepdims=True)
  return min((float(np.linalg.norm(a - b)) for i, a in enumerate(shares) for b in shares[:i]),
             default=float("inf"))


def adjusted_rand(a: Sequence[int], b: Sequence[int]) -> float:
  """Agreement of two partitions beyond chance (Hubert and Arabie, 1985): 1 if equal, 0 on average."""
  table = np.zeros((max(a) + 1, max(b) + 1))
  np.add.at(table, (np.asarray(a), np.asarray(b)), 1)

  def pairs(n):
    return float(np.sum(n * (n - 1) / 2))
  both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
  expected = rows * columns / max(pairs(np.array([len(a)])), 1)
  most = (rows + columns) / 2
  return 1.0 if most == expected else (both - expected) / (most - expected)


def hypervolume(points: Float[np.ndarray, "points objectives"], reference: Sequence[float]) -> float:
  """Volume that is dominated by points and dominates a reference; objectives are maximised (Zitzler
  and Thiele, 1999). Exact, by slices along the last objective: for few points."""
  points = np.asarray(points, float) - np.asarray(reference, float)
  points = points[(points > 0).all(axis=1)]
  if not len(points):
    return 0.0
  if points.shape[1] == 1:
    return float(points.max())
  heights = np.unique(points[:, -1])
  below = np.concatenate([[0.0], heights[:-1]])
  zero = np.zeros(points.shape[1] - 1)
  return float(sum((top - bottom) * hypervolume(points[points[:, -1] >= top, :-1], zero)
                   for bottom, top in zip(below, heights)))


def maximum_utility_loss(points: Float[np.ndarray, "points objectives"],
                         best: Float[np.ndarray, "others objectives"],
                         weights: Float[np.ndarray, "weights objectives"]) -> float:
  """The most that anybody with one of these weightings loses by having to choose among `points`
  instead of `best` (Zintgraf et al., 2015)."""
  loss = (np.asarray(best) @ np.asarray(weights).T).max(0) - (np.asarray(points) @ np.asarray(weights).T
                                                            ).max(0)
  return float(loss.max())


def _logistic(differences):
  """The likeliest weights, with a ridge that keeps separable comparisons finite."""
  w = np.zeros(differences.shape[1])
  for _ in range(NEWTON_STEPS):
    p = 1 / (1 + np.exp(-np.clip(differences @ w, -500, 500)))
    gradient = differences.T @ (1 - p) - RIDGE * w
    hessian = (differences * (p * (1 - p))[:, None]).T @ differences + RIDGE * np.eye(len(w))
    step = np.linalg.solve(hessian, gradient)
    w = w + step / max(1, np.linalg.norm(step) / 5)
    if np.abs(step).max() < 1e-8:
      break
  return w


def parts_found(workdir: pathlib.Path) -> dict[str, float]:
  """What a run of `configs/methods/pbmorl_value_systems.py` has found out about its toy society.

  Returns:
    `adjusted_rand` of the annotators' clusters with the parts that they belong to, and `weight_cosine`,
    the mean over parts of the largest cosine of a cluster's weights with those of the part.
  """
  config = json.loads((workdir / "config.json").read_text())
  newest = max((p for p in (workdir / "checkpoints").glob("[0-9]*") if p.name.isdigit()),
               key=lambda p: int(p.name))
  with ocp.PyTreeCheckpointer() as checkpointer:
    carried = checkpointer.restore(newest / "state")["carried"]["value_systems"]
  truth = np.array(societies.WEIGHTS)
  members, values = config["data"]["task"].get("members", 24), truth.shape[1]
  clusters = config["comparisons"]["objective"][0]["clusters"]
  found = np.asarray(carried["losses"])[:members, :clusters].argmin(axis=1)
  weights = np.exp(np.asarray(carried["logits"])[:clusters, :values])
  weights, truth = (w / np.linalg.norm(w, axis=1, keepdims=True) for w in (weights, truth))
  return {"adjusted_rand": adjusted_rand(found, np.arange(members) % len(truth)),
          "weight_cosine": float((truth @ weights.T).max(axis=1).mean())}
