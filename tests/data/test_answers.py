"""Judged answers in the shapes that they are published in, and splits that do not leak."""

import hashlib
import json
import re

import numpy as np
import pytest

from jaxrl import data
from jaxrl.data import Fields, PairBuilder, TaskBuilder
from jaxrl.data.transforms.answers import group_rows, labelled_solutions, pair_answers, rank_answers
from jaxrl.data.transforms.answers import votes
from jaxrl.data.transforms.splits import hold_out

TOKENIZER = data.CharacterTokenizer()
SOLVED = {"question": "1+2", "ground_truth": "3", "small": {"solution": "4", "is_correct": False},
          "large": {"solution": "<<1+2=3>>3", "is_correct": True},
          "other": {"solution": "5", "is_correct": False}}
RATED = {"instruction": "Hi", "completions": [
    {"response": "yes", "overall_score": 7.5, "annotations": {"help": {"Rating": "2"}}},
    {"response": "no", "overall_score": 2, "annotations": {"help": {"Rating": "5"}}},
    {"response": "so", "overall_score": 7.5, "annotations": {"help": {"Rating": "3"}}}]}
VOTE = {"conversation_a": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}],
        "conversation_b": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "B"}]}


@pytest.fixture
def source(tmp_path):
  def write(*rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.open_source(str(path))
  return write


def everything(source):
  return [source[i] for i in range(len(source))]


def refusal(source, index=0):
  with pytest.raises(data.BadRow) as error:
    source[index]
  return re.sub(r"\S*rows.jsonl", "rows.jsonl", str(error.value))


def test_solutions_in_fields_of_their_own_become_a_list(source):
  (row,) = everything(labelled_solutions(source(SOLVED), remove=r"<<[^>]*>>"))
  assert row == {"question": "1+2", "ground_truth": "3", "answers": [
      {"text": "4", "grade": 0, "name": "small"}, {"text": "3", "grade": 1, "name": "large"},
      {"text": "5", "grade": 0, "name": "other"}]}
  (row,) = everything(labelled_solutions(source(SOLVED), solutions=("small",), into="tries"))
  assert [answer["name"] for answer in row["tries"]] == ["small"] and "large" in row


def test_pairs_are_of_different_grade_and_the_better_one_comes_first(source):
  pairs = pair_answers(labelled_solutions(source({"question": "0"} | SOLVED, SOLVED)))
  assert [(r["chosen"], r["rejected"], r["margin"]) for r in everything(pairs)] == 2 * [
      ("<<1+2=3>>3", "4", 1), ("<<1+2=3>>3", "5", 1)]
  assert pairs[0]["question"] == "1+2" and "answers" not in pairs[0]
  assert [pairs.where(i).rpartition(":")[2] for i in range(4)] == ["1#0", "1#1", "2#0", "2#1"]
  all_wrong = {"question": "9", "a": SOLVED["small"], "b": SOLVED["other"]}
  some = pair_answers(labelled_solutions(source(all_wrong, SOLVED, all_wrong)))
  assert len(some) == 2 and some.where(0).endswith(":2#0")
  with pytest.raises(ValueError, match="pair_answers makes nothing of 1 rows, .*:1"):
    pair_answers(labelled_solutions(source(all_wrong)))


def test_rated_lists_are_read_as_they_are_or_ranked_or_paired(source):
  rows = source(RATED)
  lists = PairBuilder(TaskBuilder(TOKENIZER, Fields(question="instruction", answer="")),
                      answers="completions", chosen="response", rejected="",
                      columns=("overall_score",)).read(rows, 0)
  assert lists.answers == ("yes", "no", "so")
  assert [c["overall_score"] for c in lists.columns] == [7.5, 2, 7.5]

  kwargs = dict(answers="completions", grade="overall_score")
  (ranked,) = everything(rank_answers(rows, **kwargs))
  assert [a["rank"] for a in ranked["completions"]] == [1, 3, 1]
  pairs = everything(pair_answers(rows, text="response", **kwargs))
  assert [(r["chosen"], r["rejected"], r["margin"]) for r in pairs] == [
      ("yes", "no", 5.5), ("so", "no", 5.5)]
  kwargs = dict(answers="completions", grade="annotations.help.Rating", text="response")
  assert [(r["chosen"], r["rejected"], r["margin"]) for r in everything(pair_answers(rows, **kwargs))
          ] == [("no", "yes", 3), ("so", "yes", 1), ("no", "so", 2)]
  assert len(pair_answers(rows, least=2, **kwargs)) == 2
  (extremes,) = everything(pair_answers(rows, which="extremes", **kwargs))
  assert (extremes["chosen"], extremes["rejected"]) == ("no", "yes")
  with pytest.raises(ValueError, match="which='best'"):
    pair_answers(rows, which="best", **kwargs)


def test_rows_of_one_solution_each_are_grouped_by_question(source):
  rows = [dict(question=q, solution=s, is_correct=c, level=1) for q, s, c in
          (("a", "1", True), ("b", "2", False), ("a", "3", False))]
  grouped = group_rows(source(*rows, {"question": "a"}))
  assert len(grouped) == 3 and grouped.where(1).endswith(":2")
  assert grouped[0] == {"question": "a", "level": 1, "answers": [
      {"text": "1", "grade": 1}, {"text": "3", "grade": 0}]}
  assert refusal(grouped, 2).startswith("rows.jsonl:4: field 'solution'")
  (pair,) = everything(pair_answers(group_rows(source(*rows))))
  assert (pair["chosen"], pair["rejected"]) == ("1", "3")


@pytest.mark.parametrize("vote, chosen, preference", [
    ("model_a", "A", 1.0), ("model_b", "B", 1.0), ("tie", "A", 0.5), ("tie (bothbad)", "A", 0.5)])
def test_votes_become_pairs(source, vote, chosen, preference):
  (row,) = everything(votes(source({**VOTE, "winner": vote})))
  assert row["chosen"][-1]["content"] == chosen and row["preference"] == preference
  assert {row["chosen"][-1]["content"], row["rejected"][-1]["content"]} == {"A", "B"}


def test_ties_may_be_left_out(source):
  kept = votes(source(*({**VOTE, "winner": w} for w in ("tie", "model_b", "tie"))), keep_ties=False)
  assert len(kept) == 1 and kept.where(0).endswith(":2")


@pytest.mark.parametrize("change, row, message", [
    (labelled_solutions, {"question": "1"}, "rows.jsonl:1: no field holds a mapping with 'solution'"),
    (lambda s: labelled_solutions(s, solutions=("smal",)), SOLVED,
     "rows.jsonl:1: field 'smal', which data.transforms names, is missing; did you mean 'small'?"),
    (labelled_solutions, SOLVED | {"large": {"solution": "3", "is_correct": "maybe"}},
     "rows.jsonl:1: large: field 'is_correct' holds 'maybe', but a grade is"),
    (labelled_solutions, SOLVED | {"large": {"solution": 3, "is_correct": 1}},
     "rows.jsonl:1: large: field 'solution' has to hold text, not 3"),
    (pair_answers, {"answers": "x"}, "rows.jsonl:1: field 'answers' has to hold a list of mappings"),
    (pair_answers, {"answers": []}, "rows.jsonl:1: field 'answers' has to hold a list of mappings"),
    (pair_answers, {"answers": [{"text": "a", "grade": 1}, {"text": "b"}]},
     "rows.jsonl:1: answers[1]: field 'grade', which data.transforms names, is missing"),
    (lambda s: rank_answers(s, grade="a.b"), {"answers": [{"a": 1}]},
     "rows.jsonl:1: answers[0]: there is no 'b' in 1"),
    (lambda s: rank_answers(s), {"answers": [{"grade": "N/A"}]}, "holds 'N/A'"),
    (votes, VOTE | {"winner": "model_c"}, "rows.jsonl:1: field 'winner' holds the vote 'model_c'; did"),
    (votes, {"winner": "tie"}, "field 'conversation_a', which data.transforms names, is missing")])
def test_bad_rows_are_named_where_they_are_read(source, change, row, message):
  changed = change(source(row, row))
  assert len(changed) == 2 and message in refusal(changed)


def test_a_split_depends_on_the_text_alone_and_leaks_nothing(source):
  rows = [{"question": f"q{i % 500}", "n": i} for i in range(1000)]
  parts = {split: everything(hold_out(source(*rows), split=split, by="question", validation=0.1, test=0.2))
           for split in ("train", "validation", "test")}
  assert sorted(r["n"] for part in parts.values() for r in part) == list(range(1000))
  asked = {split: {r["question"] for r in part} for split, part in parts.items()}
  assert not asked["train"] & asked["test"] and not asked["train"] & asked["validation"]
  assert abs(len(asked["test"]) - 100) < 40 and abs(len(asked["validation"]) - 50) < 30
  for question in asked["validation"]:
    first = hashlib.sha256(question.encode()).hexdigest()[:16]
    assert 0.2 <= int(first, 16) / 2 ** 64 < 0.3
  alone = hold_out(source(*(r for r in rows if r["question"] in asked["test"])), split="test",
                   by="question", validation=0.1, test=0.2)
  assert len(alone) == len(parts["test"])


def test_dialogues_are_split_by_how_they_open(source):
  opening = [f"\n\nHuman: {i}" for i in range(60)]
  rows = [{"chosen": f"{o}\n\nAssistant: {x}"} for o in opening for x in "ab"]
  found = {split: everything(hold_out(source(*rows), split=split, by="chosen", up_to="\n\nAssistant:",
                                      test=0.5)) for split in ("train", "test")}
  starts = [{r["chosen"].split("\n\nAssistant:")[0] for r in part} for part in found.values()]
  assert not starts[0] & starts[1] and all(len(part) % 2 == 0 for part in found.values())
  talks = [{"chosen": [{"role": "user", "content": o}, {"role": "assistant", "content": "x"}]}
           for o in opening]
  chat = hold_out(source(*talks), split="test", by="chosen", test=0.5)
  assert {r["chosen"][0]["content"] for r in everything(chat)} == starts[1]


def test_impossible_splits_are_refused(source):
  with pytest.raises(ValueError, match="leave something to train on"):
    hold_out(source(SOLVED), split="train", by="question", validation=0.5, test=0.5)
  with pytest.raises(ValueError, match="none of 1 rows is in the split 'test'"):
    hold_out(source(SOLVED), split="test", by="question")
  assert refusal(pair_answers(labelled_solutions(hold_out(source({"a": 1}), split="train", by="question"))))


def test_real_solutions(real_file):
  """Against counts that need no code of ours: right answers by question, 290, 236 and 205 times 1, 2, 3."""
  whole = data.open_source(str(real_file("gsm8k/example_model_solutions.jsonl")))
  lists = labelled_solutions(whole, remove=r"<<[^>]*>>")
  right = np.bincount([int(sum(a["grade"] for a in row["answers"])) for row in everything(lists)])
  np.testing.assert_array_equal(right, [432, 290, 236, 205, 156])
  pairs = pair_answers(lists)
  assert len(pairs) == 290 * 3 + 236 * 4 + 205 * 3
  splits = [hold_out(whole, split=s, by="question", validation=0.1, test=0.1)
            for s in ("train", "validation", "test")]
  assert sum(map(len, splits)) == 1319 and all(100 < len(s) < 165 for s in splits[1:])
  assert "<<" not in pairs[7]["chosen"] and pairs[7]["chosen"] != pairs[7]["rejected"]
