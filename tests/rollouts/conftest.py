"""A sampler and a scorer that cost nothing and tell what they were asked."""

import hashlib

import numpy as np
import pytest

from jaxrl.batch import Task
from jaxrl.rewards import Criterion, Scored
from jaxrl.rollouts import Rollouts
from jaxrl.sampling import Sample, SamplingParams

PARAMS = {"params": None}


class FakeTokenizer:
  """One token per character."""

  def encode(self, text):
    return [ord(c) for c in text]

  def decode(self, tokens):
    return "".join(map(chr, tokens))


class FakeSampler:
  """Three letters per sample, a function of prompt, key and row alone, as the real one promises."""

  def __init__(self):
    self.calls = []
    self.error = None
    self.after_delivery = lambda index: None  # called while the rest is "still being sampled"

  def sample(self, params, requests, base_key, *, on_done=None):
    assert params is PARAMS["params"]
    self.calls.append(list(requests))
    if self.error:
      raise self.error
    results = [[self._one(r, i, base_key) for i in range(r.n)] for r in requests]
    for index in range(len(results) - 1 if on_done else 0):
      on_done(index, results[index])
      self.after_delivery(index)
    return results

  def _one(self, request, row, base_key):
    identity = repr((base_key, request.key, row, list(request.prompt), request.params))
    letters = hashlib.sha256(identity.encode()).digest()[:3]
    tokens = np.array([ord("a") + b % 26 for b in letters], np.int32)
    return Sample(tokens, np.full(3, -0.5, np.float32), "stop")


class FakeScorer:
  """1 for a completion of an even sum of letters; what `broken(text)` holds for has no reward."""

  labels = ["even"]
  has_workers = False

  def __init__(self):
    self.calls = []
    self.error = None
    self.broken = lambda text: False

  def score(self, pairs, *, among=0):
    self.calls.append([(task.id, t.text) for task, t in pairs])
    if self.error:
      raise self.error
    return [self._one(t) for _, t in pairs]

  def _one(self, trajectory):
    if self.broken(trajectory.text):
      return Scored(0.0, False, {"even": Criterion(0.0, "unscorable", "no reference")})
    reward = float(sum(map(ord, trajectory.text)) % 2 == 0)
    return Scored(reward, True, {"even": Criterion(reward)})


def make_tasks(count, start=0):
  return [Task(id=f"t{i}", prompt=[ord(c) for c in f"{i}?"], question=f"{i}?", answer=str(i))
          for i in range(start, start + count)]


class World:
  """Builds `Rollouts` around the fakes and keeps what was reported."""

  def __init__(self):
    self.sampler, self.scorer, self.reports = FakeSampler(), FakeScorer(), []

  def rollouts(self, episode, *, stop_ids=(), temperature=1.0, **options):
    options.setdefault("report", self.reports.append)
    return Rollouts(episode, self.sampler, FakeTokenizer(), self.scorer,
                    sampling=SamplingParams(max_tokens=8, stop_ids=stop_ids,
                                            temperature=temperature), **options)

  def run(self, episode, tasks=3, *, key=(0, 0), first_episode=0, step=0, **options):
    tasks = make_tasks(tasks) if isinstance(tasks, int) else tasks
    return self.rollouts(episode, **options).run(
        PARAMS, tasks, base_key="base", key=key, step=step, first_episode=first_episode)


@pytest.fixture
def world():
  return World()


@pytest.fixture
def tasks_of():
  return make_tasks
