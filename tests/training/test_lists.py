"""Rows that a loss cannot do with are refused: lists for losses of pairs, numbers out of range."""

import json

import pytest

from jaxrl import compose
from jaxrl import config as configs
from jaxrl import objectives
from jaxrl.batch import Trajectory
from jaxrl.training import builders
from jaxrl.training import refusals


def lists(place, *sizes):
  rows = [dict(question="1+1=", answers=[dict(text=str(i), rank=i) for i in range(n)]) for n in sizes]
  place.write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = configs.load("configs/bradley_terry.py")
  config.data.update(train=str(place), validation="", test="", answers="answers", chosen="text",
                     rejected="", answer="", columns=("rank",))
  configs.override(config, {"model.layers": "1", "model.d_model": "16", "model.d_ff": "16",
                            "model.heads": "2", "model.kv_heads": "2", "compilation_cache": "off"})
  return config


def test_lists_of_other_sizes_than_two_have_no_loss_of_pairs(tmp_path):
  with pytest.raises(ValueError, match=r"config.objective\[0\]: bradley_terry compares pairs.* 3 or 4 answers"):
    builders.build_parts(lists(tmp_path / "rows.jsonl", 3, 4), tmp_path / "run", print)


def test_a_loss_of_lists_takes_them(tmp_path):
  config = lists(tmp_path / "rows.jsonl", 3, 4)
  config.comparisons.objective = [dict(name="plackett_luce")]
  parts = builders.build_parts(config, tmp_path / "run", print)
  parts.scorer.close()
  assert parts.shapes["comparisons"].together


@pytest.mark.parametrize("term, bad", [
    (dict(name="ordinal", levels=3, label="rank"), 4), (dict(name="binary_label", label="rank"), 1.5),
    (dict(name="value_systems", values=2, clusters=1, agent="rank", value="rank"), 2),
    (dict(name="fairness", group="rank", first="rank"), -1)])
def test_numbers_that_a_loss_cannot_do_with_are_bad_rows(tmp_path, term, bad):
  place = tmp_path / "rows.jsonl"
  config = lists(place, *[2] * 5)
  config.comparisons.objective = [term]
  rows = [json.loads(line) for line in place.read_text().splitlines()]
  for row in rows:
    for answer in row["answers"]:
      answer["rank"] = 1
  rows[3]["answers"][1]["rank"] = bad
  place.write_text("".join(json.dumps(row) + "\n" for row in rows))
  with pytest.raises(ValueError, match=rf"rows.jsonl:4: field 'rank' holds {bad}, but config.objective has a loss "
                                       "for numbers from"):
    builders.build_parts(config, tmp_path / "run", print)


def test_losses_of_references_are_looked_at_too():
  terms = [compose.build("cross_entropy", objectives), compose.build("dpo", objectives)]
  made = [[Trajectory([1, 2], [False, True], group=g) for _ in range(3)] for g in range(2)]
  with pytest.raises(ValueError, match=r"references\[0\]: config.objective\[1\]: dpo compares pairs.* 3 answers"):
    refusals.check_pairs(terms, made, where="references[0]: ")
  refusals.check_pairs(terms, [made[0][:2], made[1]])
