"""SWIRL: who is asked what, rewards by hand, and the two phases as exact tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, objectives, rollouts, tasks
from jaxrl import config as configs
from jaxrl.batch import ModelOutputs, Task, pack
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms
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


def test_the_supervised_baseline_learns_what_happened_behind_made_up_actions():
  class Texts(Characters):
    eos_id = 0

  world = World([], "77", lambda text, i: -0.1 * i)
  made = Rollouts(functools.partial(rollouts.label_transitions, samples=2), world, Texts(), world,
                  templates=TEMPLATES, likelihood=world, max_failure_rate=0.0,
                  sampling=SamplingParams(max_tokens=5))
  task = Task(id="t", prompt=[1], row=dict(state="12", action="34", next="64"))
  found = made.run({"params": "policy"}, [task], base_key=None, reference={"params": "reference"})
  assert world.sampled == [("reference", "12=64+")] * 2  # the row's action is not read
  assert ["".join(map(chr, t.tokens)) for t in found] == ["12+77=64\0"] * 2
  assert all(t.loss_mask.tolist() == [False] * 6 + [True] * 3 for t in found)
  assert {params for params, _ in world.read} == {"policy"} and len({t.group for t in found}) == 2
  np.testing.assert_allclose(found[0].behaviour_logprobs[6:], [-0.6, -0.7, -0.8], rtol=1e-6)


def test_rows_without_a_transition_are_refused():
  world = World(["1"], "2", lambda text, i: -1.0)
  made = Rollouts(functools.partial(rollouts.explain_transitions, samples=1), world, Characters(),
                  world, templates=TEMPLATES, likelihood=world, max_failure_rate=0.0,
                  sampling=SamplingParams(max_tokens=5))
  with pytest.raises(rollouts.EpisodeFailure, match="has no 'next'"):
    made.run({"params": "policy"}, [Task(id="t", prompt=[1], row=dict(state="1"))], base_key=None,
             reference={"params": "reference"})


TRUTH = np.eye(6)[(np.arange(6)[:, None] + np.arange(4)) % 6]  # y = x + z mod 6. [x, z, y]


def normal(table):
  return table / table.sum(-1, keepdims=True)


def tables(seed):
  """Soft P[x, z, y] and Q[x, y, z] that lean to the truth and are wrong in places."""
  rng = np.random.default_rng(seed)
  return (normal(np.exp(1.5 * TRUTH + rng.normal(size=(6, 4, 6)))),
          normal(np.exp(1.5 * TRUTH.transpose(0, 2, 1) + rng.normal(size=(6, 6, 4)))))


class Tables(World):
  """The two models are tables; the policy writes every answer that there is, once."""

  def __init__(self, p, q):
    super().__init__("012345", None, None)
    self.tables = {"+": np.log(p), "=": np.log(q)}  # 0+1=1 is read forward, 0=1+1 backward

  def _one(self, params, request, i):
    if params == "reference":  # of a transition, the action that would have led there
      state, _, following, _ = map(chr, request.prompt)
      self.action = str((int(following) - int(state)) % 6)
    return super()._one(params, request, i)

  def logprobs(self, params, sequences):
    assert params == "reference"
    texts = ["".join(map(chr, s)) for s in sequences]
    return [np.array([0, 0, 0, 0, self.tables[text[1]][tuple(map(int, text[::2]))]]) for text in texts]


@jax.jit
def step_to_optimum(batch, reference, rewards, beta):
  """A natural-gradient step of 1 / beta of the objective, exact over all answers, from a uniform
  policy. Where objective and advantages are right it lands on the optimum."""
  rows, answers = reference.shape
  logits = jnp.zeros_like(reference)
  chance = jnp.full(rows * answers, 1 / answers)

  def spread(values):  # one token of each sequence, the last of its row
    return jnp.zeros(batch.tokens.shape).at[:rows * answers, -1].set(values.ravel())

  def per_sequence(values):
    return jnp.zeros(batch.num_sequences).at[:rows * answers].set(values.ravel())
  batch = batch.replace(columns={"chance": per_sequence(chance)}, weights=per_sequence(chance))
  batch = batch.with_signals(reference_logprobs=spread(reference))
  credit = advantages.center_by_group(batch, per_sequence(rewards), weight="chance")
  batch = batch.with_signals(advantages=spread(credit[:rows * answers]))
  objective = sum_of_terms([objectives.reinforce,
                            functools.partial(objectives.kl, beta=beta, estimator="k2")])

  def loss(logits):
    outputs = ModelOutputs(logprobs=spread(jax.nn.log_softmax(logits)))
    return objective(outputs, batch, loss_weights(batch, "sequence_sum"), mean_weights(batch))[0]
  natural = jax.grad(loss)(logits) * (rows * answers) / chance.reshape(rows, answers)
  return jax.nn.softmax(logits - natural / beta)


def phase(episode, p, q, beta):
  """The table that the phase of an episode ends with: rewards by the episode, step by the objective."""
  forward = episode is rollouts.imagine_next_states
  old = p if forward else q
  world = Tables(p, q)
  made = Rollouts(functools.partial(episode, samples=old.shape[-1], floor=-1e3), world, Characters(),
                  world, templates=TEMPLATES, likelihood=world, max_failure_rate=0.0,
                  sampling=SamplingParams(max_tokens=1))
  pairs = [(x, (x + z) % 6) for x in range(6) for z in range(4)] if forward else np.ndindex(6, 6)
  found = made.run({"params": "policy"}, [
      Task(id=f"{x}{y}", prompt=[1], row=dict(state=str(x), next=str(y))) for x, y in pairs],
      base_key=None, reference={"params": "reference"})
  batch = pack(found, row_length=5, min_rows=len(found))
  assert (batch.sequence_ids[:len(found), -1] == np.arange(len(found))).all()
  reference = np.log(old).reshape(-1, old.shape[-1])
  rewards = np.float32([t.reward for t in found]).reshape(reference.shape)
  new = step_to_optimum(batch, np.float32(reference), rewards, beta)
  return np.maximum(np.asarray(new, np.float64), 1e-30).reshape(old.shape)


def information(p):
  """I(Y; Z | X) in nats, all actions alike."""
  return np.mean(np.sum(p / 4 * np.log(np.maximum(p, 1e-300) / p.mean(1, keepdims=True)), (1, 2)))


def likelihoods(p):
  """Of what happens, which is the truth nine times out of ten: log P(y | x, z) and log P(y | x)."""
  happens = 0.9 * TRUTH + 0.1 / 6
  return (np.mean(np.sum(happens * np.log(p), -1)),
          np.mean(np.sum(happens.mean(1) * np.log(p.mean(1)), -1)))


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_phases_end_where_their_bounds_are_largest(beta):
  """P ~ P Q(z | x, y)^(1 / beta), and Q ~ Q P(y | x, z)^(1 / beta)."""
  p, q = tables(0)
  new = phase(rollouts.imagine_next_states, p, q, beta)
  np.testing.assert_allclose(new, normal(p * q.transpose(0, 2, 1) ** (1 / beta)), rtol=1e-3, atol=1e-6)
  new = phase(rollouts.explain_transitions, p, q, beta)
  np.testing.assert_allclose(new, normal(q * p.transpose(0, 2, 1) ** (1 / beta)), rtol=1e-3, atol=1e-6)


def test_rounds_make_both_models_right_more_often_until_they_are_too_sure():
  """The likelihood of real transitions rises in the first round and falls later."""
  right, curves = [], []
  for seed in range(4):
    p, q = tables(seed)
    curve, accuracy = [likelihoods(p)[0]], []
    for _ in range(4):
      accuracy.append([np.mean(p.argmax(-1) == TRUTH.argmax(-1)), np.mean(
          (q.argmax(-1) == TRUTH.argmax(1))[TRUTH.any(1)])])
      p = phase(rollouts.imagine_next_states, p, q, 1.0)
      q = phase(rollouts.explain_transitions, p, q, 1.0)
      curve.append(likelihoods(p)[0])
    right.append(accuracy)
    curves.append(curve)
  before, after = np.mean(right, axis=0)[:2]
  assert (after > before + 0.1).all()
  curves = np.array(curves)
  assert (curves[:, 1] > curves[:, 0] + 0.1).all()
  assert (curves[:, 4] < curves[:, 1] - 1).all() and (curves[:, 4] < curves[:, 0]).all()


def test_without_a_pull_to_the_reference_states_become_recoverable_and_unreal():
  """As beta goes to 0 information nears log 4, all of it, and real states become less likely."""
  for seed in range(4):
    p, q = tables(seed)
    before, held, free = p, *(phase(rollouts.imagine_next_states, p, q, beta) for beta in (1.0, 0.1))
    assert information(before) < 0.5 and information(free) > 1.1
    assert information(before) < information(held) < information(free) < np.log(4)
    assert likelihoods(free)[1] < likelihoods(before)[1] < likelihoods(held)[1] + 0.02
    # -H(Z | Y, X) >= E[log Q(z | x, y)], whatever the inverse model: what the phase raises is a bound.
    for now in (before, held, free):
      joint = now / 4
      entropy = -np.sum(joint * np.log(np.maximum(joint / joint.sum(1, keepdims=True), 1e-300)))
      assert -entropy >= np.sum(joint * np.log(q.transpose(0, 2, 1)))


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
