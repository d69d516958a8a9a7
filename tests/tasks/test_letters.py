"""Words with some of one letter: their gold reward, and comparisons that follow it with some noise."""

import numpy as np
import pytest

from jaxrl.batch import Task, Trajectory
from jaxrl.tasks import letters


def drawn(count, **knobs):
  return [letters.sample(np.random.default_rng(i), **knobs) for i in range(count)]


@pytest.mark.parametrize("word, expected", [
    ("aaaabbbb", 1.0), ("abababab", 1.0), ("bcdefghb", 0.0), ("aaaaaaaa", 0.0), ("aabbbbbb", 0.75),
    ("aaaaaabb", 0.75), ("aaaabbb", 0.0), ("aaaabbbbb", 0.0), ("aaaabbb:", 0.0), ("", 0.0)])
def test_gold_is_a_parabola_of_the_letters_number(word, expected):
  row = dict(answer="a", length=8)
  assert letters.gold_reward(row, word) == pytest.approx(expected)
  assert letters.check(row, word) == (expected == 1)
  completion = Trajectory([1, 1], [False, True], text=word)
  assert letters.gold(Task("t", [1], row=row), completion) == pytest.approx(expected)


def test_words_are_of_the_length_and_share_that_was_asked_for():
  rows = drawn(600, length=6, share=0.25)
  words = [word for row in rows for word in (row["chosen"], row["rejected"])]
  assert all(len(word) == 6 and set(word) <= set(letters.LETTERS) for word in words)
  held = np.mean([row[side].count(row["answer"]) / 6 for row in rows for side in ("chosen", "rejected")])
  assert abs(held - 0.25) < 4 * np.sqrt(0.25 * 0.75 / (6 * len(words)))
  assert all(row["solution"] in (row["chosen"], row["rejected"]) for row in rows)
  assert letters.key(rows[0]) == letters.key(dict(rows[0], chosen=rows[0]["rejected"],
                                                  rejected=rows[0]["chosen"]))


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
def test_the_better_word_is_chosen_as_often_as_the_model_says(noise):
  rows = drawn(2000, sharpness=4.0, noise=noise)
  gap = np.array([letters.gold_reward(r, r["chosen"]) - letters.gold_reward(r, r["rejected"])
                  for r in rows])
  right = 1 / (1 + np.exp(-4.0 * np.abs(gap)))
  expected = (right * (1 - noise) + (1 - right) * noise)[gap != 0]
  found = (gap > 0)[gap != 0]
  assert abs(found.mean() - expected.mean()) < 4 * 0.5 / np.sqrt(len(found))


@pytest.mark.parametrize("knobs, message", [
    (dict(length=7), "must be even"), (dict(length=0), "length"), (dict(share=1), "nothing to compare"),
    (dict(noise=1.5), "noise")])
def test_impossible_knobs_are_refused(knobs, message):
  with pytest.raises(ValueError, match=message):
    drawn(1, **knobs)
