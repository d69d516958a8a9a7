"""Verdicts come from intervals by the rule that the table states."""

import numpy as np
import pytest
import scipy.stats

from jaxrl.evidence import verdict


def claim(**changes):
  return verdict.Claim(**{**dict(text="it is better", metric="test/x", expect="higher",
                                 baseline="grpo"), **changes})


@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_intervals_are_those_of_students_t(count):
  values = np.random.default_rng(count).normal(size=count)
  mean, half = verdict.interval(values)
  low, high = scipy.stats.t.interval(0.95, count - 1, values.mean(), scipy.stats.sem(values))
  assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-3)


@pytest.mark.parametrize("expect,margin,shift,expected", [
    ("higher", 0, 1.0, "confirmed"), ("higher", 0, -1.0, "contradicted"),
    ("higher", 0, 0.0, "no difference"), ("lower", 0, -1.0, "confirmed"),
    ("lower", 0, 1.0, "contradicted"), ("not lower", 0.5, 0.0, "confirmed"),
    ("not lower", 0.5, -2.0, "contradicted"), ("not higher", 0.5, 0.0, "confirmed"),
    ("not higher", 0.5, 2.0, "contradicted"), ("not lower", 0.1, -0.1, "no difference")])
def test_the_side_on_which_the_whole_interval_lies_decides(expect, margin, shift, expected):
  baseline = np.array([0.1, 0.5, 0.9])
  found = verdict.judge(claim(expect=expect, margin=margin),
                        baseline + shift + [0.01, -0.02, 0.01], baseline)
  assert found["verdict"] == expected and found["difference"] == pytest.approx(shift, abs=1e-9)


def test_one_seed_decides_nothing():
  assert verdict.judge(claim(), [5.0], [0.0])["verdict"] == "no difference"


def test_claims_that_name_nothing_are_refused():
  entry = dict(text="a", metric="m", expect="higher", baseline="grpo")
  with pytest.raises(ValueError, match="the arm 'grpo'"):
    verdict.claims_of([entry], ["method"], "x")
  with pytest.raises(ValueError, match="no field 'margins'"):
    verdict.claims_of([{**entry, "margins": 1}], ["method", "grpo"], "x")
  with pytest.raises(ValueError, match="makes no claim"):
    verdict.claims_of([], ["method"], "x")
  with pytest.raises(ValueError, match="none of higher"):
    claim(expect="better")


def test_a_run_without_the_metric_is_no_evidence_of_no_difference():
  with pytest.raises(ValueError, match="test/x is .*nan.* in the runs of 'b', .*look at their samples"):
    verdict.judge(verdict.Claim("t", "test/x", "higher", "b"), [1.0, 2.0], [0.5, float("nan")])


@pytest.mark.parametrize("verdicts, joint, expected", [
    (["confirmed", "contradicted"], [False, False], "confirmed"),
    (["confirmed", "contradicted"], [False, True], "contradicted"),
    (["confirmed", "contradicted", "no difference"], [False, False, True], "no difference"),
    (["no difference", "confirmed"], [False, True], "no difference"),
    (["contradicted", "no difference"], [False, True], "contradicted")])
def test_a_method_is_as_good_as_the_worst_of_what_is_claimed_in_one_breath(verdicts, joint, expected):
  claims = [dict(verdict=v, joint=j) for v, j in zip(verdicts, joint)]
  assert verdict.of_method(claims) == expected
