"""Words whose quality is known, compared by judges who also lean to one kind of word, or against it.

A question names the group that it is about, `x:` or `y:`. Of its two words one is open, beginning with a,
and one is not, beginning with b; quality is the number of c. Judges of group x overrate open words, those
of group y underrate them, so a model of their labels treats the groups differently.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.tasks import knobs

GROUPS, REST = "xy", "cdefgh"


def sample(rng: np.random.Generator, *, length: int = 6, sharpness: float = 1.5, lean: float = 1.5
           ) -> dict[str, Any]:
  """A group, and two words with labels.

  Args:
    rng: source of randomness.
    length: letters of a word, 2 to 64.
    sharpness: log-odds of a label for each c that one word has more.
    lean: log-odds of a label for open words in group x, and against them in group y.

  Returns:
    A row with `answers`, whose mappings hold `text`, `preference` (1 for the word that was chosen),
    `first` (1 for the open word), `group` and `quality`.
  """
  knobs.integer("length", length, 2, 64)
  group = int(rng.integers(2))
  words = [start + "".join(REST[i] for i in rng.integers(len(REST), size=length - 1)) for start in "ab"]
  quality = [word.count("c") for word in words]
  odds = sharpness * (quality[0] - quality[1]) + lean * (1 - 2 * group)
  first = float(rng.random() < 1 / (1 + np.exp(-odds)))
  answers = [dict(text=word, preference=first if i == 0 else 1 - first, first=1.0 - i, group=float(group),
                  quality=float(quality[i])) for i, word in enumerate(words)]
  best = words[int(quality[1] > quality[0])]
  return dict(question=f"{GROUPS[group]}:", answer=best, solution=words[int(1 - first)], answers=answers)


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is the word of higher quality."""
  return completion == row["answer"]


def key(row: Mapping[str, Any]) -> str:
  """Group and words."""
  return " ".join([row["question"], *sorted(x["text"] for x in row["answers"])])
