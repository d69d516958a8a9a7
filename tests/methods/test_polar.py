"""POLAR: the best discriminator of policies is a pointwise mutual information."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from jaxrl import config as configs
from jaxrl import tasks
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.data import CharacterTokenizer
from jaxrl.objectives import bradley_terry
from jaxrl.objectives.aggregate import loss_weights
from jaxrl.tasks import habits
from jaxrl.training import inputs


def pool(seed, policies, answers):
  return np.random.default_rng(seed).dirichlet(0.6 * np.ones(answers), size=policies) + 0.02 / answers


def normalised(p):
  return p / p.sum(axis=-1, keepdims=True)


def mutual_information(p):
  """log q(b | a) - log m(b), [a, b], for a pool of categorical policies p[P, answer]."""
  posterior = p / p.sum(axis=0)  # Pr(P | a)
  return np.log(posterior.T @ p) - np.log(p.mean(axis=0))


def chances(p, independent):
  """Of (a, chosen, rejected): A draws both of the first, B the last. [a, b, c]"""
  n = len(p)
  together = np.einsum("pa,pb,qc->abc", p, p, p)
  if independent:
    return together / n ** 2
  return (together - np.einsum("pa,pb,pc->abc", p, p, p)) / (n * (n - 1))


def best_scores(weights):
  """The table r[a, b] that minimises the pre-training loss, in float64, b = 0 as its origin."""
  k = len(weights)

  def loss(x):
    r = np.concatenate([np.zeros((k, 1)), x.reshape(k, k - 1)], axis=1)
    h = r[:, :, None] - r[:, None, :]
    pull = -weights * scipy.special.expit(-h)
    gradient = (pull.sum(axis=2) - pull.sum(axis=1))[:, 1:]
    return -(weights * scipy.special.log_expit(h)).sum(), gradient.ravel()
  end = scipy.optimize.minimize(loss, np.zeros(k * (k - 1)), jac=True, method="BFGS",
                                options=dict(gtol=1e-10, maxiter=2000))
  return np.concatenate([np.zeros((k, 1)), end.x.reshape(k, k - 1)], axis=1)


def test_independent_draws_have_the_mutual_information_as_their_optimum():
  """With the package's own loss on every triple, weighted by its chance: no gradient there, and only there."""
  p = normalised(pool(0, 4, 3))
  weights, best = chances(p, True), mutual_information(p)
  best -= best[:, :1]
  np.testing.assert_allclose(best_scores(weights), best, atol=1e-4)

  triples = [(a, b, c) for a, b, c in itertools.product(range(3), repeat=3) if b != c]
  found = [Trajectory([3, 4], [False, True], group=i, weight=weights[t], columns={"preference": x})
           for i, t in enumerate(triples) for x in (1.0, 0.0)]
  batch = jax.tree.map(jnp.asarray, pack(found, row_length=2 * len(found), together=True))
  places = np.array([(a, x) for a, b, c in triples for x in (b, c)])
  order = np.asarray(batch.sequence_ids[0, 1::2])[:len(found)]

  @jax.jit
  @jax.grad
  def slope(table):
    scores = jnp.zeros((*batch.tokens.shape, 1)).at[0, 1:2 * len(found):2, 0].set(
        table[places[order, 0], places[order, 1]])
    return jnp.sum(loss_weights(batch, "sequence_sum") * bradley_terry(ModelOutputs(scores=scores), batch)[0])
  assert np.abs(slope(jnp.float32(best))).max() < 1e-7
  assert np.abs(slope(jnp.float32(best * 0.8))).max() > 1e-5
  shifted = best + np.array([[3.0], [-1.0], [0.5]])  # any function of the reference
  assert np.abs(slope(jnp.float32(shifted))).max() < 1e-6


def test_two_different_policies_only_come_near_it_and_the_nearer_the_larger_the_pool():
  gaps = {}
  for n in (2, 4, 16):
    found = []
    for seed in range(4):
      p = normalised(pool(seed, n, 3))
      best = mutual_information(p)
      found.append(np.abs(best_scores(chances(p, False)) - (best - best[:, :1])).mean())
    gaps[n] = np.mean(found)
  assert gaps[2] > 2 * gaps[4] and gaps[4] > 2 * gaps[16] > 0


def test_habits_tell_policies_apart():
  """Answers of one policy have one error, and mostly one style."""
  source = tasks.open_task("habits", split="train", size=300, seed=0)
  kept = []
  for index in range(300):
    row = source[index]
    total = row["a"] + row["b"]
    for item in row["answers"]:
      style, error = int(item["policy"][0]), int(item["policy"][1])
      written = item["text"].strip("+=")
      kept.append(item["text"] == habits.STYLES[style].format(written))
      wrong = [a != b for a, b in zip(written, str(total), strict=True)]
      assert wrong == {0: [False] * len(wrong), 1: [False] * (len(wrong) - 1) + [True],
                       2: [True] * (len(wrong) - 1) + [False]}[error]
  assert 0.8 < np.mean(kept) < 0.9  # 0.8 + 0.2 / 4


@pytest.mark.parametrize("stage", ["pretrain", "tune"])
def test_a_model_reads_question_and_reference_and_question_again(stage):
  config = configs.load(f"configs/methods/polar.py:{stage}")
  config.data.task_size = 50
  tokenizer, source = CharacterTokenizer(config.tokenizer.alphabet), inputs.open_split(config, "train")
  builder = inputs.pair_builder(config, inputs.builder(config, tokenizer))
  for index in range(50):
    pair, row = builder.read(source, index), source[index]
    assert tokenizer.decode(pair.task.prompt) == f"{row['question']}{row['reference']}={row['question']}"
    assert pair.answers == (row["chosen"], row["rejected"])
    if stage == "tune":
      texts = {item["rank"]: item["text"] for item in row["answers"]}
      assert [row[name] for name in ("reference", "chosen", "rejected")] == [texts[i] for i in (1, 2, 3)]
    else:
      of = {name: {item["policy"] for item in row["answers"] if item["text"] == row[name]}
            for name in ("reference", "chosen", "rejected")}
      assert of["reference"] & of["chosen"]
      assert any(a != b for a in of["reference"] & of["chosen"] for b in of["rejected"])


def test_a_judge_takes_the_reference_from_the_row():
  """As the criterion does: the prompt of the model is made of the task's row."""
  config = configs.load("configs/methods/polar.py")
  builder = inputs.builder(config, CharacterTokenizer(config.tokenizer.alphabet))
  row = dict(question="12+34=", answer="46", reference="+46", anything=None)
  task = builder.parse(row, "here", False, solution="47")
  assert builder.tokenizer.decode(task.prompt) == "12+34=+46=12+34=" and task.solution == "47"
