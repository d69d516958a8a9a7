"""From evidence to rewards: sums, gates, and what happens to evidence that is not ok."""

import functools
import math

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from jaxrl.rewards import aggregate, failed, ok, product_gate, unscorable, weighted_sum

SCORES = st.dictionaries(st.sampled_from("abcde"), st.floats(-10, 10), min_size=1)


@settings(max_examples=25, deadline=None)
@given(scores=SCORES, data=st.data())
def test_weighted_sum_is_a_dot_product(scores, data):
  weights = {k: data.draw(st.floats(-3, 3)) for k in scores}
  evidence = {k: ok(v) for k, v in scores.items()}
  expected = np.dot(np.array(list(scores.values())), np.array(list(weights.values())))
  assert weighted_sum(evidence, weights=weights) == pytest.approx(expected, abs=1e-9)
  assert weighted_sum(evidence) == pytest.approx(sum(scores.values()), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(scores=SCORES, data=st.data())
def test_product_gate_is_a_product_times_a_sum(scores, data):
  gates = data.draw(st.lists(st.sampled_from(sorted(scores)), unique=True))
  evidence = {k: ok(v) for k, v in scores.items()}
  rest = [v for k, v in scores.items() if k not in gates]
  expected = np.prod([scores[g] for g in gates]) * (np.sum(rest) if rest else 1.0)
  assert product_gate(evidence, gates=gates) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("missing", [failed("broke"), unscorable("no reference")])
def test_evidence_that_is_not_ok_gives_no_reward_where_it_is_needed(missing):
  evidence = {"a": ok(1.0), "b": missing}
  assert weighted_sum(evidence) is None
  assert weighted_sum(evidence, weights={"a": 1.0, "b": 0.5}) is None
  assert weighted_sum(evidence, weights={"a": 2.0}) == 2.0  # b is recorded only
  assert weighted_sum(evidence, weights={"a": 2.0, "b": 0.0}) == 2.0
  assert product_gate(evidence, gates=["a"]) is None
  assert product_gate(evidence, gates=["b"]) is None
  assert product_gate({"a": ok(0.0), "b": missing}, gates=["a"]) == 0.0  # a zero factor decides
  assert product_gate({"a": ok(0.0), "b": missing}, gates=["b"]) is None


def test_gates_with_weights():
  evidence = {"format": ok(0.5), "right": ok(1.0), "short": ok(-1.0)}
  found = product_gate(evidence, gates=["format"], weights={"right": 2.0, "short": 0.5})
  assert found == 0.5 * (2.0 - 0.5)


@pytest.mark.parametrize("function, keywords, message", [
    (weighted_sum, dict(weights={"exact": 1.0}), "there is no criterion 'exact'.*'exact_match'"),
    (weighted_sum, dict(weights={"exact_match": math.nan}), "not a finite number"),
    (weighted_sum, dict(weights={"exact_match": "1"}), "not a finite number"),
    (weighted_sum, dict(weights={"exact_match": 0.0}), "every criterion 0"),
    (weighted_sum, dict(weights={}), "every criterion 0"),
    (weighted_sum, dict(weights=["exact_match"]), "not a dict"),
    (product_gate, dict(gates=["fromat"]), "reward.gates: .*'fromat'.*did you mean 'format'"),
    (product_gate, dict(gates="format"), "not a list"),
    (product_gate, dict(gates=["format"], weights={"format": 1.0}), "is a gate and has a weight")])
def test_labels_are_checked(function, keywords, message):
  with pytest.raises(ValueError, match=message):
    aggregate.check_labels(functools.partial(function, **keywords), ["exact_match", "format"],
                           where="reward")


def test_sensible_labels_pass():
  aggregate.check_labels(functools.partial(weighted_sum), ["a"])
  aggregate.check_labels(functools.partial(weighted_sum, weights={"a": 1}), ["a", "b"])
  aggregate.check_labels(functools.partial(product_gate, gates=["a"], weights={"b": 1}), ["a", "b"])
