"""Tasks whose rows compare answers: labels against counts of letters, and what judges lean to."""

import numpy as np
import pytest

from jaxrl.tasks import endings, guarded_addition, leanings, societies


def rows_of(task, count=2000, **knobs):
  rng = np.random.default_rng(0)
  return [task.sample(rng, **knobs) for _ in range(count)]


def test_forbidden_sums_are_refused_and_others_are_not():
  rows = rows_of(guarded_addition, 300)
  forbidden = [row["question"].startswith("+") for row in rows]
  assert 0.4 < np.mean(forbidden) < 0.6
  for row, refuse in zip(rows, forbidden):
    total = str(sum(map(int, row["question"].strip("+=").split("+"))))[::-1]
    assert {row["chosen"], row["rejected"]} == {total, "+"} and (row["chosen"] == "+") == refuse
    assert guarded_addition.check(row, row["chosen"]) and not guarded_addition.check(row, row["rejected"])


def test_tastes_about_endings_and_lengths_say_nothing_about_each_other():
  rows = rows_of(endings)
  for row in rows:
    first, other = row["chosen"], row["rejected"]
    assert (first[-1] in "aceg") != (other[-1] in "aceg") and len(first) != len(other)
    assert row["ending"] == (first[-1] in "aceg") and row["length"] == (len(first) > len(other))
    assert all(3 <= len(w) <= 8 and w[0] == row["question"][0] for w in (first, other))
  assert abs(np.corrcoef([r["ending"] for r in rows], [r["length"] for r in rows])[0, 1]) < 0.1
  with pytest.raises(ValueError, match="shortest=1 must be at least 2"):
    endings.sample(np.random.default_rng(0), shortest=1)


def test_judges_lean_by_group_as_the_log_odds_say():
  for lean, open_in_x in ((0.0, 0.5), (1.5, 1 / (1 + np.exp(-1.5)))):
    equal = [row for row in rows_of(leanings, 4000, lean=lean)
             if row["answers"][0]["quality"] == row["answers"][1]["quality"]]
    for group, expected in ((0, open_in_x), (1, 1 - open_in_x)):
      chosen = [row["answers"][0]["preference"] for row in equal if row["answers"][0]["group"] == group]
      assert np.mean(chosen) == pytest.approx(expected, abs=0.06)
  for row in equal[:50]:
    assert [a["first"] for a in row["answers"]] == [1, 0] and row["answers"][0]["text"][0] == "a"
    assert all(a["quality"] == a["text"].count("c") for a in row["answers"])


def test_members_compare_by_a_value_or_by_the_weights_of_their_part():
  rows = rows_of(societies, 1500, sharpness=100.0)
  for row in rows:
    by = np.eye(3)[int(row["value"])] if row["value"] >= 0 else societies.WEIGHTS[int(row["agent"]) % 3]
    gap = sum(w * (row["chosen"].count(v) - row["rejected"].count(v)) for w, v in zip(by, "abc"))
    assert gap > -0.1  # ties aside, the better word is chosen
  assert np.mean([row["value"] < 0 for row in rows]) == pytest.approx(0.5, abs=0.05)
  assert {int(row["agent"]) for row in rows} == set(range(24))
