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


def test_growth_is_less_that_of_the_smallest_model(tmp_path, monkeypatch, capsys):
  def call(*arguments):
    assert arguments[0] == "-c"
    return json.dumps(dict(peak=3e8, parameters=19e6))
  monkeypatch.setattr(plan, "call", call)
  monkeypatch.setattr(plan, "peak_bytes", lambda kind, model: 5e8 if model == plan.SMALLEST else 7.5e8)
  monkeypatch.setattr("sys.argv", ["plan.py", f"--out={tmp_path / 'plan.md'}"])
  plan.main()
  rows = [line for line in (tmp_path / "plan.md").read_text().splitlines() if line.startswith(("| sft", "| rl"))]
  assert len(rows) == 4 and rows[0] == "| sft | 19 | 300 | 250 | 1.20 |" == capsys.readouterr().out.splitlines()[0]
