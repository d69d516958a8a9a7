"""Losses of pairs refuse lists of answers, for which they would be 0 without a word."""

import json

import pytest

from jaxrl import config as configs
from jaxrl.training import builders


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
