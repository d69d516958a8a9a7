"""Words with some of one letter: no answer is right, but some are better, and people who compare
them err.

The gold reward rises with the letter's number and falls beyond half of the word. Words that are drawn
here hold few of it, so that a reward model which learns from them sees little of the fall: a policy
that goes on collecting the letter over-optimises it (Gao et al., arXiv:2210.10760).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.batch import Task, Trajectory
from jaxrl.tasks import knobs

LETTERS = "abcdefgh"


def sample(rng: np.random.Generator, *, length: int = 8, share: float = 0.25,
           sharpness: float = 8.0, noise: float = 0.2) -> dict[str, Any]:
  """A letter, two words, which of them somebody preferred, and how much better it is (`gap`, of gold
  rewards, below 0 where it is worse).

  Args:
    rng: source of randomness.
    length: letters of a word, even, 2 to 64.
    share: of the wanted letter in drawn words.
    sharpness: the better word is chosen with probability s(sharpness * difference of gold rewards).
    noise: share of the pairs whose answers are exchanged afterwards, at random.
  """
  knobs.integer("length", length, 2, 64)
  if length % 2:
    raise ValueError(f"length={length} must be even: the best words are half of one letter")
  knobs.share("share", share)
  if share == 1:
    raise ValueError("share=1: all words would be the same, so there would be nothing to compare")
  knobs.share("noise", noise)
  letter = LETTERS[rng.integers(len(LETTERS))]
  others = LETTERS.replace(letter, "")
  words: list[str] = []
  while len(words) < 2:
    word = "".join(letter if rng.random() < share else others[rng.integers(len(others))]
                   for _ in range(length))
    if word not in words:
      words.append(word)
  row = dict(question=f"{letter}:", answer=letter, length=length)
  difference = gold_reward(row, words[0]) - gold_reward(row, words[1])
  if (rng.random() > 1 / (1 + np.exp(-sharpness * difference))) != (rng.random() < noise):
    words.reverse()
    difference = -difference
  return dict(row, gap=difference, chosen=words[0], rejected=words[1], solution=words[int(rng.integers(2))])


def gold_reward(row: Mapping[str, Any], completion: str) -> float:
  """`1 - ((n - m) / m)^2` for n of the letter, with m half of the length; 0 for what is no word of
  that length. 1 at best, 0 for a word without the letter or with nothing else."""
  if len(completion) != row["length"] or set(completion) - set(LETTERS):
    return 0.0
  half = row["length"] / 2
  return 1 - ((completion.count(row["answer"]) - half) / half) ** 2


def gold(task: Task, completion: Trajectory) -> float:
  """`gold_reward` as a criterion: `jaxrl.tasks.letters:gold`."""
  return gold_reward(task.row, completion.text)


def check(row: Mapping[str, Any], completion: str) -> bool:
  """Whether the completion is as good as a word can be."""
  return gold_reward(row, completion) == 1


def key(row: Mapping[str, Any]) -> str:
  """The letter and both words."""
  return " ".join([row["answer"], *sorted([row["chosen"], row["rejected"]])])
