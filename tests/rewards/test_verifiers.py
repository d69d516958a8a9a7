"""Rule-based criteria against plain restatements of their rules."""

import types

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from jaxrl.rewards import exact_match, finished, matches_format, ok, overlong


def task(answer="18"):
  return types.SimpleNamespace(answer=answer)


def completion(text="", length=0, prompt=3, finish="stop"):
  return types.SimpleNamespace(text=text, tokens=np.zeros(prompt + length, np.int32),
                               prompt_length=prompt, finish=finish)


@pytest.mark.parametrize("text, answer, options, score", [
    ("18", "18", {}, 1), (" 18\n", "18", {}, 1), (" 18", "18", dict(strip=False), 0),
    ("Yes", "yes", {}, 0), ("Yes", "yes", dict(ignore_case=True), 1), ("", "18", {}, 0),
    ("1 8", "18", {}, 0), ("18\x00", "18", {}, 0), ("x" * 100_000, "18", {}, 0),
    ("STRASSE", "stra\N{LATIN SMALL LETTER SHARP S}e", dict(ignore_case=True), 1)])
def test_exact_match(text, answer, options, score):
  assert exact_match(task(answer), completion(text), **options) == ok(score)


def test_exact_match_needs_a_reference():
  assert exact_match(task(""), completion("")).status == "unscorable"


@pytest.mark.parametrize("text, matches", [
    ("<a>1</a>", True), ("<a>1\n2</a>", True), ("<a>1</a> ", False), (" <a>1</a>", False),
    ("", False)])
def test_format_is_about_the_whole_completion(text, matches):
  assert matches_format(task(), completion(text), pattern="<a>.*</a>") is matches


@settings(max_examples=50, deadline=None)
@given(max_tokens=st.integers(0, 60), share=st.floats(0, 1), length=st.integers(0, 80))
def test_overlong_is_the_equation(max_tokens, share, length):
  buffer = int(max_tokens * share)
  limit = max_tokens - buffer
  if length <= limit:
    expected = 0.0
  elif length <= max_tokens:
    expected = (limit - length) / buffer
  else:
    expected = -1.0
  found = overlong(task(), completion(length=length), max_tokens=max_tokens, buffer=buffer)
  assert found == pytest.approx(expected, abs=1e-12)


def test_overlong_does_not_count_the_prompt():
  assert overlong(task(), completion(length=10, prompt=500), max_tokens=10, buffer=5) == -1.0
  assert overlong(task(), completion(length=5, prompt=500), max_tokens=10, buffer=5) == 0.0


def test_finished():
  assert finished(task(), completion(finish="stop")) is True
  assert finished(task(), completion(finish="length")) is False
