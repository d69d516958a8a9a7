"""Stages of the loop of RLHF: their configs, and the curve that is drawn of them."""

import json

import numpy as np
import pytest

from jaxrl import config as configs

import rlhf_toy as script


def test_every_stage_has_a_config_and_no_other_name_has():
  stages = {name: configs.load(f"configs/rlhf_toy.py:{name}")
            for name in ("start", "bradley_terry", "beta", "policy")}
  assert [c[c.phases[0]].kind for c in stages.values()] == ["sft", "reward", "reward", "rl"]
  models = [configs.to_dict(c.model) for c in stages.values()]
  assert all(m | {"heads_on_top": []} == models[0] | {"heads_on_top": []} for m in models)
  assert stages["policy"].reward.aggregate.weights.to_dict() == {"proxy": 1.0}, "gold is only seen"
  with pytest.raises(ValueError, match="no stage 'betas'"):
    configs.load("configs/rlhf_toy.py:betas")


def test_points_of_the_curve_are_means_of_updates_and_kl_is_that_of_words(tmp_path, monkeypatch):
  monkeypatch.setattr(script, "WINDOW", 10)
  rows = [{"step": i, "grad_norm": 1.0, "kl": 0.1 * i, "response_tokens": 9.0,
           "criteria/gold": 0.01 * i, "criteria/proxy": -1.0 + 0.1 * i} for i in range(25)]
  rows.insert(3, {"step": 3, "validation/greedy_accuracy": 0.5})
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
  found = script.curve(tmp_path)
  np.testing.assert_allclose(found["kl"], 0.9 * np.array([4.5, 14.5, 22.0]))
  np.testing.assert_allclose(found["gold"], [0.045, 0.145, 0.22])
  found = dict(found, gold=[0.1, 0.6, 0.3], accuracy=0.7)
  summary = script.summary(found)
  assert summary["best"] == 0.6 and summary["last"] == 0.3
  np.testing.assert_allclose(summary["best_kl"], 0.9 * 14.5)
  script.draw({"beta": [found], "bradley_terry": [found, found]}, tmp_path / "curve.png")
  assert (tmp_path / "curve.png").stat().st_size > 10_000
