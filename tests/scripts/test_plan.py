"""The comparison of plans with runs: its cases are configs that there are, its figures those of the runs."""

import json

import pytest

from jaxrl import config as configs
from jaxrl.cli import OVERRIDE
import plan


@pytest.mark.parametrize("kind", plan.KINDS)
@pytest.mark.parametrize("size", plan.SIZES)
def test_cases_are_configs(kind, size):
  spec, *flags = plan.flags_of(kind, plan.SIZES[size])
  config = configs.load(spec.removeprefix("--config="))
  configs.override(config, dict(OVERRIDE.fullmatch(flag).groups() for flag in flags))
  assert configs.phase_names(config) == [kind] and config.model.d_model == plan.SIZES[size]["d_model"]


def test_growth_is_less_that_of_the_smallest_model_and_other_cases_are_kept(tmp_path, monkeypatch):
  def call(*arguments):
    assert arguments[0] == "-c"
    return json.dumps(dict(peak=3e8, parameters=19e6))
  monkeypatch.setattr(plan, "call", call)
  monkeypatch.setattr(plan, "peak_bytes", lambda kind, model: 5e8 if model == plan.SMALLEST else 7.5e8)
  for cases in ("rl:68M", "sft:19M"):
    monkeypatch.setattr("sys.argv", ["plan.py", f"--cases={cases}", f"--out={tmp_path}"])
    plan.main()
  rows = (tmp_path / "plan.md").read_text().splitlines()
  assert rows[-2:] == ["| rl:68M | 19 | 300 | 250 | 1.20 |", "| sft:19M | 19 | 300 | 250 | 1.20 |"]
