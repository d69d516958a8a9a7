"""Figures of reward models against values by hand, SciPy and enumeration."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from jaxrl.evaluation import calibration
from jaxrl.evaluation import reward_model_metrics as metrics
from jaxrl.evaluation.reward_model_metrics import Scored


def scored(scores, grades, lengths=None, **kwargs):
  return Scored(np.array(scores, float), np.array(grades, float),
                np.array(lengths or [5] * len(scores), float), **kwargs)


def some_questions(count=40, seed=0):
  rng = np.random.default_rng(seed)
  found = []
  for _ in range(count):
    n = rng.integers(1, 6)
    found.append(Scored(rng.normal(size=n).round(1), rng.integers(0, 3, n).astype(float),
                        rng.integers(1, 30, n).astype(float), "ab"[rng.integers(2)]))
  return found


def test_pairs_by_hand():
  pairs = metrics.pairs_of([scored([0.5, 2.0, -1.0], [1, 0, 0], [3, 5, 3]), scored([1, 1], [2, 5], [9, 1]),
                            scored([4], [1])])
  np.testing.assert_array_equal(pairs.margins, [-1.5, 1.5, 0])
  np.testing.assert_array_equal(pairs.longer, [-2, 0, -8])
  np.testing.assert_array_equal(pairs.questions, [0, 0, 1])
  assert metrics.accuracy(pairs.margins) == pytest.approx(0.5)  # wrong, right, half right
  assert np.isnan(metrics.accuracy(metrics.pairs_of([]).margins))


def test_accuracy_within_one_question_is_the_tau_of_ranks():
  """With all grades different and no ties, 2 accuracy - 1 is Kendall's tau."""
  rng = np.random.default_rng(1)
  scores, grades = rng.normal(size=9), rng.permutation(9)
  found = metrics.accuracy(metrics.pairs_of([scored(scores, grades)]).margins)
  np.testing.assert_allclose(2 * found - 1, scipy.stats.kendalltau(scores, grades).statistic)


def test_intervals_resample_questions():
  rng = np.random.default_rng(0)
  # One pair per question: the exact binomial answer, nearly.
  margins = np.where(rng.random(400) < 0.7, 1.0, -1.0)
  low, high = metrics.accuracy_interval(margins, np.arange(400))
  p = (margins > 0).mean()
  expected = 1.96 * np.sqrt(p * (1 - p) / 400)
  np.testing.assert_allclose([low, high], [p - expected, p + expected], atol=0.01)
  # Four equal pairs per question hold no more information than one.
  copies = metrics.accuracy_interval(np.repeat(margins, 4), np.repeat(np.arange(400), 4))
  np.testing.assert_allclose(copies, [low, high], atol=1e-12)
  assert all(np.isnan(metrics.accuracy_interval(np.zeros(0), np.zeros(0, int))))


def test_rm_bench_by_hand():
  # Scores follow the style alone: plainer is worse by one.
  styled = scored([0, 1, 2, 0, 1, 2], [1, 1, 1, 0, 0, 0], styles=np.array([0, 1, 2, 0, 1, 2]))
  # A perfect judge, but for one cell: concise and better 0.5, Markdown and worse 0.7.
  good = scored([0.5, 3, 4, 0, 0.1, 0.7], [1, 1, 1, 0, 0, 0], styles=np.array([0, 1, 2, 0, 1, 2]))
  pairs = metrics.pairs_of([styled])
  matrix = metrics.style_matrix(pairs.margins, pairs.styles)
  np.testing.assert_array_equal(matrix, [[0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.5]])
  assert metrics.by_difficulty(matrix) == {"easy": 1.0, "normal": 0.5, "hard": 0.0}
  both = metrics.report([styled, good])
  assert both["styles"]["matrix"] == [[0.75, 0.5, 0.0], [1, 0.75, 0.5], [1, 1, 0.75]]
  assert both["styles"]["hard"] == pytest.approx(1 / 3) and both["styles"]["easy"] == 1
  assert both["accuracy"] == pytest.approx(np.mean(both["styles"]["matrix"])) and "best_of_n" not in both


def test_length_bias_by_hand_and_scipy():
  questions = some_questions()
  pairs = metrics.pairs_of(questions)
  found = metrics.length_bias(pairs, questions)
  for name in ("scores", "grades"):
    x, y = (np.concatenate([getattr(q, n) - getattr(q, n).mean() for q in questions])
            for n in (name, "lengths"))
    np.testing.assert_allclose(found[f"{name[:-1]}_correlation"], scipy.stats.pearsonr(x, y).statistic)
  by_hand = metrics.length_bias(*(lambda q: (metrics.pairs_of(q), q))([
      scored([1, 0], [1, 0], [2, 1]), scored([0, 1], [1, 0], [2, 1]), scored([1, 0], [1, 0], [3, 1]),
      scored([1, 0], [1, 0], [1, 2]), scored([0, 1], [1, 0], [2, 2])]))
  assert by_hand["accuracy_longer"] == pytest.approx(2 / 3) and by_hand["accuracy_shorter"] == 1
  assert by_hand["longer_is_better"] == by_hand["length_only"] == pytest.approx(3.5 / 5)
  shorter = metrics.length_bias(*(lambda q: (metrics.pairs_of(q), q))([scored([1, 0], [1, 0], [1, 2])]))
  assert shorter["longer_is_better"] == 0 and shorter["length_only"] == 1
  assert np.isnan(metrics.correlation([1, 1], [1, 2]))


def test_calibration_of_scores_that_are_the_truth_and_of_ones_that_are_doubled():
  rng = np.random.default_rng(0)
  h = rng.normal(size=200_000) * 1.5
  margins = np.where(rng.random(len(h)) < 1 / (1 + np.exp(-h)), h, -h)  # the better one first
  found = metrics.pair_calibration(margins)
  p = 1 / (1 + np.exp(-h))
  assert found["ece"] < 0.01
  np.testing.assert_allclose(found["brier"], np.mean(p * (1 - p)), atol=2e-3)
  np.testing.assert_allclose(found["nll"], np.mean(-p * np.log(p) - (1 - p) * np.log(1 - p)), atol=3e-3)
  for row in found["reliability"]:
    assert abs(row["confidence"] - row["accuracy"]) < 0.02 and row["confidence"] >= 0.5
  assert sum(row["pairs"] for row in found["reliability"]) == len(h)
  assert metrics.pair_calibration(2 * margins)["ece"] > 0.05
  # The likelihood is greatest without rescaling.
  best = scipy.optimize.minimize_scalar(lambda t: metrics.pair_calibration(margins * t)["nll"],
                                        bounds=(0.3, 3), method="bounded").x
  assert abs(best - 1) < 0.03


def test_calibration_by_hand():
  h = 1.3
  p = 1 / (1 + np.exp(-h))  # 0.786
  found = metrics.pair_calibration([h, h, -h, 0.0])
  np.testing.assert_allclose(found["brier"], (2 * (1 - p) ** 2 + p ** 2 + 1 / 4) / 4)
  np.testing.assert_allclose(found["ece"], 3 / 4 * (p - 2 / 3))
  np.testing.assert_allclose(found["nll"], (-2 * np.log(p) - np.log(1 - p) + np.log(2)) / 4)
  counts, confidence, right = calibration.reliability([0.1, 0.3, 0.35, 1.0], [0, 1, 0, 1], bins=4)
  np.testing.assert_array_equal(counts, [1, 2, 0, 1])
  np.testing.assert_allclose(confidence, [0.1, 0.325, np.nan, 1])
  np.testing.assert_allclose(right, [0, 0.5, np.nan, 1])


def test_swaps_by_hand():
  # Four pairs: always right, always wrong, always the first one, always the second one.
  found = metrics.swap_consistency([1, -1, 1, -1], [1, -1, -1, 2.5])
  assert found == {"consistency": 0.5, "first_preferred": 0.5, "largest_difference": 3.5}
  assert metrics.swap_consistency([1, 1, -1], [-1, 1, 1])["first_preferred"] == pytest.approx(0.5)
  assert metrics.swap_consistency([1, 1], [-1, -1])["first_preferred"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_best_of_n_is_the_mean_over_all_draws(seed):
  rng = np.random.default_rng(seed)
  scores, grades = rng.integers(0, 4, 7).astype(float), rng.random(7)  # with equal scores
  for n in range(1, 8):
    draws = []
    for drawn in itertools.combinations(range(7), n):
      top = [i for i in drawn if scores[i] == max(scores[list(drawn)])]
      draws.append(np.mean(grades[top]))
    np.testing.assert_allclose(metrics.best_of_n(scores, grades, n), np.mean(draws), rtol=1e-12)
    oracle = np.mean([max(grades[list(d)]) for d in itertools.combinations(range(7), n)])
    np.testing.assert_allclose(metrics.best_of_n(grades, grades, n), oracle, rtol=1e-12)
  with pytest.raises(ValueError, match="best of 8"):
    metrics.best_of_n(scores, grades, 8)


def test_best_of_n_table_by_hand():
  rows = metrics.best_of_n_table([scored([3, 1, 2], [1, 0, 0], [1, 2, 3]), scored([1, 2], [1, 0], [4, 2])])
  assert [(r["n"], r["questions"]) for r in rows] == [(1, 2), (2, 2), (3, 1)]
  two = rows[1]  # first question: the right one is among two of three draws, and wins
  assert two["model"] == pytest.approx((2 / 3 + 0) / 2) and two["oracle"] == pytest.approx((2 / 3 + 1) / 2)
  assert two["shortest"] == pytest.approx((2 / 3 + 0) / 2) and two["longest"] == pytest.approx((0 + 1) / 2)
  assert rows[0]["model"] == rows[0]["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
  assert rows[2] == dict(n=3, questions=1, model=1, oracle=1, shortest=1, longest=0,
                         chance=pytest.approx(1 / 3))


def test_a_report_splits_by_subset():
  questions = some_questions()
  found = metrics.report(questions)
  for name in "ab":
    part = metrics.report([q for q in questions if q.subset == name])
    assert found["subsets"][name]["accuracy"] == part["accuracy"]
    assert found["subsets"][name]["pairs"] == part["pairs"]
  assert sum(part["pairs"] for part in found["subsets"].values()) == found["pairs"]
  assert found["macro_accuracy"] == pytest.approx(
      np.mean([part["accuracy"] for part in found["subsets"].values()]))
  assert found["best_of_n"][0]["n"] == 1 and found["interval"][0] <= found["accuracy"] <= found["interval"][1]
