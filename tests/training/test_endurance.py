"""Runs that are killed again and again, and runs that are long: nothing is lost and nothing grows."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from configs import base

def get_config():
  config = base.get_config()
  config.data.train = config.data.validation = "task:addition"
  config.data.update(task=dict(digits=1), task_size=300, max_prompt_tokens=8,
                     max_completion_tokens=8)
  config.tokenizer.alphabet = "0123456789+="
  config.model.update(layers=1, d_model=16, heads=2, kv_heads=1, d_ff=32)
  config.batch.update(row_length=32, micro_batch_rows=2, examples=8)
  config.rollout.update(prompts=4, episode=dict(name="group", samples=4), max_tokens=4)
  config.evaluate.update(problems=8, samples=0)
  config.log.update(samples_every=5, curves_every=20)
  config.phases = ("sft", "rl")
  config.sft = dict(kind="sft", steps=5, objective=[dict(name="cross_entropy")],
                    until=dict(metric="greedy_accuracy", at_least=0.9, every=5))
  config.rl = dict(kind="rl", steps=60,
                   until=dict(metric="greedy_accuracy", at_least=1.1, every=20))
  return config
"""


def script(name, place, *arguments):
  """Runs a script of scripts/bench on one device -> what it wrote."""
  environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
  ended = subprocess.run(
      [sys.executable, ROOT / "scripts/bench" / name, f"--out={place / 'out.json'}", *arguments],
      cwd=place, env=environment, capture_output=True, text=True, timeout=1800)
  assert (place / "out.json").exists(), ended.stdout + ended.stderr
  return json.loads((place / "out.json").read_text())


def test_a_run_that_is_killed_at_random_moments_ends_bit_identical(tmp_path):
  result = script("kills.py", tmp_path, "--kills=4", "--seed=1")
  assert result["differing"] == [] and result["identical"]
  assert result["kills"] == len(result["killed_after_update"]) == 4


def test_sixty_updates_leave_no_thread_file_array_or_program_behind(tmp_path):
  (tmp_path / "tiny.py").write_text(CONFIG)
  result = script("soak.py", tmp_path, f"--config={tmp_path / 'tiny.py'}", "--steps=60", "--sft=5",
                  "--warm=30", "--save=3", "--picture=")  # pools of threads fill as they are used
  # The halves that are compared are five checkpoints apart; one may be under way all the time.
  assert result["threads_growth"] < 5 and result["descriptors_growth"] < 5, result
  assert result["arrays_growth"] == result["programs_after_warm"] == 0, result
  assert result["updates"] == 60 and result["metrics_complete"]
