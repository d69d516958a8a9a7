"""Ways through one graph: `c>q:` -> `fkq`, the nodes that a walk from c to q passes.

The graph is the same for all problems: every node has `degree` edges, one from each of so many random
pairings of all nodes. What a solution shows is a walk at random that came to the goal, not the shortest.
"""

from collections.abc import Mapping
import functools
import string
from typing import Any

import numpy as np

from jaxrl.tasks import knobs

NODES = string.ascii_lowercase + string.ascii_uppercase


def sample(rng: np.random.Generator, *, nodes: int = 40, degree: int = 4, longest: int = 12, graph: int = 0
           ) -> dict[str, Any]:
  """A start, a goal, and a walk at random from one to the other.

  Args:
    rng: source of randomness.
    nodes: of the graph, an even number from 4 to 52.
    degree: edges of a node, 1 to 12; some may lead to the same neighbour.
    longest: nodes that a walk passes at most, after its start.
    graph: another graph for every number.
  """
  if knobs.integer("nodes", nodes, 4, len(NODES)) % 2:
    raise ValueError(f"nodes={nodes}: use an even number, as edges are pairings of all nodes")
  knobs.integer("longest", longest, 1, 100)
  edges = neighbours(nodes, knobs.integer("degree", degree, 1, 12), knobs.integer("graph", graph, 0, 10 ** 9))
  while True:  # until a walk comes to the goal: most often within some tries
    start, goal = (int(x) for x in rng.choice(nodes, 2, replace=False))
    at, walk = start, []
    while at != goal and len(walk) < longest:
      at = int(edges[at][rng.integers(degree)])
      walk.append(at)
    if at == goal:
      break
  solution = "".join(NODES[i] for i in walk)
  return dict(question=f"{NODES[start]}>{NODES[goal]}:", answer=NODES[goal], solution=solution,
              longest=longest, edges=["".join(sorted({NODES[j] for j in row})) for row in edges])


@functools.lru_cache(maxsize=8)
def neighbours(nodes: int, degree: int, graph: int) -> tuple[tuple[int, ...], ...]:
  """The nodes that each node has an edge to, one for each pairing."""
  rng, found = np.random.default_rng([graph, nodes, degree]), []
  for _ in range(degree):
    pairs = rng.permutation(nodes).reshape(-1, 2)
    partner = np.empty(nodes, int)
    partner[pairs], partner[pairs[:, ::-1]] = pairs[:, ::-1], pairs
    found.append(partner)
  return tuple(tuple(int(x) for x in row) for row in np.stack(found, axis=1))


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion walks along edges, not too far, and ends when it first comes to the goal."""
  start, walk = row["question"][0], completion.strip()
  steps = zip(start + walk, walk)
  return (0 < len(walk) <= row["longest"] and walk.find(row["answer"]) == len(walk) - 1
          and all(here in NODES and NODES.index(here) < len(row["edges"]) and
                  there in row["edges"][NODES.index(here)] for here, there in steps))


def key(row: Mapping[str, Any]) -> str:
  """Start and goal."""
  return row["question"]
