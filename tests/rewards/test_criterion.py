"""Evidence: what counts as a score, and what becomes of everything else."""

from fractions import Fraction

import numpy as np
import pytest

from jaxrl.rewards import Criterion, failed, ok, unscorable
from jaxrl.rewards import criterion


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), None,
                                 "1", 1j, 10 ** 400, np.ones(2), [1.0]])
def test_no_criterion_is_ok_without_a_finite_number(bad):
  with pytest.raises(ValueError, match="not a finite number"):
    ok(bad)
  found = criterion.as_criterion(bad)
  assert (found.status, found.score) == ("failed", 0.0)
  assert "returned" in found.detail


@pytest.mark.parametrize("value, score", [
    (True, 1.0), (False, 0.0), (np.bool_(True), 1.0), (3, 3.0), (-0.5, -0.5),
    (np.float32(0.25), 0.25), (np.int64(2), 2.0), (Fraction(1, 4), 0.25)])
def test_numbers_and_truth_values_are_scores(value, score):
  found = criterion.as_criterion(value)
  assert found == ok(score)
  assert type(found.score) is float


def test_a_score_without_the_status_ok_is_dropped():
  assert Criterion(0.7, "unscorable").score == 0.0
  assert unscorable("why") == Criterion(0.0, "unscorable", "why")
  assert failed("why") == Criterion(0.0, "failed", "why")


def test_an_unknown_status_is_refused():
  with pytest.raises(ValueError, match="'fine' is none of ok, unscorable, failed"):
    Criterion(1.0, "fine")


@pytest.mark.parametrize("error", [ValueError, SystemExit, MemoryError, GeneratorExit])
def test_whatever_a_function_raises_becomes_evidence(error):
  def broken(task, completion):
    raise error("on purpose")
  found = criterion.judge(broken, None, None)
  assert found.status == "failed"
  assert error.__name__ in found.detail and "on purpose" in found.detail


def test_an_interrupt_is_no_evidence():
  def interrupted(task, completion):
    raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt):
    criterion.judge(interrupted, None, None)


def test_a_long_explanation_keeps_its_end():
  assert failed("x" * 10 ** 6 + "the end").detail.endswith("the end")
  assert len(failed("x" * 10 ** 6).detail) == criterion.DETAIL_CHARACTERS
