"""SWIRL: who is asked what, rewards by hand, and the two phases as exact tables."""

import functools

import numpy as np
import pytest

from jaxrl import config as configs
from jaxrl import rollouts, tasks
from jaxrl.batch import Task
from jaxrl.rollouts import Rollouts
from jaxrl.sampling import Sample, SamplingParams

TEMPLATES = dict(forward="{state}+{action}=", inverse="{state}={next}+")


class Characters:
  bos_id = None

  def encode(self, text):
    return [ord(c) for c in text]

  def decode(self, tokens):
    return "".join(map(chr, tokens))


class World:
  """Sampler and likelihood as scripts, which keep who was asked what."""

  labels, has_workers = ["none"], False

  def __init__(self, answers, action, logprob):
    self.answers, self.action, self.logprob = answers, action, logprob
    self.sampled, self.read = [], []

  def sample(self, params, requests, base_key, *, on_done=None):
    return [[self._one(params, r, i) for i in range(r.n)] for r in requests]

  def _one(self, params, request, i):
    self.sampled.append((params, "".join(map(chr, request.prompt))))
    text = self.action if params == "reference" else self.answers[i]
    return Sample(np.array([ord(c) for c in text], np.int32), np.full(len(text), -1.0, np.float32),
                  "stop")

  def logprobs(self, params, sequences):
    texts = ["".join(map(chr, s)) for s in sequences]
    self.read += [(params, text) for text in texts]
    return [np.array([self.logprob(text, i) for i in range(len(text))]) for text in texts]

  def score(self, pairs, *, among=0):
    raise AssertionError("these episodes are their own judges")


def play(episode, answers, logprob, *, action="77", **options):
  world = World(answers, action, logprob)
  made = Rollouts(functools.partial(episode, samples=len(answers), **options), world, Characters(),
                  world, templates=TEMPLATES, likelihood=world, max_failure_rate=0.0,
                  sampling=SamplingParams(max_tokens=5))
  task = Task(id="t", prompt=[ord(c) for c in "12+34="], row=dict(state="12", action="34", next="64"))
  found = made.run({"params": "policy"}, [task], base_key=None, reference={"params": "reference"})
  return found, world


def test_the_forward_model_is_asked_with_the_frozen_one_s_action():
  logprob = lambda text, i: -0.1 * i - (1.0 if "64" in text else 2.0)
  found, world = play(rollouts.imagine_next_states, ["64", "99", "6"], logprob)
  assert world.sampled == [("reference", "12=64+")] + [("policy", "12+77=")] * 3
  assert world.read == [("reference", f"12={y}+77") for y in ("64", "99", "6")]
  # The mean over the two tokens of the action behind "12=..+".
  expected = [-1.0 - 0.65, -2.0 - 0.65, -2.0 - 0.55]
  assert [t.reward for t in found] == pytest.approx(expected)
  assert [t.evidence["matches"].score for t in found] == [1.0, 0.0, 0.0]
  assert [t.evidence["recovered"].score for t in found] == pytest.approx(np.exp(expected))
  assert all(t.loss_mask.sum() == len(t.text) and t.prompt_length == 6 for t in found)


def test_the_inverse_model_is_rewarded_with_the_likelihood_of_what_happened():
  logprob = lambda text, i: -0.5 if "34" in text else -20.0
  found, world = play(rollouts.explain_transitions, ["34", "11"], logprob)
  assert world.sampled == [("policy", "12=64+")] * 2
  assert world.read == [("reference", "12+34=64"), ("reference", "12+11=64")]
  assert [t.reward for t in found] == [-0.5, -10.0]
  assert [t.evidence["matches"].score for t in found] == [1.0, 0.0]
  found, _ = play(rollouts.explain_transitions, ["34", "11"], logprob, total=True, floor=-15.0)
  assert [t.reward for t in found] == [-1.0, -15.0]


def test_no_label_is_read():
  """The same rewards whatever the row says about the action, or if it says nothing."""
  logprob = lambda text, i: -0.1 * len(text)
  for row in (dict(state="12", next="64"), dict(state="12", next="64", action="00")):
    world = World(["64", "9"], "77", logprob)
    made = Rollouts(functools.partial(rollouts.imagine_next_states, samples=2), world, Characters(),
                    world, templates=TEMPLATES, likelihood=world, max_failure_rate=0.0,
                    sampling=SamplingParams(max_tokens=5))
    found = made.run({"params": "policy"}, [Task(id="t", prompt=[1], row=row)], base_key=None,
                     reference={"params": "reference"})
    assert [t.reward for t in found] == pytest.approx([-0.8, -0.7])


def test_rows_without_a_transition_are_refused():
  world = World(["1"], "2", lambda text, i: -1.0)
  made = Rollouts(functools.partial(rollouts.explain_transitions, samples=1), world, Characters(),
                  world, templates=TEMPLATES, likelihood=world, max_failure_rate=0.0,
                  sampling=SamplingParams(max_tokens=5))
  with pytest.raises(rollouts.EpisodeFailure, match="has no 'next'"):
    made.run({"params": "policy"}, [Task(id="t", prompt=[1], row=dict(state="1"))], base_key=None,
             reference={"params": "reference"})


def tables(seed, mix):
  """6 states, 4 actions, y = x + z mod 6: soft P[x, z, y] and Q[x, y, z], truth mixed with noise."""
  rng = np.random.default_rng(seed)
  truth = np.zeros((6, 4, 6))
  for x in range(6):
    for z in range(4):
      truth[x, z, (x + z) % 6] = 1
  p = mix * truth + (1 - mix) * rng.dirichlet(np.ones(6), size=(6, 4))
  inverse = truth.transpose(0, 2, 1) + 1e-9
  q = mix * inverse / inverse.sum(-1, keepdims=True) + (1 - mix) * rng.dirichlet(
      np.ones(4), size=(6, 6))
  return truth, p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)


def mutual_information(p, prior):
  """I(Y; Z | X) in nats, actions from the prior."""
  joint = p * prior[None, :, None]
  marginal = joint.sum(1, keepdims=True)
  return np.mean(np.sum(joint * np.log(np.maximum(p, 1e-300) / np.maximum(marginal, 1e-300)), (1, 2)))


def test_exact_phases_improve_both_models_and_the_bound():
  """Phase optima under KL: P ~ P Q^(1/beta), Q ~ Q P^(1/beta)."""
  right = []
  for seed in range(10):
    truth, p, q = tables(seed, 0.3)
    before = [np.mean(p.argmax(-1) == truth.argmax(-1))]
    new_p = p * q.transpose(0, 2, 1)
    new_p /= new_p.sum(-1, keepdims=True)
    prior = np.full(4, 0.25)
    assert mutual_information(new_p, prior) > mutual_information(p, prior)
    # -H(Z | Y, X) >= E[log Q(z | x, y)], for any inverse model.
    joint = new_p * 0.25
    posterior = joint / joint.sum(1, keepdims=True)
    entropy = -np.sum(joint * np.log(np.maximum(posterior, 1e-300)), (1, 2))
    bound = np.sum(joint * np.log(q.transpose(0, 2, 1)), (1, 2))
    assert (-entropy >= bound - 1e-9).all()
    right.append(before + [np.mean(new_p.argmax(-1) == truth.argmax(-1))])
  before, after = np.mean(right, axis=0)
  assert after > before + 0.05


def test_the_toy_is_a_world_whose_action_can_be_recovered():
  data = tasks.open_task("transitions", split="train", size=200, seed=0, digits=2, inverse=0.5)
  kinds = set()
  for row in data:
    assert (int(row["state"]) + int(row["action"])) % 100 == int(row["next"][::-1])
    kinds.add("=" in row["question"][:3])
    expected = row["action"] if "+" == row["question"][-1] else row["next"]
    assert row["answer"] == expected and len(row["answer"]) == 2
  assert kinds == {True, False}


def test_the_config_takes_turns_against_the_policy_of_each_phase_s_start():
  config = configs.load("configs/methods/swirl.py")
  assert list(config.phases) == ["sft", "rl", "inverse", "rl_again", "inverse_again"]
  names = [configs.phase_config(config, name).rollout.episode.name for name in config.phases[1:]]
  assert names == ["imagine_next_states", "explain_transitions"] * 2
  betas = [configs.phase_config(config, name).objective[1]["beta"] for name in config.phases[1:]]
  assert betas == [0.04, 0.1] * 2
