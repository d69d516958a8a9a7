"""JRM: one pass, two losses; the score never sees the critique, and the critique shapes its state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import config as configs
from jaxrl import tasks
from jaxrl.batch import CRITIQUE, pack
from jaxrl.data import CharacterTokenizer, compared
from jaxrl.evaluation import representation
from jaxrl.models import init_parameters, model_outputs, unbox
from jaxrl.objectives import bradley_terry, critique_likelihood
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms
from jaxrl.tasks import worked_sums
from jaxrl.training import inputs


@pytest.fixture(scope="module")
def read():
  """Config, decoder, parameters and the sequences of four pairs."""
  config = configs.load("configs/methods/jrm.py")
  config.model.update(layers=1, d_model=16, d_ff=32, heads=2, kv_heads=2)
  config.data.task, config.evaluate.pairs = dict(critiques=0.6), 8
  tokenizer = CharacterTokenizer(config.tokenizer.alphabet)
  decoder = inputs.decoder_config(config.model, tokenizer)
  params = jax.jit(lambda key: unbox(init_parameters(decoder, key)))(jax.random.key(0))
  builder, source = inputs.pair_builder(config, inputs.builder(config, tokenizer)), inputs.open_split(config, "test")
  found = [t for group in range(4) for t in compared(builder.read(source, group), tokenizer, group=group)]
  return config, decoder, params, found


def test_a_critique_names_the_wrong_steps():
  assert worked_sums.faults([3, 9, 4], [3, 2, 6]) == [] and worked_sums.critique([3, 9, 4], [3, 2, 6]) == "0"
  assert worked_sums.faults([3, 9, 4], [4, 3, 8]) == [1, 3]  # what follows a wrong step may be right
  source = tasks.open_task("worked_sums", split="test", size=100, seed=0)
  for index in range(100):
    row, wrong = source[index], []
    for name, item in zip(("chosen", "rejected"), row["answers"]):
      before, faults = 0, []
      for number, (term, step) in enumerate(zip(row["terms"], item["steps"]), start=1):
        if (before + term) % 10 != int(step):
          faults.append(number)
        before = int(step)
      assert row[name] == "=".join(item["steps"]) + "="
      assert row[f"{name}_critique"] == ("".join(map(str, faults)) or "0")
      assert item["labels"] == [i not in faults for i in range(1, len(row["terms"]) + 1)]
      wrong.append(len(faults))
    assert wrong[0] < wrong[1]


def joint_loss(decoder, batch, coefficient):
  terms = [bradley_terry, lambda o, b: critique_likelihood(o, b, coefficient=coefficient)]
  terms[1].__name__ = "critique_likelihood"
  weights, means = loss_weights(batch, "sequence_mean"), mean_weights(batch, by_sequence=True)

  def loss(params):
    outputs = model_outputs(decoder, params, batch, signals=("scores",))
    return sum_of_terms(terms)(outputs, batch, weights, means)[0], outputs
  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_the_joint_loss_is_that_of_the_equations(read):
  _, decoder, params, found = read
  batch = pack(found, row_length=64, together=True)
  (value, outputs), gradient = joint_loss(decoder, batch, 0.3)(params)
  scores, logprobs = (np.asarray(x, np.float64) for x in (outputs.scores[..., 0], outputs.logprobs))
  r, nll = [], []
  for item in range(len(found)):
    mask = (batch.sequence_ids == item) & batch.loss_mask
    answer, critique = mask & (batch.tag_ids != CRITIQUE), mask & (batch.tag_ids == CRITIQUE)
    r.append(scores[tuple(np.argwhere(answer)[-1])])
    nll.append(-logprobs[critique].mean() if critique.any() else 0.0)
  assert 0 < sum(n > 0 for n in nll) < len(nll)
  expected = np.mean([np.log1p(np.exp(b - a)) for a, b in zip(r[::2], r[1::2])]) + 0.3 * np.mean(nll)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  # The critique reaches what the score is read from, and not the head that reads it.
  (_, _), alone = joint_loss(decoder, batch, 0.0)(params)
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), gradient, alone)["params"]
  assert moved["score_head"]["kernel"] == 0 and moved["blocks_0"]["mlp"]["down"]["kernel"] > 1e-4


def test_scores_do_not_see_the_critique(read):
  _, decoder, params, found = read
  batch = pack(found, row_length=64, together=True)
  other = np.where(batch.tag_ids == CRITIQUE, (batch.tokens + 5) % decoder.vocab_size, batch.tokens)
  assert (other != batch.tokens).any()
  scores = jax.jit(lambda b: model_outputs(decoder, params, b, signals=("scores",), logprobs=False).scores)
  before, after = (np.asarray(scores(b)) for b in (batch, batch.replace(tokens=other)))
  answers = (batch.segment_ids > 0) & (batch.tag_ids != CRITIQUE)
  np.testing.assert_array_equal(before[answers], after[answers])
  assert (before[~answers & (batch.segment_ids > 0)] != after[~answers & (batch.segment_ids > 0)]).any()


@pytest.mark.parametrize("features, rank", [
    (np.eye(6), 6.0), (np.outer(np.arange(1, 9), np.arange(1, 4)), 1.0),
    (np.diag([3.0, 1.0]), np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))),
    (np.diag([2.0, 1.0, 1.0, 0.0]), 2 ** 1.5)])
def test_the_effective_rank_is_that_of_the_singular_values(features, rank):
  rng = np.random.default_rng(0)
  left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in features.shape)
  for same in (features, 7.0 * features, left @ features @ right, np.vstack([features, 0 * features])):
    np.testing.assert_allclose(representation.effective_rank(same), rank, rtol=1e-6)


def test_noise_in_every_direction_has_nearly_full_rank():
  features = np.random.default_rng(0).normal(size=(5000, 16))
  assert 15.9 < representation.effective_rank(features) <= 16
  features[:, 0] += 100.0  # a common direction, which is not one in which states differ
  assert representation.effective_rank(features) < 11
  assert representation.effective_rank(features - features.mean(axis=0)) > 15.9
