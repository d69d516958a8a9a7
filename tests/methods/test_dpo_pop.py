"""DPO-PoP: margins from weaker pairs, how pairs are compared, and what a margin learns that DPO does not."""

import functools

import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxrl import data
from jaxrl.batch import ModelOutputs
from jaxrl.data import transforms
from jaxrl.data.transforms.pairs_of_pairs import compared_pairs
from jaxrl.evaluation import implicit_rewards
from jaxrl.objectives import dpo_pop
from tests.objectives import compared

log_s, s = scipy.special.log_expit, scipy.special.expit
B, MOST = 0.8, 1.2
LINKS = {"tuple": [0, 2, 1, 0, 1, 2], "stronger": [1, 0, 0, 0, 1, 1]}  # of six pairs


def margin(trajectories, pair, own):
  ratio = [own[i].sum() - compared.of(trajectories[i], "reference").sum() for i in pair]
  return B * (ratio[0] - ratio[1])


def equation(trajectories, target):
  """Half of the mean over tuples of the card's loss, whose margins are those of a model, frozen."""
  frozen = [compared.of(t, target) for t in trajectories]

  def loss(own):
    tuples = {}
    for pair in compared.in_pairs(trajectories).values():
      columns = trajectories[pair[0]].columns
      tuples.setdefault(columns["tuple"], {})[columns["stronger"]] = pair
    total = []
    for both in tuples.values():
      strong, weak = both[1.0], both[0.0]
      m = np.clip(margin(trajectories, weak, frozen), 0, MOST)
      total.append(-log_s(margin(trajectories, strong, own) - m) - log_s(margin(trajectories, weak, own)))
    return np.mean(total) / 2
  return loss


@pytest.mark.parametrize("model", ["average", "old"])
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_are_the_equation(seed, model):
  trajectories = compared.pairs(seed, count=6, models=("reference", "average"), columns=LINKS)
  term = functools.partial(dpo_pop, beta=B, most=MOST, model=model)
  compared.equals(term, trajectories, equation(trajectories, model))


def test_margins_are_clipped_from_both_sides_and_meet_across_rows():
  trajectories = compared.pairs(7, count=6, models=("reference", "average"), columns=LINKS)
  frozen = [compared.of(t, "average") for t in trajectories]
  pairs = list(compared.in_pairs(trajectories).values())
  own = [margin(trajectories, pair, frozen) for pair in pairs]
  assert min(own) < 0 and max(own) > MOST, "both bounds are in the test"
  batch, _ = compared.prepared(functools.partial(dpo_pop, beta=B, most=MOST), trajectories, row_length=16)
  assert batch.tokens.shape[0] > 2
  weak_of = {LINKS["tuple"][k]: k for k in range(6) if not LINKS["stronger"][k]}
  for k, pair in enumerate(pairs):
    wanted = np.clip(own[weak_of[LINKS["tuple"][k]]], 0, MOST) if LINKS["stronger"][k] else 0.0
    for i in pair:
      found = np.asarray(batch.signals["pop_margin"])[np.asarray(batch.sequence_ids) == i]
      np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arguments, message", [
    (dict(most=0.0), "dpo_pop: most"), (dict(beta=-1.0), "dpo_pop: beta")])
def test_numbers_out_of_range_are_refused(arguments, message):
  trajectories = compared.pairs(0, count=6, models=("reference", "average"), columns=LINKS)
  batch, _ = compared.prepared(dpo_pop, trajectories)
  with pytest.raises(ValueError, match=message):
    dpo_pop(ModelOutputs(logprobs=batch.signals["old_logprobs"]), batch, **arguments)


# ---------------------------------------------------------------------------------- who is compared


GAPS = np.random.default_rng(0).exponential(size=400)


def test_random_comparisons_make_large_gaps_the_stronger_ones():
  found = compared_pairs(GAPS, scheme="random", times=5, noise=0.0, seed=1)
  assert found.shape == (2000, 2) and (GAPS[found[:, 0]] > GAPS[found[:, 1]]).all()
  # The stronger of two at random is the larger of two: its rank has mean 2/3.
  ranks = scipy.stats.rankdata(GAPS)[found] / len(GAPS)
  np.testing.assert_allclose(ranks.mean(axis=0), [2 / 3, 1 / 3], atol=0.02)


def test_iterative_comparisons_use_every_pair_as_the_stronger_one():
  found = compared_pairs(GAPS, scheme="iterative", times=3, noise=0.0, seed=1)
  assert (GAPS[found[:, 0]] > GAPS[found[:, 1]]).all()
  counts = np.bincount(found[:, 0], minlength=len(GAPS))
  assert counts[GAPS.argmin()] == 0 and (np.delete(counts, GAPS.argmin()) == 3).all()


@pytest.mark.parametrize("scheme", ["random", "iterative"])
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_annotators_err_as_often_as_they_should(scheme, noise):
  found = compared_pairs(GAPS, scheme=scheme, times=10, noise=noise, seed=2)
  wrong = GAPS[found[:, 0]] < GAPS[found[:, 1]]
  assert abs(wrong.mean() - noise) < 4 * np.sqrt(noise * (1 - noise) / len(found))


@pytest.mark.parametrize("gaps, arguments", [
    (GAPS, dict(scheme="both")), (GAPS, dict(times=0)), (GAPS, dict(noise=1.5)), ([1.0, 1.0], {})])
def test_impossible_comparisons_are_refused(gaps, arguments):
  with pytest.raises(ValueError, match="pairs_of_pairs"):
    compared_pairs(gaps, **{**dict(scheme="random", times=1, noise=0.0, seed=0), **arguments})


class Rows:
  def __init__(self, rows):
    self.rows = rows

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, index):
    return self.rows[index]

  def where(self, index):
    return f"file:{index + 1}"


def test_rows_hold_a_weaker_pair_and_become_two_linked_comparisons():
  rows = [dict(question=f"{i}?", answer="1", chosen=f"a{i}", rejected=f"b{i}", gap=g)
          for i, g in enumerate((0.3, 0.1, 0.9))]
  source = transforms.pairs_of_pairs(Rows(rows), seed=0, times=4)
  tokenizer = data.CharacterTokenizer("0123456789?ab")
  builder = data.PairBuilder(data.TaskBuilder(tokenizer), weaker="weaker")
  for index in range(len(source)):
    row = source[index]
    assert row["gap"] > row["weaker"]["gap"] and " over " in source.where(index)
  comparisons = [builder.read(source, index) for index in (0, 5)]
  linked = data.linked(comparisons)
  assert [c.answers for c in linked] == [c.answers for pair in comparisons for c in (pair, pair.weaker)]
  assert [[(c["tuple"], c["stronger"], c["preference"]) for c in pair.columns] for pair in linked] == [
      [(0, 1, 1), (0, 1, 0)], [(0, 0, 1), (0, 0, 0)], [(1, 1, 1), (1, 1, 0)], [(1, 0, 1), (1, 0, 0)]]
  assert data.linked(linked) == linked
  with pytest.raises(data.BadRow, match="file:1.*'gap'.*missing"):
    transforms.pairs_of_pairs(Rows([dict(question="x")]), seed=0)
  with pytest.raises(data.BadRow, match="file:2: field 'gap' holds 'much'"):
    transforms.pairs_of_pairs(Rows([rows[0], dict(rows[1], gap="much")]), seed=0)
  with pytest.raises(data.BadRow, match="field 'weaker'.*chosen"):
    builder.to_comparison(dict(rows[0], weaker=dict(question="?", answer="")), "here")


# --------------------------------------------------------------------------- a learnt reward, exactly


def learnt(noise=0.0, *, pop=True, most=MOST, average=True, updates=400):
  """A margin per pair as parameter, learnt by exact gradients of the loss in float64.

  -> gaps and margins of 60 pairs. All are labelled rightly, so plain DPO learns of no gaps."""
  gaps = np.sort(np.random.default_rng(3).exponential(size=60))
  strong, weak = compared_pairs(gaps, scheme="random", times=4, noise=noise, seed=4).T
  d, slow = np.zeros(60), np.zeros(60)
  for _ in range(updates):
    gradient = np.zeros(60)
    margins = np.clip((slow if average else d)[weak], 0, most) if pop else 0.0
    np.add.at(gradient, strong, -s(margins - d[strong]))
    np.add.at(gradient, weak, -s(-d[weak]))
    d -= 2.0 * gradient / len(strong)
    slow = 0.99 * slow + 0.01 * d
  return gaps, d


def test_margins_rank_pairs_by_their_gaps_where_labels_are_right():
  spearman = {noise: scipy.stats.spearmanr(*learnt(noise)).statistic for noise in (0.0, 0.3, 0.5)}
  plain = scipy.stats.spearmanr(*learnt(pop=False)).statistic
  assert spearman[0.0] > plain + 0.02 and spearman[0.0] > spearman[0.3] > spearman[0.5] - 0.1


def test_without_the_clip_margins_grow_further():
  bounded, free, chased = learnt()[1], learnt(most=np.inf)[1], learnt(most=np.inf, average=False)[1]
  assert bounded.max() <= free.max() <= chased.max() and chased.max() > bounded.max()


def test_what_is_measured_of_margins_and_gaps(monkeypatch):
  gaps = np.array([0.1, -0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
  margins = np.array([-1.0, -0.5, 1.0, 2.0, 3.0, 0.0, 5.0, 4.0])  # wrong, right (as labelled wrongly), ...
  monkeypatch.setattr(implicit_rewards, "margins_of", lambda workdir: (gaps, margins))
  found = implicit_rewards.of_gaps(None)
  ranks = [scipy.stats.rankdata(x) for x in (gaps, margins)]
  assert found == pytest.approx(dict(
      gap_correlation=np.corrcoef(*ranks)[0, 1], accuracy=(0 + 1 + 1 + 1 + 1 + 0.5 + 1 + 1) / 8,
      weakest_accuracy=0.5, strongest_accuracy=1.0, margin=margins.mean()))


def test_the_gradient_of_a_stronger_pair_is_that_of_the_shifted_logistic():
  """-d loss / d D of the stronger pair is s(m - D): larger than DPO's s(-D), and the weaker one's is DPO's."""
  trajectories = compared.pairs(9, count=2, models=("reference", "average"),
                                columns={"tuple": [0, 0], "stronger": [1, 0]})
  for t in trajectories:
    sign = 1 if t.columns["preference"] else -1
    t.signals["average_logprobs"] = t.signals["reference_logprobs"] + sign * t.loss_mask  # D_j > 0
  term = functools.partial(dpo_pop, beta=B, most=MOST)
  batch, _ = compared.prepared(term, trajectories)
  gradient = compared.value_and_gradient(term, batch)[2]
  own = compared.policy(trajectories)
  for k, pair in enumerate(compared.in_pairs(trajectories).values()):
    m = MOST if k == 0 else 0.0  # six or fewer tokens of 1 each, times 0.8, are at least 1.6
    wanted = -B * s(m - margin(trajectories, pair, own)) / 2
    at = (np.asarray(batch.sequence_ids) == pair[0]) & np.asarray(batch.loss_mask)
    np.testing.assert_allclose(gradient[at], wanted, rtol=1e-4)
