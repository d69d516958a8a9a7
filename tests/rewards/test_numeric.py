"""Numeric answers: notations, hostile text, and agreement with published labels."""

import json
import os
import pathlib
import types

import pytest

from jaxrl.rewards import numeric_answer

DATA = pathlib.Path(os.environ.get("JAXRL_DATA", pathlib.Path(__file__).parents[3] / "shared/data"))
GSM8K = r"####\s*(.+)"


def judge(answer, text, **options):
  return numeric_answer(types.SimpleNamespace(answer=answer), types.SimpleNamespace(text=text),
                        **options)


SAME = [
    ("1234", "1,234"), ("1,234", "1234"), ("1234", "1,234.00"), ("18", "$18.00"), ("18", "18."),
    ("18", "18 dollars"), ("18", "US$ 18"), ("18", "+18"), ("18", "018"), ("1/2", "0.5"),
    ("0.5", "1/2"), ("0.5", "50%"), ("50", "50%"), ("-3", "-3"), ("-3", "- 3"), ("-3", "-$3"),
    ("-3", "\N{MINUS SIGN}3"), ("300", "3e2"), ("0.03", "3E-2"), ("300", "3 * 10^2"),
    ("18", "\\boxed{18}"), ("0.5", "\\frac{1}{2}"), ("\\frac{1}{2}", "0.5"), ("1/3", "0.333333"),
    ("2\\sqrt{3}", "\\sqrt{12}")]
DIFFERENT = [
    ("18", "19"), ("18", "-18"), ("3", "300"), ("3", "3e2"), ("1234", "1"), ("18", "1.8"),
    ("-3", "3"), ("1/3", "0.33"), ("2", "2\\sqrt{3}"), ("18", ""), ("18", "   "), ("18", "x"),
    ("18", "18/0"), ("18", "nan"), ("18", "{18"), ("18", "eighteen"), ("18", "\\frac{"),
    ("18", "1" * 5000)]


@pytest.mark.parametrize("answer, text", SAME)
def test_notations_of_one_value(answer, text):
  if text != "- 3":  # in running text that is a subtraction
    assert judge(answer, text).score == 1.0
  assert judge(answer, f"so it is 7\n#### {text}", pattern=GSM8K).score == 1.0


@pytest.mark.parametrize("answer, text", DIFFERENT)
def test_other_values_and_nonsense_score_zero(answer, text):
  for found in (judge(answer, text), judge(answer, f"{answer}\n#### {text}\n", pattern=GSM8K)):
    assert (found.status, found.score) == ("ok", 0.0)


def test_where_the_answer_is_looked_for():
  assert judge("18", "First 3, then 18").score == 1.0  # the last number
  assert judge("18", "It is \\boxed{18}, not 19").score == 1.0  # the box wins
  assert judge("18", "The answer is 18. Now 4 apples").score == 1.0
  assert judge("18", "It is 18", pattern=GSM8K).score == 0.0  # no mark, no answer
  assert judge("18", "#### 17\n#### 18", pattern=GSM8K).score == 1.0  # of two answers, the last
  assert judge("17", "#### 17\n#### 18", pattern=GSM8K).score == 0.0
  assert judge("17", "#### 17 or 18", pattern=GSM8K).score == 0.0


@pytest.mark.parametrize("answer", ["", "   ", "blue", "A"])
def test_a_reference_without_a_number_cannot_judge(answer):
  assert judge(answer, "18").status == "unscorable"


@pytest.mark.parametrize("text", [
    "\x00", "18\x00", "a" * 100_000, "1" * 100_000, "$" * 100_000, "(" * 100_000,
    "((((" * 500 + "1", "\\boxed{" * 1000, "#### " * 20_000, "\ud800", "\u202e18", "1e999999999999",
    "9" * 300 + "e999"])
def test_hostile_text_scores_zero_or_one(text):
  for options in ({}, dict(pattern=GSM8K)):
    found = judge("7", text, **options)
    assert (found.status, found.score) == ("ok", 0.0)


@pytest.mark.skipif(not (DATA / "gsm8k").exists(), reason="needs the GSM8K files")
def test_agrees_with_the_published_labels_of_model_solutions():
  checked = 0
  with (DATA / "gsm8k/example_model_solutions.jsonl").open() as lines:
    for line, _ in zip(lines, range(150)):
      row = json.loads(line)
      answer = row["ground_truth"].rsplit("A:", 1)[1].strip()
      for solution in row.values():
        if isinstance(solution, dict):
          for options in ({}, dict(pattern=r"(?m)^A:\s*(.+)")):
            found = judge(answer, solution["solution"], **options)
            assert (found.status, bool(found.score)) == ("ok", solution["is_correct"]), solution
            checked += 1
  assert checked == 150 * 4 * 2


@pytest.mark.skipif(not (DATA / "gsm8k").exists(), reason="needs the GSM8K files")
def test_every_worked_answer_matches_its_own_reference_only():
  with (DATA / "gsm8k/train.jsonl").open() as lines:
    for line, _ in zip(lines, range(300)):
      text = json.loads(line)["answer"]
      value = int(text.rsplit("#### ", 1)[1].replace(",", ""))
      assert judge(str(value), text, pattern=GSM8K).score == 1.0
      assert judge(str(value + 1), text, pattern=GSM8K).score == 0.0
