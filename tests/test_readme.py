"""What README shows works as it stands there."""

import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

from jaxrl import cli
from jaxrl import data
from tests.models import published

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def block(containing):
  """The first Python code block of the README that holds a text."""
  return next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if containing in b)


def run(directory, config, *options):
  small = ("--config.model.layers=1", "--config.model.d_model=32", "--config.model.d_ff=32",
           "--config.evaluate.problems=4", "--config.rollout.prompts=2", "--config.batch.examples=4",
           "--config.rollout.max_tokens=8", "--config.sft.steps=2", "--config.rl.steps=2")
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  return subprocess.run(
      [sys.executable, "-m", "jaxrl", "run", f"--config={config}", "--workdir=out", *small, *options],
      cwd=directory, capture_output=True, text=True, timeout=300, env=environment)


def test_own_data_and_reward_take_under_30_lines_and_work(tmp_path):
  code = block("def right_and_short")
  assert len(code.splitlines()) < 30
  (tmp_path / "capitals.py").write_text(code)
  rows = [{"ask": f"capital of country {i}?", "reply": f"Town{i}"} for i in range(60)]
  (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  result = run(tmp_path, "capitals.py", "--config.tokenizer.vocab_size=300")
  assert result.returncode == 0, result.stderr
  phases = json.loads((tmp_path / "out" / "summary.json").read_text())["phases"]
  assert [p["name"] for p in phases] == ["sft", "rl"]
  evidence = (tmp_path / "out" / "samples" / "rl.jsonl").read_text().splitlines()
  assert json.loads(evidence[0])["criteria"]["right_and_short"]["status"] == "ok"


def test_own_episode_runs_from_the_config(tmp_path):
  (tmp_path / "drafts.py").write_text(block("async def draft_then_refine") + """
from configs import quickstart

def get_config():
  config = quickstart.get_config()
  config.tokenizer.alphabet = ""
  config.rollout.episode = dict(name="drafts:draft_then_refine", drafts=2, refinements=3)
  config.rollout.filter_zero_variance = False
  return config
""")
  result = run(tmp_path, "drafts.py", "--config.sft.until=None", "--config.rl.until=None",
               "--config.optimizer.warmup_steps=0", "--config.log.samples_every=1")
  assert result.returncode == 0, result.stderr
  rows = [json.loads(line) for line in
          (tmp_path / "out" / "samples" / "rl.jsonl").read_text().splitlines()]
  assert len(rows) == 2 * 2 * 3  # updates x prompts x refinements; drafts are not trained on


def test_own_method_is_config_piece_and_test_in_one_file(tmp_path):
  code = block("def favour_best")
  assert len(code.splitlines()) < 40
  (tmp_path / "favour.py").write_text(code)
  result = run(tmp_path, "favour.py", "--config.sft.until=None", "--config.rl.until=None",
               "--config.optimizer.warmup_steps=0")
  assert result.returncode == 0, result.stderr
  tested = subprocess.run([sys.executable, "-m", "pytest", "-q", "favour.py"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
  assert tested.returncode == 0 and "1 passed" in tested.stdout, tested.stdout


def run_section(directory, heading):
  """Runs the commands of a section with a tiny model in the place of the published one."""
  (directory / "capitals.py").write_text(block("def right_and_short"))
  rows = [{"ask": f"capital of country {i}?", "reply": f"Town{i}"} for i in range(60)]
  (directory / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  tokenizer = data.train_bpe([row["ask"] + row["reply"] for row in rows], 300)
  tokenizer.fast.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
  tokenizer.save(directory / "tiny")
  published.saved("qwen2_for_300_tokens", directory / "tiny")
  section = README.split(f"## {heading}")[1].split("```bash\n")[1].split("```")[0]
  assert "Qwen/Qwen2.5-0.5B" in section  # which is not here
  lines = section.replace("Qwen/Qwen2.5-0.5B", "tiny").replace("\\\n", " ").splitlines()
  small = ["--config.evaluate.problems=0", "--config.batch.examples=4", "--config.sft.steps=2",
           "--config.phases=['sft']"]
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  for line in lines:
    words = shlex.split(line, comments=True)
    command = [sys.executable, "-m", *words, *(small if words[1] == "run" else [])]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, (line, done.stderr)


def test_own_checkpoint_is_trained_exported_trained_again_and_asked(tmp_path, monkeypatch, capsys):
  run_section(tmp_path, "Your own checkpoint")
  hf = json.loads((tmp_path / "tuned" / "config.json").read_text())
  assert hf["architectures"] == ["Qwen2ForCausalLM"] and hf["dtype"] == "bfloat16"

  monkeypatch.chdir(tmp_path)
  (tmp_path / "prompts.jsonl").write_text('{"prompt": "capital of country 3?"}\n' * 2)
  section = README.split("## Talk to your model")[1].split("```bash\n")[1].split("```")[0]
  for line in section.replace("Qwen/Qwen2.5-0.5B", "tiny").splitlines():
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    cli.main([*shlex.split(line)[1:], "--max_tokens=4"])
  rows = [json.loads(text) for text in capsys.readouterr().out.splitlines() if text.startswith('{"prompt"')]
  assert [len(row["logprobs"]) == row["tokens"] <= 4 for row in rows] == [True] * 3
  assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2 * 4


def test_adapters_are_trained_exported_and_trained_further(tmp_path):
  run_section(tmp_path, "Adapters")
  stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert stated["r"] == 8 and stated["lora_alpha"] == 16 and stated["base_model_name_or_path"] == "tiny"
  assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
  assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
  model = json.loads((tmp_path / "runs" / "further" / "config.json").read_text())["model"]
  assert model["source"] == "tiny" and model["adapters"]["default"]["source"] == "adapter"
