"""Each task against Python's own arithmetic, sorting, or an enumeration of all expressions."""

from fractions import Fraction
import itertools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl.tasks import addition
from jaxrl.tasks import brackets
from jaxrl.tasks import copying
from jaxrl.tasks import countdown
from jaxrl.tasks import detours
from jaxrl.tasks import modular_arithmetic
from jaxrl.tasks import noisy_addition
from jaxrl.tasks import sorting
from jaxrl.tasks import walks

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2 ** 32)


def drawn(module, seed, **knobs):
  return module.sample(np.random.default_rng(seed), **knobs)


@given(seeds, st.integers(1, 18))
@few
def test_addition_agrees_with_python(seed, digits):
  row = drawn(addition, seed, digits=digits)
  a, b = row["question"].removesuffix("=").split("+")
  assert len(a) == len(b) == digits
  assert row["answer"] == str(int(a) + int(b))
  assert addition.check(row, f" {row['answer']}\n")
  assert not addition.check(row, str(int(a) + int(b) + 1)) and not addition.check(row, "0" + a)
  backwards = drawn(addition, seed, digits=digits, answer_format="reversed")
  assert backwards["question"] == row["question"] and backwards["answer"] == row["answer"][::-1]
  assert addition.check(backwards, backwards["solution"])
  if row["answer"] != row["answer"][::-1]:
    assert not addition.check(backwards, row["answer"])


def test_addition_is_one_problem_in_either_order():
  assert addition.key(dict(a=10, b=9)) == addition.key(dict(a=9, b=10)) != addition.key(
      dict(a=1, b=910))


def test_operands_are_uniform():
  rng = np.random.default_rng(0)
  a = [addition.sample(rng, digits=1)["a"] for _ in range(5000)]
  counts = np.bincount(a, minlength=10)
  assert ((counts - 500) ** 2 / 500).sum() < 27.9  # chi-square, 9 degrees, p = 0.001


@given(seeds, st.integers(2, 200), st.integers(2, 8), st.sampled_from(["+", "-", "*", "+-*", "+*"]))
@few
def test_modular_arithmetic_agrees_with_python(seed, modulus, terms, operators):
  row = drawn(modular_arithmetic, seed, modulus=modulus, terms=terms, operators=operators)
  value = eval(row["question"].removesuffix("="))
  assert row["answer"] == str(value) and modular_arithmetic.check(row, str(value))
  assert not modular_arithmetic.check(row, str(value + modulus))


@given(seeds)
@few
def test_modular_key_survives_commuting(seed):
  row = drawn(modular_arithmetic, seed, terms=4, operators="*")
  for numbers in itertools.permutations(row["numbers"]):
    assert modular_arithmetic.key(dict(row, numbers=list(numbers))) == modular_arithmetic.key(row)
  a = dict(numbers=[2, 3, 1], operators=["*", "+"], modulus=7)
  b = dict(numbers=[1, 3, 2], operators=["+", "*"], modulus=7)
  c = dict(numbers=[1, 3, 2], operators=["*", "+"], modulus=7)
  assert modular_arithmetic.key(a) == modular_arithmetic.key(b) != modular_arithmetic.key(c)


@given(seeds, st.integers(2, 6), st.integers(1, 50), st.integers(20, 500))
@few
def test_countdown_solutions_reach_the_target(seed, numbers, largest, target):
  row = drawn(countdown, seed, numbers=numbers, largest=largest, target=target)
  given_numbers, goal = row["question"].removesuffix(":").split("=")
  given_numbers = [int(n) for n in given_numbers.split(",")]
  assert eval(row["solution"]) == int(goal) == row["target"] <= target
  used = [int(n) for n in "".join(c if c.isdigit() else " " for c in row["solution"]).split()]
  assert all(used.count(n) <= given_numbers.count(n) for n in used) and len(used) >= 2
  assert int(goal) not in given_numbers
  assert countdown.check(row, row["solution"])
  assert not countdown.check(dict(row, target=row["target"] + 1), row["solution"])


def test_countdown_check_agrees_with_python_on_every_expression_of_three_numbers():
  numbers, target = [6, 2, 4], 8
  row = dict(numbers=numbers, target=target)
  solved = 0
  for values in itertools.product([6, 2, 4], repeat=3):
    for first, second in itertools.product("+-*/", repeat=2):
      for form in ("{}{}{}{}{}", "({}{}{}){}{}", "{}{}({}{}{})"):
        text = form.format(values[0], first, values[1], second, values[2])
        exact = "".join(f"Fraction({c})" if c.isdigit() else c for c in text)
        try:
          expected = (eval(exact, dict(Fraction=Fraction)) == target
                      and sorted(values) == sorted(numbers))
        except ZeroDivisionError:
          expected = False
        assert countdown.check(row, text) == expected, text
        solved += expected
  assert solved > 10


@pytest.mark.parametrize("text", [
    "6*6/2-4-6", "6*6/(2-2)", "12-4", "06+2", "6+2=8", "+6+2", "-2+6+4", "6 2", "6+", "(6+2",
    "6+2)", "()", "6()+2", "6**2", "6//2", "6+2.0", "6_0", "0x6+2", "6＋2", "٦+2", "6+2#", "6+2\n4",
    "__import__('os')", "6+2;1", "6+2,1", "(" * 99 + "6+2" + ")" * 99, "9" * 190,
    "2**9**9**9", "6\x00+2", "[6+2]", "4/0", "4-4", "8",
])
def test_countdown_refuses(text):
  assert not countdown.check(dict(numbers=[6, 2, 4], target=8), text)


@pytest.mark.parametrize("text", ["6+2", " ( 6 + 2 ) ", "2+6", "4+6-2", "(6-2)+4", "6-(2-4)",
                                  "((((6))))+2", "4-2+6", "6*2-4",
                                  "(" * 60 + "6+2" + ")" * 60])
def test_countdown_accepts_any_solution(text):
  assert countdown.check(dict(numbers=[6, 2, 4], target=8), text)


def test_countdown_values_are_exact_fractions():
  assert countdown.check(dict(numbers=[6, 1, 3, 4], target=24), "6/(1-3/4)")
  assert not countdown.check(dict(numbers=[1, 3, 3], target=1), "1/3*3+0")
  assert countdown.check(dict(numbers=[1, 3, 3], target=1), "1/3*3")


@given(seeds, st.integers(1, 12), st.integers(0, 12), st.integers(1, 10 ** 6))
@few
def test_sorting_agrees_with_python(seed, shortest, more, largest):
  row = drawn(sorting, seed, shortest=shortest, longest=shortest + more, largest=largest)
  numbers = [int(n) for n in row["question"].removesuffix("=").split(",")]
  assert shortest <= len(numbers) <= shortest + more and max(numbers) <= largest
  assert [int(n) for n in row["answer"].split(",")] == sorted(numbers)
  assert sorting.check(row, row["answer"].replace(",", ", "))
  for wrong in (row["answer"] + ",", row["answer"] + ",0", row["answer"].replace(",", " "),
                ",".join(map(str, sorted(numbers)[1:]))):
    assert sorting.check(row, wrong) == (wrong == row["answer"])
  if numbers != sorted(numbers):
    assert not sorting.check(row, ",".join(map(str, numbers)))
  assert sorting.key(row) == sorting.key(dict(numbers=numbers[::-1]))


@given(seeds, st.integers(1, 9), st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"],
                                                        exclude_characters="="), min_size=1))
@few
def test_copying_copies(seed, longest, alphabet):
  row = drawn(copying, seed, longest=longest, alphabet=alphabet)
  text = row["question"].removesuffix("=")
  assert 1 <= len(text) <= longest and set(text) <= set(alphabet)
  assert row["solution"] == text and copying.check(row, text)
  assert not copying.check(row, text + text) and not copying.check(row, text[:-1])


@given(seeds, st.integers(1, 4), st.integers(1, 12))
@few
def test_brackets_balance_only_with_the_answer(seed, kinds, longest):
  row = drawn(brackets, seed, shortest=1, longest=longest, kinds=kinds)
  opened = row["question"].removesuffix("=")
  assert 1 <= len(opened) <= longest

  def balances(text):
    before = None
    while text != before:
      before = text
      for pair in ("()", "[]", "{}", "<>"):
        text = text.replace(pair, "")
    return not text

  assert balances(opened + row["answer"]) and brackets.check(row, row["answer"])
  depth = len(row["answer"])
  for length in range(min(depth + 2, 4)):
    for candidate in map("".join, itertools.product(")]}>", repeat=length)):
      assert brackets.check(row, candidate) == (candidate == row["answer"]) == balances(
          opened + candidate)
  assert not brackets.check(row, row["answer"] + "()")


def test_shares_of_noisy_sums_are_wrong_as_the_knobs_say():
  rows = [drawn(noisy_addition, seed, signed=0.5, wrong=0.3, slips=0.6, doubtful=0.4) for seed in range(3000)]
  signed = [row["question"][0] == "+" for row in rows]
  found = {name: [] for name in ("signed", "wrong", "slips", "doubtful")}
  for row, sign in zip(rows, signed):
    a, b = row["question"].strip("+=").split("+")
    total = str(int(a) + int(b))[::-1]
    without = "".join(str(sum(map(int, pair)) % 10) for pair in zip(a[::-1], b[::-1]))
    differ = lambda text: sum(x != y for x, y in zip(text, total, strict=True))
    found["signed"].append(sign)
    if sign:
      found["doubtful"].append(differ(row["answer"]) == 1)
      assert row["answer"] == total or found["doubtful"][-1]
      if without != total:
        found["slips"].append(row["solution"] == without)
        assert found["slips"][-1] or row["solution"] == total
    else:
      found["wrong"].append(differ(row["solution"]) == 1)
      assert row["answer"] == total and (row["solution"] == total or found["wrong"][-1])
    assert noisy_addition.check(row, row["answer"]) and not noisy_addition.check(row, row["answer"] + "0")
  shares = {name: np.mean(values) for name, values in found.items()}
  assert shares == pytest.approx(dict(signed=0.5, wrong=0.3, slips=0.6, doubtful=0.4), abs=0.04)


@given(seeds, st.sampled_from([(4, 2), (10, 3), (52, 5)]), st.integers(0, 3))
@few
def test_walks_go_along_the_edges_of_a_regular_graph(seed, size, graph):
  """Every node has so many edges, both ways; a walk is right if none of its steps is 0 in the matrix."""
  nodes, degree = size
  edges = np.array(walks.neighbours(nodes, degree, graph))
  adjacent = np.zeros((nodes, nodes), int)
  np.add.at(adjacent, (np.repeat(np.arange(nodes), degree), edges.ravel()), 1)
  assert (adjacent == adjacent.T).all() and (adjacent.sum(0) == degree).all()
  assert not adjacent.diagonal().any()
  rng = np.random.default_rng(seed)
  row = walks.sample(rng, nodes=nodes, degree=degree, graph=graph, longest=6)
  start, goal = (walks.NODES.index(row["question"][i]) for i in (0, 2))
  for walk in ([walks.NODES.index(c) for c in row["solution"]],
               rng.integers(0, nodes, rng.integers(1, 9)).tolist()):
    joined = np.prod([adjacent[a, b] for a, b in zip([start, *walk], walk)]) > 0
    right = joined and walk[-1] == goal and goal not in walk[:-1] and len(walk) <= 6
    assert walks.check(row, "".join(walks.NODES[i] for i in walk)) == right


@given(seeds, st.integers(1, 18), st.integers(0, 3))
@few
def test_only_digits_of_the_sum_count_in_a_detour(seed, digits, flips):
  row = drawn(detours, seed, digits=digits, flips=flips)
  a, b = map(int, row["question"].removesuffix("=").split("+"))
  solution, step = row["solution"], flips + 1
  assert len(solution) == (digits + 1) * step and int(solution[::step][::-1]) == a + b
  for place, digit in enumerate(solution):
    changed = solution[:place] + str((int(digit) + 1) % 10) + solution[place + 1:]
    assert detours.check(row, changed) == (place % step > 0)
  assert not detours.check(row, solution[:-1]) and not detours.check(row, solution + "0")
