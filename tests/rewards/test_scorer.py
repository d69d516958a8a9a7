"""The scorer: what a config may say, what one bad sample does, and when a run stops."""

import os
import threading
import time

import ml_collections
import numpy as np
import pytest

from jaxrl.batch import Task, Trajectory
from jaxrl.rewards import RewardFailure, Scorer
from jaxrl.rewards import scorer as scorer_lib

TIMEOUT = 2.0


def pair(text, answer="18", number=7, row=None):
  task = Task(id=f"t{number}", prompt=[5, 6], question="why?", answer=answer, row=row or {})
  return task, Trajectory(tokens=np.array([5, 6, 7]), loss_mask=np.zeros(3, bool), text=text,
                          prompt_length=2, finish="stop")


def pairs(*texts):
  return [pair(text, number=number) for number, text in enumerate(texts)]


def scorer(*criteria, aggregate="weighted_sum", workers=1, max_failure_rate=1.0, timeout=TIMEOUT):
  return Scorer.from_config(dict(criteria=list(criteria), aggregate=aggregate, workers=workers,
                                 max_failure_rate=max_failure_rate, timeout=timeout))


# ------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize("change, message", [
    (dict(criteria=[dict(name="exact_mach")]), r"reward.criteria\[0\].*did you mean 'exact_match'"),
    (dict(criteria=[dict(name="exact_match", stripe=True)]), "did you mean 'strip'"),
    (dict(criteria=[]), "at least one criterion"),
    (dict(criteria="exact_match"), "at least one criterion"),
    (dict(criteria=["exact_match"] * 2), r"criteria\[1\]: the label 'exact_match' is taken"),
    (dict(criteria=[dict(name="exact_match", label="aggregate")]), "'aggregate' is taken"),
    (dict(criteria=["weighted_sum"]), r"takes \(evidence\), .* takes \(task, completion\)"),
    (dict(aggregate="exact_match"), r"aggregate: exact_match takes \(task, completion\)"),
    (dict(criteria=[dict(name="matches_format", pattern="(")]), "not a regular expression"),
    (dict(criteria=[dict(name="numeric_answer", pattern="#+")]), "has 0 groups"),
    (dict(criteria=[dict(name="overlong", max_tokens=8, buffer=9)]), "buffer=9 is not between"),
    (dict(aggregate=dict(name="weighted_sum", weights=dict(exact=1.0))), "aggregate.weights"),
    (dict(workers=-1), "workers=-1"), (dict(timeout=0), "timeout=0"),
    (dict(timeout=float("inf")), "timeout=inf"), (dict(max_failure_rate=1.5), "_rate=1.5"),
    (dict(time_out=3), "no field 'time_out'; did you mean 'timeout'"),
    (dict(criteria=[dict(name="no_such_module:f")]), "cannot import 'no_such_module'")])
def test_a_config_that_cannot_work_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    Scorer.from_config({"criteria": ["exact_match"], "workers": 0, **change})


def test_criteria_are_required():
  with pytest.raises(ValueError, match="needs criteria"):
    Scorer.from_config({})


def test_config_containers_are_understood(user_module):
  config = ml_collections.ConfigDict(dict(reward=dict(
      criteria=[dict(name="exact_match"), dict(name=f"{user_module}:echo", label="x", scale=2.0)],
      aggregate=dict(name="weighted_sum", weights=dict(exact_match=10.0, x=0.5)), workers=1)))
  with Scorer.from_config(config.reward) as judge:
    (found,) = judge.score([pair("18")])
  assert found.scored and found.reward == 10.0 * 1 + 0.5 * (2.0 * 18)
  assert list(found.evidence) == ["exact_match", "x"]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_criterion_takes_and_its_spec_leaves_out_is_given(user_module, workers):
  spec = dict(criteria=[dict(name="overlong", buffer=1), dict(name="overlong", label="own", buffer=1, max_tokens=9),
                        dict(name=f"{user_module}:echo"), "finished"], workers=workers)
  with Scorer.from_config(spec, given=dict(max_tokens=1, scale=7.0)) as judge:
    (found,) = judge.score([pair("18")])
  assert found.evidence["overlong"].score == -1 and found.evidence["own"].score == 0
  assert found.evidence["echo"].score == 7 * 18
  with pytest.raises(ValueError, match=r"criteria\[0\]: overlong needs max_tokens"):
    Scorer.from_config(dict(criteria=[dict(name="overlong", buffer=1)], workers=0))


def test_one_function_may_judge_twice_under_two_labels():
  judge = scorer("exact_match", dict(name="exact_match", label="loose", ignore_case=True),
                 aggregate=dict(name="weighted_sum", weights=dict(exact_match=1.0, loose=0.5)))
  assert [one.reward for one in judge.score([pair("YES", "yes"), pair("yes", "yes")])] == [0.5, 1.5]


def test_a_function_of_ones_own_with_the_wrong_arguments_is_refused(user_module):
  with pytest.raises(ValueError, match=r"only_task takes \(task\)"):
    scorer(f"{user_module}:only_task")


# ------------------------------------------------------------------------------------- one sample


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_judgement_fails_on_its_sample_only(user_module, workers):
  broken = ["raise", "exit", "memory", "nan", "inf", "none", "text", "list"]
  with scorer(f"{user_module}:obeys", f"{user_module}:after", workers=workers) as judge:
    found = judge.score(pairs("a", *broken, "unscorable", "b"))
  assert [one.scored for one in found] == [True] + [False] * 9 + [True]
  assert [one.reward for one in found] == [3.0] + [0.0] * 9 + [3.0]
  assert [one.evidence["obeys"].status for one in found] == (
      ["ok"] + ["failed"] * 8 + ["unscorable", "ok"])
  assert all(one.evidence["after"].score == 2.0 for one in found)
  assert "raised on purpose" in found[1].evidence["obeys"].detail
  assert judge.counts == {
      "samples": 11, "scored": 2, "failed": 8, "unscorable": 1, "obeys/failed": 8,
      "obeys/unscorable": 1, "after/failed": 0, "after/unscorable": 0}


def test_a_judgement_that_hangs_or_dies_fails_on_its_sample_only(user_module):
  bad = {"sleep": "longer than 2 s", "die": "exit status 3", "regex": "longer than 2 s",
         "segfault": "killed by SIGSEGV", "bignum": "longer than 2 s", "child": "longer than 2 s"}
  texts = ["a", "b", *bad, "c", "d"]
  with scorer(f"{user_module}:obeys", f"{user_module}:after", workers=2) as judge:
    start = time.monotonic()
    found = judge.score(pairs(*texts))
    seconds = time.monotonic() - start
    again = judge.score(pairs("a", "b"))
  for text, one in zip(texts, found):
    assert one.scored == (text not in bad), text
    assert one.evidence["after"].score == 2.0  # the criteria behind it are still heard
    if text in bad:
      assert one.evidence["obeys"].status == "failed"
      assert bad[text] in one.evidence["obeys"].detail
  assert all(one.scored for one in again)
  assert judge.counts["failed"] == len(bad)
  assert seconds < 60


def test_a_completion_that_stalls_sympy_does_not_stall_the_run():
  texts = ["9**9**9**9", "18", "9^9^9^9", "$18.00", "\\boxed{10^{10^{10^{10}}}}", "$(10^{9})!$"]
  with scorer("numeric_answer", workers=2, timeout=3.0) as judge:
    found = judge.score(pairs(*texts))
  assert [one.scored for one in found] == [False, True, False, True, False, False]
  assert [one.reward for one in found] == [0, 1, 0, 1, 0, 0]


def test_order_and_values_do_not_depend_on_the_workers(user_module):
  texts = [str(value) for value in np.random.default_rng(0).normal(size=300)]
  expected = [float(text) for text in texts]
  for workers in (0, 2):
    with scorer(f"{user_module}:echo", workers=workers) as judge:
      assert [one.reward for one in judge.score(pairs(*texts))] == expected
      assert [one.reward for one in judge.score(pairs(*texts[::-1]))] == expected[::-1]
      assert judge.score([]) == []


def test_workers_see_the_fields_without_loading_jax(user_module):
  with scorer(f"{user_module}:sees", f"{user_module}:process",
              f"{user_module}:inline_process") as judge:
    (found,) = judge.score([pair("x\x00\ud800" * 50_000)])
  assert found.evidence["sees"].score == 1.0
  assert found.evidence["process"].score != os.getpid()
  assert found.evidence["inline_process"].score == os.getpid()


class _Unreadable:
  """Can be pickled, but not read elsewhere."""

  def __reduce__(self):
    return (open, ("/no/such/file",))


def test_rows_may_hold_anything(user_module, caplog):
  rows = [dict(value=1.0, lock=threading.Lock()), dict(value=2.0), dict(value=_Unreadable()),
          dict(value=lambda: 3), dict(value=4.0)]
  with scorer(f"{user_module}:reads_row") as judge:
    found = judge.score([pair("x", row=row) for row in rows])
  assert [one.scored for one in found] == [True, True, False, False, True]
  assert [one.reward for one in found] == [1.0, 2.0, 0.0, 0.0, 4.0]
  assert "keep the fields of rows to plain data" in found[2].evidence["reads_row"].detail
  assert "KeyError: 'value'" in found[3].evidence["reads_row"].detail
  assert "row['lock'] cannot be pickled" in caplog.text


def test_an_aggregator_that_breaks_is_a_failure_too(user_module):
  with scorer(f"{user_module}:echo", aggregate=f"{user_module}:broken_aggregate",
              workers=0) as judge:
    found = judge.score(pairs("4", "0"))
  assert (found[0].reward, found[0].scored) == (0.25, True)
  assert (found[1].reward, found[1].scored) == (0.0, False)
  assert "ZeroDivisionError" in found[1].evidence["aggregate"].detail
  assert judge.counts["failed"] == 1


# ---------------------------------------------------------------------------------- when to stop


def test_above_the_rate_the_run_stops_with_the_first_failing_example(user_module):
  judge = scorer(f"{user_module}:obeys", max_failure_rate=0.25, workers=0)
  with judge, pytest.raises(RewardFailure) as stop:
    judge.score(pairs(*["fine"] * 10, "raise", *["fine"] * 5, *["none"] * 4))  # 5 of 20: allowed
    judge.score(pairs("nan"))
  message = str(stop.value)
  assert "6 of 21 samples" in message and "config.reward.max_failure_rate=0.25" in message
  for part in ("task: t0", "question: 'why?'", "completion: 'nan'", "criterion: obeys",
               "returned nan"):
    assert part in message


def test_the_report_shows_the_first_failure_and_its_traceback(user_module):
  with scorer(f"{user_module}:obeys", max_failure_rate=0.1, workers=2) as judge:
    with pytest.raises(RewardFailure, match="(?s)task: t1\n.*'raise'.*raised on purpose"):
      judge.score(pairs("fine", "raise", *["fine"] * 30, *["none"] * 32))


def test_few_samples_do_not_make_a_rate(user_module):
  with scorer(f"{user_module}:obeys", max_failure_rate=0.1, workers=0) as judge:
    assert [one.scored for one in judge.score(pairs("fine", "raise"))] == [True, False]
  with scorer(f"{user_module}:obeys", max_failure_rate=0.0, workers=0) as judge:
    with pytest.raises(RewardFailure, match="1 of 16"):
      judge.score(pairs("fine", "raise"))


def test_old_failures_are_forgotten(user_module):
  with scorer(f"{user_module}:obeys", max_failure_rate=0.1, workers=0) as judge:
    for _ in range(3):
      judge.score(pairs(*["raise"] * 5, *["fine"] * (scorer_lib.WINDOW - 5)))
      judge.score(pairs(*["raise"] * 90, *["fine"] * (2 * scorer_lib.WINDOW)))
    assert judge.counts["failed"] == 3 * 95


def test_a_reward_that_always_hangs_stops_the_run_early(user_module):
  with scorer(f"{user_module}:obeys", max_failure_rate=0.1, workers=2, timeout=0.5) as judge:
    start = time.monotonic()
    with pytest.raises(RewardFailure, match="longer than 0.5 s"):
      judge.score(pairs(*["sleep"] * 40))
    assert time.monotonic() - start < 0.5 * 40 / 2  # what waiting for all of them would take


def test_a_run_without_any_reward_stops():
  judge = scorer("numeric_answer", workers=0)
  samples = [pair("18", answer="no number")] * 128
  for _ in range(scorer_lib.WINDOW // 128 - 1):
    assert not any(one.scored for one in judge.score(samples))
  with pytest.raises(RewardFailure, match="(?s)none of the last 512 .*no number in the reference"):
    judge.score(samples)


def test_an_aggregator_without_an_opinion_is_no_failure(user_module):
  judge = scorer("exact_match", aggregate=f"{user_module}:no_opinion")
  assert not any(one.scored for one in judge.score([pair("18")] * 600))
  assert judge.counts["failed"] == judge.counts["unscorable"] == 0


def test_failures_that_no_reward_needs_are_counted_only(user_module):
  with scorer("exact_match", f"{user_module}:obeys", workers=0,
              aggregate=dict(name="weighted_sum", weights=dict(exact_match=1.0))) as judge:
    (found,) = judge.score([pair("raise", answer="raise")])
  assert found.scored and found.reward == 1.0
  assert judge.counts["failed"] == judge.counts["scored"] == 1
