"""MetaAPO: the network as it begins and as it learns, whose samples are bought, and what pairs count."""

import functools
import json

import numpy as np
import pytest
from scipy import optimize

from jaxrl import data
from jaxrl.batch import Task, Trajectory, pack
from jaxrl.objectives.aggregate import loss_weights
from jaxrl.rollouts import Rollouts, edits
from jaxrl.rollouts import meta_weights as meta
from jaxrl.rollouts.engine import GROUPS_PER_EPISODE
from jaxrl.sampling import SamplingParams
from tests.methods.conftest import TablePolicy, TableScorer


def test_the_network_begins_as_the_papers():
  margins = np.array([-5.0, -2.0, 0.0, 2.0, 5.0])
  found = meta.weight_of(meta.initial_memory(), meta.log_sigmoid(margins))
  np.testing.assert_allclose(found, [0.01, 0.11, 0.33, 0.47, 0.50], atol=0.005)
  assert (found < 0.5).all() and (np.diff(found) > 0).all()


def test_gradients_are_those_of_the_mixture():
  rng = np.random.default_rng(0)
  network = {name: rng.normal(size=shape) for name, shape in meta.SIZES.items()}
  rows = np.stack([-rng.exponential(size=9), rng.exponential(size=9), rng.exponential(size=9)], 1)
  gradients = meta.gradient(network, rows)
  for name, g in gradients.items():
    def loss(x, name=name):
      other = {**network, name: x.reshape(meta.SIZES[name])}
      hidden = np.tanh(rows[:, :1] * other["w1"] + other["b1"])
      w = 1 / (1 + np.exp(-hidden @ other["w2"] - other["b2"]))
      return np.mean(w * rows[:, 1] + (1 - w) * rows[:, 2])
    numeric = optimize.approx_fprime(network[name].reshape(-1), loss, 1e-7)
    np.testing.assert_allclose(np.reshape(g, -1), numeric, rtol=1e-4, atol=1e-7, err_msg=name)


def trained(memory, swapped, passes=60):
  """Bought pairs are fitted better where l is low, known ones where it is high, or the reverse."""
  rng = np.random.default_rng(1)
  for _ in range(passes):
    score = -rng.uniform(0, 4, 256)
    known, bought = np.where(score < -2, 1.5, 0.2), np.where(score < -2, 0.2, 1.5)
    rows = np.stack([score, bought, known] if swapped else [score, known, bought], 1)
    meta.learn(memory, rows, 5e-3, 1e-4, 64)
  return meta.weight_of(memory, np.array([-3.5, -0.5]))


def test_weights_follow_the_smaller_loss():
  """Check 2 of the card, with random weights to begin with."""
  rng = np.random.default_rng(0)
  spread = {name: rng.normal(0, 0.1, meta.WIDTH) for name in ("w1", "w2")}
  low, high = trained(meta.initial_memory() | spread, False)
  assert low < 0.01 and high > 0.99
  low, high = trained(meta.initial_memory() | spread, True)
  assert low > 0.99 and high < 0.01


def test_the_papers_start_is_one_unit_which_only_learns_to_rise():
  memory = meta.initial_memory()
  low, high = trained(memory, False)
  assert low < 0.01 and high > 0.99
  assert np.ptp(memory["w1"]) < 1e-9 and np.ptp(memory["w2"]) < 1e-9
  memory = meta.initial_memory()
  assert (trained(memory, True) < 0.01).all()  # w is near 0 where it should grow, so nothing makes it
  other = meta.initial_memory() | {"w1": np.random.default_rng(0).normal(0, 0.1, meta.WIDTH)}
  trained(other, False, passes=1)
  assert np.ptp(other["w1"]) > 0.01


def test_adam_is_optax():
  optax = pytest.importorskip("optax")
  rng = np.random.default_rng(2)
  rows = np.stack([-rng.exponential(size=300), rng.exponential(size=300), rng.exponential(size=300)], 1)
  memory, optimizer = meta.initial_memory(), optax.adamw(5e-3, weight_decay=1e-4)
  params = {name: np.array(memory[name]) for name in meta.SIZES}
  state = optimizer.init(params)
  for start in range(0, 300, 128):
    updates, state = optimizer.update(meta.gradient(params, rows[start:start + 128]), state, params)
    params = {name: params[name] + np.asarray(updates[name]) for name in params}
  meta.learn(memory, rows, 5e-3, 1e-4, 128)
  for name, value in params.items():
    np.testing.assert_allclose(memory[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


# ------------------------------------------------------------------------------------------- weights


def pair(episode, group, ratios, scored=True, length=3):
  return [Trajectory(np.arange(length + i), np.arange(length + i) > 0, scored=scored,
                     group=episode * GROUPS_PER_EPISODE + group,
                     columns={"preference": 1.0 - i, "log_ratio": ratios[i]}) for i in range(2)]


def test_the_loss_of_a_batch_is_the_mean_mixture_of_its_prompts():
  rng = np.random.default_rng(3)
  made, expected = [], []
  for episode in range(6):
    known, bought = rng.normal(size=(2, 2))
    left = episode != 4
    alone = episode == 2
    made += pair(episode, 0, known, scored=left)
    if left and not alone:
      made += pair(episode, 1, bought)
    if left:
      d, d_bought = known[0] - known[1], bought[0] - bought[1]
      w = meta.weight_of(meta.initial_memory(), -np.log1p(np.exp(-d)))
      losses = [np.log1p(np.exp(-0.3 * x)) for x in (d, d_bought)]
      expected.append(losses[0] if alone else w * losses[0] + (1 - w) * losses[1])
  step = edits.Step(made, {}, 0, {}, {})
  found = meta.weigh_pairs(step, beta=0.3)
  batch = pack(found, row_length=16, together=True)
  ratio = batch.columns["log_ratio"]
  per_token = np.zeros(batch.tokens.shape)
  for i, t in enumerate(found):
    partner = next(j for j, o in enumerate(found) if o.group == t.group and j != i)
    h = (ratio[i] - ratio[partner]) * (1 if t.columns["preference"] else -1)
    per_token[batch.sequence_ids == i] = np.log1p(np.exp(-0.3 * h))
  total = np.sum(np.asarray(loss_weights(batch, "sequence_mean")) * per_token)
  np.testing.assert_allclose(total, np.mean(expected), rtol=1e-5)
  np.testing.assert_allclose(step.metrics["bought_share"], 4 / 6)
  buffer = step.memory[meta.MEMORY]["buffer"]
  assert buffer.shape == (4, 3)


def test_the_network_learns_every_few_batches_and_empties_its_buffer():
  memory, sizes = {}, []
  for index in range(6):
    step = edits.Step(pair(0, 0, (-1.0, 1.0)) + pair(0, 1, (1.0, -1.0)), {}, index, memory, {})
    before = memory.get(meta.MEMORY, meta.initial_memory())["w1"].copy()
    meta.weigh_pairs(step, every=3)
    own = memory[meta.MEMORY]
    sizes.append(len(own["buffer"]))
    assert ("meta_loss" in step.metrics) == ((own["w1"] != before).any()) == (index % 3 == 2)
  assert sizes == [1, 2, 0, 1, 2, 0] and own["steps"] == 2
  assert meta.weight_of(own, -2.0) < meta.weight_of(meta.initial_memory(), -2.0)
  arrays = {k for k, v in own.items() if isinstance(v, np.ndarray)}
  json.dumps({k: v for k, v in own.items() if k not in arrays})


# ------------------------------------------------------------------------------------------ episodes


class Text:
  """Characters, with what data builders want of a tokenizer."""

  bos_id, eos_id, special_tokens = None, ord("$"), ()

  def encode(self, text):
    return [ord(c) for c in text]

  def decode(self, tokens):
    return "".join(map(chr, tokens))


class Likelihood:
  """The policy finds "y" likely, its reference does not; `margin` says how much."""

  def __init__(self, margin):
    self.margin = margin

  def logprobs(self, params, sequences):
    lift = self.margin if params == "policy" else 0.0
    return [np.array([lift * (t == ord("y")) - 1.0 for t in tokens], np.float32) for tokens in sequences]


def play(margin, tasks=300, memory=None, **options):
  builder = data.PairBuilder(data.TaskBuilder(Text(), data.Fields("question", "answer", "answer", ""),
                                              prompt_template="{question}"))
  made = Rollouts(functools.partial(meta.known_and_bought_pairs, samples=4, **options),
                  TablePolicy(lambda text: {"$": 1.0} if text[-1] in "yn" else {"y": 0.5, "n": 0.5}), Text(),
                  TableScorer(lambda t: float(t == "y")), max_failure_rate=0.0,
                  likelihood=Likelihood(margin), pairs=builder,
                  sampling=SamplingParams(max_tokens=3, stop_ids=(ord("$"),)))
  made.memory.update(memory or {})
  row = dict(question="q?", answer="y", chosen="y", rejected="n")
  found = made.run({"params": "policy"}, [Task(str(i), [ord("q"), ord("?")], "q?", "y", row=row)
                                          for i in range(tasks)], base_key=None,
                   reference={"params": "reference"})
  groups = {}
  for t in found:
    groups.setdefault(t.group // GROUPS_PER_EPISODE, []).append(t)
  return list(groups.values())


@pytest.mark.parametrize("margin", [-5.0, 0.0, 4.0])
def test_samples_are_bought_as_often_as_the_network_says(margin):
  groups = play(margin)
  w = float(meta.weight_of(meta.initial_memory(), meta.log_sigmoid(margin)))
  # Four samples are as good as one another with probability 1/8, and then nothing is bought.
  share = (1 - w) * 7 / 8
  bought = [len(g) == 4 for g in groups]
  assert abs(np.mean(bought) - share) < 4 * np.sqrt(share * (1 - share) / len(groups))
  for group in groups:
    known = group[:2]
    assert meta.margin_of(known) == pytest.approx(margin)
    assert [t.columns["preference"] for t in known] == [1.0, 0.0]
    assert all(t.scored == (len(group) == 4) for t in group)
    assert [chr(t.tokens[2]) for t in group] == ["y", "n"] * (len(group) // 2)
    assert all(t.loss_mask.tolist() == [False, False, True, True] for t in group)
    np.testing.assert_allclose(known[0].behaviour_logprobs, [0, 0, margin - 1, -1])


def test_always_and_keeping_others():
  groups = play(0.0, always=True)
  assert abs(np.mean([len(g) == 4 for g in groups]) - 7 / 8) < 0.08
  groups = play(5.0, keep_others=True)
  assert {len(g) for g in groups} == {2, 4} and all(t.scored for g in groups for t in g)


def test_what_was_learnt_decides():
  never = meta.initial_memory() | {"b2": np.array(50.0)}
  assert all(len(g) == 2 for g in play(0.0, tasks=50, memory={meta.MEMORY: never}))
