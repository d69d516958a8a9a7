"""Every config: two real updates of a small model, and a resume between them, to the same bits."""

import hashlib
import json
import math
import os
import shutil

import filelock
import jax
import numpy as np
import pytest

from jaxrl import config as configs
from jaxrl.evidence import methods
from jaxrl.training import curves
from jaxrl.training import hostfile
from jaxrl.training import run
from jaxrl.training.machine import CompileCounter
from jaxrl.training.reporting import Reporter
from tests.checkpointed import arrays_of

CLASSICAL = ["reinforce.py", "rloo.py", "ppo.py", "ppo.py:shared", "grpo.py", "dr_grpo.py", "dapo.py",
             "gspo.py", "cispo.py", "gmpo.py", "countdown.py"]
SMALL = {"data.task_size": 300, "model.layers": 1, "model.d_model": 32,
         "model.d_ff": 64, "model.heads": 2, "model.kv_heads": 2, "evaluate.problems": 8,
         "evaluate.pairs": 8, "evaluate.samples": 0, "checkpoint.keep": 10, "checkpoint.every": 1,
         "log.samples_every": 0, "log.curves_every": 0, "compilation_cache": "off"}

SIZES = ("digits", "shortest", "longest")  # knobs of tasks that make problems longer
# Whose formats need their digits.
LONG = tuple(f"configs/methods/{name}.py" for name in ("inftythink_plus", "rlcr", "rlpt"))

# Whose second batch has more rows than the first.
GROWING = tuple(f"configs/methods/{name}.py" for name in ("grpo_ma", "rmt"))

TRAINING = tuple(f"jit({name})" for name in ("_in_one", "_outputs", "_signals", "_sums", "_update"))

# Predictions are right after minutes of warm start only: here those of an even length count.
EVEN = {"configs/methods/rlpt.py": [
    dict(name="matches_format", label=label, pattern="(?:..)*") for label in ("prefix", "exact")]}


def small(spec):
  config = configs.load(spec)
  configs.override(config, {k: v if isinstance(v, str) else repr(v) for k, v in SMALL.items()})
  if spec in EVEN:
    config.reward.criteria = EVEN[spec]
  for name in SIZES:
    if name in config.data.task and spec not in LONG:
      config.data.task[name] = 1
  return config


@pytest.fixture(scope="module", autouse=True)
def quickly():
  """Programs that run for milliseconds need no optimisation, and nobody looks at the pictures."""
  jax.config.update("jax_disable_most_optimizations", True)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(curves, "draw", lambda *_: None)
    yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def start_of(tmp_path_factory):
  """For a config, a supervised run that gets some of its problems right, so that rewards differ.

  All processes that test share these.
  """
  root = tmp_path_factory.getbasetemp()
  root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

  def start_of(config):
    warm = small("configs/quickstart.py")
    warm.phases, warm.tokenizer = ("sft",), config.tokenizer
    warm.data = config.data.copy_and_resolve_references()
    warm.data.test = ""
    warm.sft.steps, warm.sft.until = 60, None
    warm.optimizer.learning_rate = 3e-3
    warm.checkpoint.every = 0
    text = json.dumps([configs.to_dict(part) for part in (warm.data, warm.tokenizer)], sort_keys=True)
    place = root / f"warm_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    with filelock.FileLock(f"{place}.lock"):
      if not (place / "summary.json").exists():
        run.run(warm, place, quiet=True)
    return str(place)
  return start_of


def rows_of(place):
  return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def shape_of(place, number):
  """Of the batch that a checkpoint was made after."""
  return hostfile.read(place / "checkpoints" / str(number) / "host")[0]["host"]["shape"]


@pytest.mark.parametrize("spec", [
    *(f"configs/{name}" for name in CLASSICAL),
    *(f"configs/methods/{methods.path_of(slug).name}" for slug in methods.slugs())])
def test_two_updates_and_a_resume_between_them(spec, start_of, tmp_path):
  config = small(spec)
  config.start = start_of(config)
  config.phases = tuple(name for name in config.phases if config[name].kind not in ("sft", "evaluate"))
  for name in config.phases:
    config[name].steps, config[name].until = 2, None
    configs.override(config, {f"{name}.optimizer.warmup_steps": "0",
                              f"{name}.optimizer.learning_rate": "1e-3"})
  last = 2 * len(config.phases)
  compiled, counter, step = {}, CompileCounter(), Reporter.step

  def counting(reporter, number, *rest):
    compiled[number] = {name: counter.programs[name] for name in TRAINING}
    step(reporter, number, *rest)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Reporter, "step", counting)
    run.run(config, tmp_path / "whole", quiet=True)
  counter.close()
  for number in range(2, last + 1, 2):
    before, after = (shape_of(tmp_path / "whole", n) for n in (number - 1, number))
    assert before == after or spec in GROWING
    assert compiled[number] == compiled[number - 1] or before != after, "the second update compiled"
  updates = [row for row in rows_of(tmp_path / "whole") if "loss" in row]
  assert [row["step"] for row in updates] == list(range(1, last + 1))
  assert all(math.isfinite(row["loss"]) and row["skipped_steps"] == 0 for row in updates)
  first, final = (arrays_of(tmp_path / "whole", n) for n in (1, last))
  moved = [k for k in first if k.startswith("['params']") and (first[k] != final[k]).any()]
  assert moved, "no parameter moved"

  shutil.copytree(tmp_path / "whole", tmp_path / "again")
  for number in range(2, last + 1):
    shutil.rmtree(tmp_path / "again" / "checkpoints" / str(number))
  (tmp_path / "again" / "summary.json").unlink()
  counter = CompileCounter()
  run.run(config, tmp_path / "again", quiet=True)
  counter.close()
  for name in TRAINING:  # shared by runs that differ in nothing else
    assert counter.programs[name] == 0, f"the resumed run compiled {name} again"
  found = arrays_of(tmp_path / "again", last)
  assert set(found) == set(final)
  for name, array in final.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)
