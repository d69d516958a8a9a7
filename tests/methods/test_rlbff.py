"""RLBFF: log-odds of two tokens as a score with a zero, principles that conflict, raters that agree."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxrl import config as configs
from jaxrl import tasks
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.data import agreed_principles, CharacterTokenizer, compared
from jaxrl.objectives import binary_label, bradley_terry
from jaxrl.objectives.aggregate import loss_weights
from jaxrl.tasks import principles
from jaxrl.training import inputs


def answers(labels):
  """Pairs of answers of one token, with the probability that each satisfies the principle."""
  found = [Trajectory([3, 4], [False, True], group=i // 2,
                      columns={"label": p, "preference": float(i % 2 == 0)}) for i, p in enumerate(labels)]
  return jax.tree.map(jnp.asarray, pack(found, row_length=2 * len(labels), together=True))


def of_scores(term, batch, count, **kwargs):
  def loss(r):
    scores = jnp.zeros((1, 2 * count, 1)).at[0, 1::2, 0].set(r)
    return jnp.sum(loss_weights(batch, "sequence_mean") * term(ModelOutputs(scores=scores), batch, **kwargs)[0])
  return jax.jit(jax.value_and_grad(loss))


def test_the_best_score_is_the_logit_of_the_label_whatever_the_prompt():
  """An answer that satisfies half of the principles has the score 0, and pairs cannot know."""
  labels = np.array([0.9, 0.5, 0.3, 0.02])
  function = of_scores(binary_label, answers(labels), 4, label="label")
  end = scipy.optimize.minimize(lambda r: [np.float64(v) for v in function(jnp.float32(r))], np.zeros(4),
                                jac=True, method="BFGS", options=dict(gtol=1e-6))
  np.testing.assert_allclose(end.x, np.log(labels / (1 - labels)), atol=1e-2)


def test_a_prompt_s_offset_moves_labels_and_not_pairs():
  batch, r = answers([1.0, 0.0, 1.0, 0.0]), np.array([1.0, -1.0, 0.5, -2.0])
  moved = r + np.array([3.0, 3.0, -3.0, -3.0])
  pairs, labels = (of_scores(term, batch, 4) for term in (bradley_terry, binary_label))
  np.testing.assert_allclose(pairs(jnp.float32(moved))[0], pairs(jnp.float32(r))[0], rtol=1e-6)
  # Closed form: each label pays log(1 + exp(-r)) of its own.
  signed = moved * [1, -1, 1, -1]
  np.testing.assert_allclose(labels(jnp.float32(moved))[0], np.log1p(np.exp(-signed)).mean(), rtol=1e-6)


def test_principles_are_what_their_names_say():
  for text in ("1359", "3159", "772", "99", "0123456"):
    digits = [int(c) for c in text]
    assert [principles.satisfies(text, i) for i in range(5)] == [
        all(a <= b for a, b in itertools.pairwise(digits)), len(digits) in (2, 4, 6), digits.count(7) > 0,
        sum(digits) < 20, len(digits) == len(dict.fromkeys(digits))]


def test_no_order_of_answers_agrees_with_conflicting_principles():
  """Of pairs in which the rejected answer satisfies more of the others, a count is always wrong."""
  source = tasks.open_task("principles", split="test", size=200, seed=0, conflicts=True)
  for index in range(200):
    row = source[index]
    good, bad = (sum(principles.satisfies(row[name], i) for i in range(5)) for name in ("chosen", "rejected"))
    assert bad >= good  # one more of its own, at least one fewer of the others
    assert principles.satisfies(row["chosen"], int(row["principle"]))
    assert not principles.satisfies(row["rejected"], int(row["principle"]))


def test_the_model_reads_the_principle_behind_the_answer_and_a_policy_does_not():
  config = configs.load("configs/methods/rlbff.py")
  config.evaluate.pairs = 5
  tokenizer, source = CharacterTokenizer(config.tokenizer.alphabet), inputs.open_split(config, "test")
  builder = inputs.pair_builder(config, inputs.builder(config, tokenizer))
  for index in range(5):
    row = source[index]
    pair = compared(builder.read(source, index), tokenizer, group=0)
    assert [tokenizer.decode(t.tokens) for t in pair] == [
        f"={row[name]}+{row['principle']}=" for name in ("chosen", "rejected")]
    other = {**row, "principle": str((int(row["principle"]) + 1) % 5)}
    changed = compared(builder.to_comparison(other, "here"), tokenizer, group=0)
    assert (pair[0].tokens != changed[0].tokens).sum() == 1
    assert tokenizer.decode(builder.tasks.parse(row, "here", False).prompt) == "="
  decoder = inputs.decoder_config(config.model, tokenizer)
  assert [tokenizer.decode([i]) for i in decoder.verdict] == ["1", "0"]


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.9])
def test_principles_are_kept_if_everybody_has_one_like_them(threshold):
  rng = np.random.default_rng(0)
  raters = [rng.normal(size=(n, 3)) for n in (4, 2, 5, 1)]
  found = agreed_principles(raters, threshold=threshold)
  for a, own in enumerate(raters):
    for i, x in enumerate(own):
      like = [max(x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in other) > threshold
              for b, other in enumerate(raters) if b != a]
      assert found[a][i] == all(like)
  assert [len(kept) for kept in found] == [4, 2, 5, 1]


def test_agreement_finds_what_raters_share_and_a_higher_threshold_keeps_less():
  """Three raters name the same two attributes in other words, and one of their own each."""
  rng = np.random.default_rng(1)
  shared, private = np.eye(8)[:2], np.eye(8)[2:5]
  raters = [np.vstack([shared + 0.1 * rng.normal(size=(2, 8)), private[[i]]]) for i in range(3)]
  kept = agreed_principles(raters, threshold=0.8)
  assert all(k.tolist() == [True, True, False] for k in kept)
  counts = [sum(k.sum() for k in agreed_principles(raters, threshold=t)) for t in (-1, 0.8, 0.99, 0.9999)]
  assert counts == sorted(counts, reverse=True) and counts[0] == 9 and counts[-1] == 0
  assert not agreed_principles([shared, np.zeros((0, 8))])[0].any()


def test_embeddings_that_do_not_fit_together_are_refused():
  with pytest.raises(ValueError, match="shapes"):
    agreed_principles([np.ones((2, 3)), np.ones((2, 4))])
