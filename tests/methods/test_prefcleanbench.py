"""PrefCleanBench: closed forms of removing and flipping, recall of known noise, scores against SciPy."""

import json
import sys
import types

import numpy as np
import pytest
from scipy import optimize

from jaxrl.data import BadRow
from jaxrl.data.transforms import cleaning, preference_scores, score_arithmetic
from jaxrl.evaluation import cleaning as found
from jaxrl.tasks import open_task

NOISE, ROWS = 0.2, 1000


class Rows:
  """Rows in a list; None is one that cannot be read."""

  def __init__(self, rows):
    self.rows = rows

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, index):
    if self.rows[index] is None:
      raise BadRow("unreadable", self.where(index), "not a row")
    return self.rows[index]

  def where(self, index):
    return f"rows:{index}"


@pytest.fixture(scope="module")
def noisy():
  """Pairs of words with a known gold reward, a fifth of them turned around."""
  clean = open_task("letters", split="train", size=ROWS, seed=0, noise=0.0, sharpness=200.0)
  return cleaning.flip_labels(clean, seed=0, rate=NOISE)


@pytest.fixture(scope="module")
def wrong(noisy):
  return np.array([noisy[i][cleaning.MISLABELLED] for i in range(len(noisy))])


# -------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("precision", [0.3, 0.5, 0.7])
def test_flipping_is_right_with_probability_precision_and_pays_above_a_half(precision):
  """Of m flagged labels m (1 - p) were right: flipping changes the right ones by m (2p - 1)."""
  rows, flagged, bad = 1000, 200, 300
  wrong = np.zeros(rows, bool)
  hits = round(precision * flagged)
  wrong[:hits] = True  # flagged and wrong
  wrong[flagged:flagged + bad - hits] = True
  score = np.arange(rows, dtype=float)  # flags the first ones
  flip, remove = (cleaning.judge_rows(score, action=action, rate=flagged / rows)
                  for action in ("flip", "remove"))
  assert found.precision_recall(flip.flagged, wrong) == pytest.approx((precision, hits / bad))
  after = found.right_labels(wrong, flip)
  assert after == pytest.approx(1 - bad / rows + flagged / rows * (2 * precision - 1))
  left = found.right_labels(wrong, remove)
  assert left == pytest.approx((rows - bad - flagged * (1 - precision)) / (rows - flagged))
  assert (after > 1 - bad / rows) == (precision > 0.5)
  assert (left > 1 - bad / rows) == (precision > bad / rows + 1e-9)  # removing pays above the noise


def test_both_actions_hurt_labels_that_are_all_right():
  wrong, score = np.zeros(100, bool), np.arange(100.0)
  assert found.right_labels(wrong, cleaning.judge_rows(score, action="flip", rate=0.3)) == pytest.approx(0.7)
  removed = cleaning.judge_rows(score, action="remove", rate=0.3)
  assert found.right_labels(wrong, removed) == 1 and removed.keep.sum() == 70
  assert np.isnan(found.precision_recall(removed.flagged, wrong)[1])


def test_a_rate_flags_the_lowest_and_none_flags_what_is_below_zero():
  score = [0.5, -1.0, np.nan, 0.0, -0.1, 3.0]
  assert np.flatnonzero(cleaning.judge_rows(score, action="remove", rate=0.5).flagged).tolist() == [1, 3, 4]
  assert np.flatnonzero(cleaning.judge_rows(score, action="flip").flip).tolist() == [1, 4]
  assert not cleaning.judge_rows(score, action="flip", rate=1.0).flagged[2]
  with pytest.raises(ValueError, match="action='delete'"):
    cleaning.judge_rows(score, action="delete")
  with pytest.raises(ValueError, match="rate=1.5"):
    cleaning.judge_rows(score, action="flip", rate=1.5)


# ------------------------------------------------------------------------------- noise and recall


def test_noise_is_a_coin_per_row_that_its_seed_decides(noisy, wrong):
  assert abs(wrong.mean() - NOISE) < 4 * np.sqrt(NOISE * (1 - NOISE) / ROWS)
  clean = open_task("letters", split="train", size=ROWS, seed=0, noise=0.0, sharpness=200.0)
  again, other = (cleaning.flip_labels(clean, seed=seed, rate=NOISE) for seed in (0, 1))
  for i in (5, 17, int(np.flatnonzero(wrong)[0])):
    row, before = again[i], clean[i]
    assert row == noisy[i]
    assert (row["chosen"] == before["chosen"]) != wrong[i] and row["rejected"] != row["chosen"]
  assert any(other[i][cleaning.MISLABELLED] != wrong[i] for i in range(30))


SCORES = {name: dict(name=name) for name in ("reward_gap", "tag_complexity")} | {
    rule: dict(name="committee", rule=rule, members=3) for rule in ("all", "majority")}


@pytest.fixture(scope="module")
def cleaned(noisy):
  """Every source that a flip at the rate of the noise makes; of committees, by sign."""
  return {name: cleaning.clean(noisy, seed=0, score=score, action="flip",
                               rate=None if name in ("all", "majority") else NOISE)
          for name, score in SCORES.items()}


def test_models_of_rewards_find_wrong_labels_and_tags_of_prompts_do_not(cleaned, wrong):
  """What does not look at the answers flags right and wrong labels alike: its precision is the noise."""
  measured = {name: found.measure(source) for name, source in cleaned.items()}
  blind = measured["tag_complexity"]["precision"]
  deviation = np.sqrt(NOISE * (1 - NOISE) / (NOISE * ROWS))  # of the precision of flags without sight
  assert abs(blind - wrong.mean()) < 4 * deviation
  for name in ("reward_gap", "majority"):
    assert measured[name]["precision"] > wrong.mean() + 4 * deviation
    assert measured[name]["recall"] > measured["tag_complexity"]["recall"]
  assert measured["all"]["precision"] >= measured["majority"]["precision"]
  assert measured["all"]["recall"] <= measured["majority"]["recall"]
  assert measured["reward_gap"]["right_labels"] > 1 - wrong.mean()
  assert measured["tag_complexity"]["right_labels"] < 1 - wrong.mean()


def test_a_cleaned_source_says_where_its_rows_come_from_and_what_was_done(noisy, cleaned):
  source = cleaned["reward_gap"]
  i = int(np.flatnonzero(source.verdict.flip)[0])
  row, before = source[i], noisy[i]
  assert (row["chosen"], row["rejected"]) == (before["rejected"], before["chosen"])
  assert row["cleaned"] == dict(by="reward_gap", score=source.verdict.score[i], flipped=True)
  removed = cleaning.clean(noisy, seed=0, score="reward_gap", action="remove", rate=NOISE)
  assert len(removed) == ROWS - round(NOISE * ROWS)
  kept = np.flatnonzero(~source.verdict.flip)
  same = int(kept[3])
  assert removed.where(3) == noisy.where(same) and removed[3]["chosen"] == noisy[same]["chosen"]


# ------------------------------------------------------------------------------------------ scores


def test_the_linear_model_is_the_minimum_that_scipy_finds():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(60, 4))
  best = optimize.minimize(lambda w: np.log1p(np.exp(-x @ w)).sum() + 0.15 * w @ w, np.zeros(4),
                           options=dict(gtol=1e-9)).x
  np.testing.assert_allclose(score_arithmetic.fit_linear(x, 0.3), best, atol=1e-6)
  with pytest.raises(ValueError, match="ridge=0"):
    score_arithmetic.fit_linear(x, 0)


def test_no_row_is_scored_by_a_model_that_was_trained_on_it(noisy):
  """To turn one row around changes its own gap by its sign alone."""
  rows = [noisy[i] for i in range(80)]
  turned = [dict(row) for row in rows]
  turned[7]["chosen"], turned[7]["rejected"] = rows[7]["rejected"], rows[7]["chosen"]
  before, after = (preference_scores.reward_gap(Rows(r), seed=3) for r in (rows, turned))
  assert after[7] == pytest.approx(-before[7], rel=1e-9) and before[7] != 0
  part = score_arithmetic.parts(80, 2, 3)
  same = part == part[7]
  np.testing.assert_allclose(after[same & (np.arange(80) != 7)], before[same & (np.arange(80) != 7)])
  assert np.abs(after[~same] - before[~same]).max() > 0
  assert np.bincount(part).tolist() == [40, 40]


def test_committees_flag_by_the_sign_of_their_votes():
  gaps = np.array([[1.0, -1.0, -1.0, -1.0], [1.0, 1.0, -1.0, -2.0], [2.0, 3.0, 1.0, -0.1]])
  assert (score_arithmetic.agreement(gaps, "all") < 0).tolist() == [False, False, False, True]
  assert (score_arithmetic.agreement(gaps, "majority") < 0).tolist() == [False, False, True, True]
  even = score_arithmetic.agreement(gaps[:2], "majority")
  assert (even < 0).tolist() == [False, False, True, True]  # one against one is no majority


def test_ifd_is_a_ratio_of_perplexities_and_its_score_does_not_see_labels():
  of = {name: score_arithmetic.ifd(np.log(p), np.log(q))
        for name, p, q in (("helped", 0.5, 0.1), ("not", 0.2, 0.2))}
  assert of["helped"] == pytest.approx(0.2) and of["not"] == pytest.approx(1.0)  # (1/0.5) / (1/0.1)
  assert score_arithmetic.ifd_gap(of["helped"], of["not"]) == pytest.approx(0.8)
  assert score_arithmetic.ifd_gap(of["not"], of["helped"]) == pytest.approx(-0.8)
  assert score_arithmetic.ifd_score(of["helped"], of["not"]) == score_arithmetic.ifd_score(
      of["not"], of["helped"]) == pytest.approx(-0.6)


def test_tags_count_what_is_there_and_what_is_new():
  source = Rows([dict(question=q) for q in ("a b", "a b c", "c d", "a a")] + [None])
  np.testing.assert_array_equal(preference_scores.tag_complexity(source, seed=0), [2, 3, 2, 1, np.nan])
  # In order of complexity: "a b c" brings 3, "a b" none, "c d" one.
  np.testing.assert_array_equal(preference_scores.tag_diversity(source, seed=0), [0, 3, 1, 0, np.nan])


def test_a_judge_is_a_function_of_the_row(monkeypatch):
  mine = types.ModuleType("my_judge")
  mine.longer = lambda row: float(len(row["chosen"]) > len(row["rejected"]))
  monkeypatch.setitem(sys.modules, "my_judge", mine)
  source = Rows([dict(chosen="xx", rejected="x"), dict(chosen="x", rejected="xx"), None])
  out = cleaning.clean(source, seed=0, score=dict(name="judge", function="my_judge:longer"), action="flip")
  assert out.verdict.flip.tolist() == [False, True, False] and out[1]["chosen"] == "xx"
  with pytest.raises(BadRow):
    out[2]


def test_stored_scores_are_those_of_these_rows(tmp_path):
  source = Rows([dict(chosen=str(i), rejected="x") for i in range(3)])

  def write(name, scores, place="rows"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(dict(where=f"{place}:{i}", score=s)) + "\n"
                            for i, s in enumerate(scores)))
    return str(path)
  one, two = write("one.jsonl", [1.0, -1.0, None]), write("two.jsonl", [1.0, -2.0, 0.5])
  np.testing.assert_array_equal(preference_scores.stored(source, seed=0, paths=one), [1, -1, np.nan])
  both = preference_scores.stored(source, seed=0, paths=[one, two], rule="all")
  assert both[0] > 0 > both[1] and np.isnan(both[2])
  for path, message in ((write("short.jsonl", [1.0]), "has 1 scores"),
                        (write("other.jsonl", [1, 2, 3], "else"), "is about else:0"),
                        (str(tmp_path / "none.jsonl"), "cannot read scores")):
    with pytest.raises(ValueError, match=message):
      preference_scores.stored(source, seed=0, paths=path)


def test_a_part_and_what_leaves_it_out_share_the_rows():
  source = Rows([dict(question=str(i)) for i in range(10)])
  a, b = (cleaning.leave_part_out(source, seed=5, part=part) for part in (0, 1))
  assert sorted([row["question"] for row in a] + [row["question"] for row in b]) == list("0123456789")
  assert len(a) == len(b) == 5
