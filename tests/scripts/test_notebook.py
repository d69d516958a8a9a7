"""The notebook works as it stands there, cell by cell, with a configuration that takes seconds."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

from packaging import requirements

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "scripts" / "colab" / "quickstart.ipynb"
TINY = ("--config.model.layers=1 --config.model.d_model=32 --config.model.d_ff=32 --config.rl.steps=2 "
        "--config.rl.until=None --config.rollout.prompts=2 --config.evaluate.problems=4 "
        "--config.optimizer.warmup_steps=0 --config.log.samples_every=1 --config.checkpoint.every=0 "
        "--config.evaluate.samples=0 --config.data.validation= --config.mesh.data=1")
TINY_SFT = " --config.sft.steps=2 --config.sft.until=None"


def execute(source, names, shell, directory):
  """Runs a cell as a notebook does: `%%writefile`, `!commands` with {names} filled in, and Python."""
  if source.startswith("%%writefile "):
    name, _, text = source.removeprefix("%%writefile ").partition("\n")
    (directory / name).write_text(text)
    return
  lines = []
  for line in source.splitlines():
    if line.startswith(("!", "%")):
      line = f"shell({line!r}, globals())"
    lines.append(line)
  names["shell"] = shell
  exec(compile("\n".join(lines), str(NOTEBOOK), "exec"), names)


def test_every_cell_runs_in_order(tmp_path, monkeypatch, capsys):
  cells = json.loads(NOTEBOOK.read_text())["cells"]
  code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
  assert all(not c["outputs"] for c in cells if c["cell_type"] == "code")
  installed, shown, environment = [], [], {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  environment.update(  # programs are compiled in a hurry, and once
      PYTHONPATH=str(ROOT), XLA_FLAGS="--xla_backend_optimization_level=0",
      JAX_ENABLE_COMPILATION_CACHE="true", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "programs"))

  def shell(line, names):
    line = re.sub(r"\{(\w+)\}", lambda m: str(names[m[1]]), line)
    if line.startswith("%pip"):
      installed.append(line)
      return
    command = line.removeprefix("!").replace("python", sys.executable, 1)
    more = TINY + TINY_SFT * ("quickstart.py" in command) if " run " in command else ""
    result = subprocess.run(f"{command} {more}", shell=True, cwd=tmp_path, env=environment, timeout=300,
                            capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stderr}"
  display = types.ModuleType("IPython.display")
  display.display, display.Image = shown.append, lambda filename: pathlib.Path(filename).read_bytes()
  monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
  monkeypatch.setitem(sys.modules, "IPython.display", display)
  monkeypatch.chdir(tmp_path)
  names = {}
  for source in code:
    execute(source, names, shell, tmp_path)

  assert len(installed) == 1
  needed = requirements.Requirement(shlex.split(installed[0])[-1])
  assert needed.name == "jaxrl" and needed.url == (tmp_path / "jaxrl").as_uri()
  assert len(shown) == 1 and shown[0].startswith(b"\x89PNG")
  printed = capsys.readouterr().out
  assert "sft {'greedy_accuracy':" in printed and "rl {'greedy_accuracy':" in printed
  assert len(re.findall(r"^'\d+\+\d+=' -> ", printed, re.MULTILINE)) == 5
  assert names["last"]["criteria"].keys() == {"exact_match", "right_digits"}
  rewards = [json.loads(line) for line in (tmp_path / "runs/digits/samples/rl.jsonl").open()]
  for row in rewards:  # what the reader's own function would say
    score = row["criteria"]["right_digits"]["score"]
    assert 0 <= score <= 1 and (score == 1) == (row["criteria"]["exact_match"]["score"] == 1)
