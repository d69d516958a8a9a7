"""pass@k against its definition: the share of all k-subsets that hold a correct sample."""

import itertools

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl.evaluation.pass_at_k import pass_at_k


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(
    st.just(n), st.integers(0, n), st.integers(1, n))))
def test_it_is_the_share_of_subsets_with_a_correct_sample(numbers):
  n, correct, k = numbers
  subsets = list(itertools.combinations([i < correct for i in range(n)], k))
  np.testing.assert_allclose(pass_at_k(n, correct, k), np.mean([any(s) for s in subsets]),
                             atol=1e-12)


def test_it_is_unbiased():
  n, k, p = 6, 3, 0.3
  chances = [np.prod([p if x else 1 - p for x in draw])
             for draw in itertools.product([0, 1], repeat=n)]
  values = [pass_at_k(n, sum(draw), k) for draw in itertools.product([0, 1], repeat=n)]
  np.testing.assert_allclose(np.dot(chances, values), 1 - (1 - p) ** k, rtol=1e-12)


def test_many_samples_do_not_overflow():
  value = pass_at_k(10_000, 1, 1_000)
  np.testing.assert_allclose(value, 0.1, rtol=1e-9)
  assert pass_at_k(10_000, 0, 1_000) == 0.0 and pass_at_k(10_000, 9_500, 1_000) == 1.0


@pytest.mark.parametrize("samples, correct, k", [(3, 1, 4), (3, 4, 1), (3, 1, 0), (3, -1, 1),
                                                 (0, 0, 1)])
def test_impossible_counts_are_refused(samples, correct, k):
  with pytest.raises(ValueError, match=f"pass@{k} .*{samples} samples, {correct} correct"):
    pass_at_k(samples, correct, k)
