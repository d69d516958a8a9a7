"""A policy that is a table: episodes run against it with exact probabilities and no model."""

import dataclasses
import hashlib
import math

import numpy as np
import pytest

from jaxrl.batch import Task
from jaxrl.rewards import Criterion, Scored
from jaxrl.rollouts import Rollouts
from jaxrl.sampling import Sample, SamplingParams

END = "$"


class Characters:
  """One token per character."""

  bos_id = None

  def encode(self, text):
    return [ord(c) for c in text]

  def decode(self, tokens):
    return "".join(map(chr, tokens))


@dataclasses.dataclass
class TablePolicy:
  """Draws one character after the other; a sample depends on prompt, key and row alone.

  Attributes:
    next: from a text to the probabilities of what follows, by character; "$" ends a sample.
    asked: every request, in order.
    drawn: tokens that were sampled so far.
  """

  next: object
  asked: list = dataclasses.field(default_factory=list)
  drawn: int = 0

  def sample(self, params, requests, base_key, *, on_done=None):
    self.asked += requests
    return [[self._one(r, row) for row in range(r.n)] for r in requests]

  def _one(self, request, row):
    seed = hashlib.sha256(repr((request.key, row, list(request.prompt))).encode()).digest()
    rng = np.random.default_rng(int.from_bytes(seed[:8], "big"))
    text, tokens, logprobs = "".join(map(chr, request.prompt)), [], []
    while len(tokens) < request.params.max_tokens and tokens[-1:] != [ord(END)]:
      table = self.next(text)
      characters, p = list(table), np.array(list(table.values()), np.float64)
      index = int(np.searchsorted(np.cumsum(p), rng.random() * p.sum()))
      tokens.append(ord(characters[index]))
      logprobs.append(math.log(p[index] / p.sum()))
      text += characters[index]
    self.drawn += len(tokens)
    finish = "stop" if tokens[-1] == ord(END) else "length"
    return Sample(np.array(tokens, np.int32), np.array(logprobs, np.float32), finish)


class TableScorer:
  """A reward that is a function of the text; None where a text cannot be judged."""

  labels = ["right"]
  has_workers = False

  def __init__(self, reward):
    self.reward, self.judged = reward, []

  def score(self, pairs, *, among=0):
    self.judged += [t.text for _, t in pairs]
    found = [self.reward(t.text) for _, t in pairs]
    return [Scored(0.0, False, {"right": Criterion(0.0, "unscorable", "")}) if r is None
            else Scored(float(r), True, {"right": Criterion(float(r))}) for r in found]


@dataclasses.dataclass
class Played:
  trajectories: list
  policy: TablePolicy
  scorer: TableScorer


@pytest.fixture
def play():
  """`play(episode, next, reward, ...)`: runs an episode on some tasks, `0?`, `1?`, ... ."""
  def run(episode, next, reward, *, tasks=1, max_tokens=8, templates=None, key=(0,)):
    policy, scorer = TablePolicy(next), TableScorer(reward)
    rollouts = Rollouts(episode, policy, Characters(), scorer, templates=templates,
                        max_failure_rate=0.0,
                        sampling=SamplingParams(max_tokens=max_tokens, stop_ids=(ord(END),)))
    problems = [Task(id=str(i), prompt=[ord(c) for c in f"{i}?"], question=f"{i}?")
                for i in range(tasks)]
    found = rollouts.run({"params": None}, problems, base_key=None, key=key)
    return Played(found, policy, scorer)
  return run
