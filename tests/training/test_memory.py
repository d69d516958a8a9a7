"""What edits remember and episodes read, and a reference that follows, outlive every stop."""

import functools
import json
import shutil
import sys

import jax
import numpy as np
import pytest

from jaxrl import config as configs
from jaxrl import sharding
from jaxrl.training import hostfile
from jaxrl.training import run as runs
from jaxrl.training import stored
from tests.checkpointed import arrays_of

STEPS, UPDATES = 4, 2  # batches of two updates: checkpoints 1 and 3 are between these
CLOCKS = ("compilations", "compile_seconds", "step_seconds", "tokens_per_second", "rollout_seconds",
          "copy_seconds", "wait_seconds", "wait_fraction")

# All that is sampled and rewarded depends on all that is remembered.
PIECES = """
import numpy as np
from jaxrl import compose

@compose.needs("reference")
async def haunted(ctx, task, *, samples: int):
  rate, table = ctx.memory.get("rate", 0.0), ctx.memory.get("deep", [{"table": np.zeros(3)}])[0]["table"]
  more = int(1000 * (rate + table.sum())) % 3
  found = await ctx.sample(task.prompt, n=samples, train=True, max_tokens=2 + more)
  for t in found:
    said = await ctx.logprobs(task.prompt, t.tokens[t.loss_mask], model="reference")
    t.columns["gap"] = float(np.abs(said - t.behaviour_logprobs[t.loss_mask]).max())
  return found

@compose.supplies(columns=("gap",))
def remember(step):
  memory = step.memory
  lengths = np.array([t.loss_mask.sum() for t in step.trajectories], np.float32)
  memory["rate"] = 0.9 * memory.get("rate", 0.0) + 0.1 * float(lengths.mean())
  deep = memory.setdefault("deep", [{"table": np.zeros(3, np.float32)}])
  deep[0]["table"] = deep[0]["table"] * np.float32(0.7) + lengths[:3]
  counts = memory.setdefault("counts", {})
  for t in step.trajectories:
    counts[t.task_id] = counts.get(t.task_id, 0) + 1
    t.reward = memory["rate"] * (t.tokens.sum() % 5) + deep[0]["table"][int(t.tokens[-1]) % 3]
  step.metrics["reference_gap"] = max(t.columns["gap"] for t in step.trajectories)
  step.metrics["rate"] = memory["rate"]
  return step.trajectories
"""


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
  """A module with an episode and an edit; runs use one of the virtual devices."""
  directory = tmp_path_factory.mktemp("pieces")
  (directory / "haunting.py").write_text(PIECES)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(directory)
    patch.setattr(sharding, "make_mesh",
                  functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    yield "haunting"
  sys.modules.pop("haunting", None)


def config_of(module, **changes):
  config = configs.load("configs/grpo.py")
  config.data.validation = config.data.test = ""
  config.data.update(task=dict(digits=1, answer_format="reversed"), task_size=50)
  config.model.update(layers=1, d_model=16, heads=2, kv_heads=2, d_ff=16)
  config.batch.row_length, config.checkpoint.every, config.checkpoint.keep = 16, 1, 10
  config.log.update(samples_every=0, curves_every=0)
  config.compilation_cache = "off"
  config.optimizer.update(learning_rate=1e-2, warmup_steps=0)
  config.rollout.update(prompts=4, updates=UPDATES, edits=[dict(name=f"{module}:remember")],
                        episode=dict(name=f"{module}:haunted", samples=2))
  config.objective = [dict(name="clipped_surrogate"), dict(name="kl", beta=0.1)]
  config.phases, config.rl.steps = ("rl",), STEPS
  configs.override(config, {"rl.optimizer.learning_rate": "0.01",
                            **{k: repr(v) for k, v in changes.items()}})
  return config


def memory_of(workdir, number):
  """What a checkpoint remembers."""
  record, arrays = hostfile.read(workdir / "checkpoints" / str(number) / "host")
  buffer = {k.removeprefix("buffer/"): x for k, x in arrays.items() if k.startswith("buffer/")}
  position = stored.put_arrays(record["host"]["supply"], buffer)
  return position.get("supply", position)["memory"]


def rows_of(workdir):
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows if "loss" in row]


def stopped_after(number, whole, workdir):
  """A directory as a kill after an update leaves it."""
  shutil.copytree(whole, workdir)
  for later in range(number + 1, STEPS + 1):
    shutil.rmtree(workdir / "checkpoints" / str(later))
  (workdir / "summary.json").unlink()


@pytest.mark.parametrize("staleness", [0, 1])
def test_memory_goes_on_after_a_stop_as_if_there_had_been_none(pieces, tmp_path, staleness):
  config = config_of(pieces, **{"rollout.staleness": staleness, "reference.every": 3,
                                "reference.decay": 0.5})
  runs.run(config, tmp_path / "whole", quiet=True)
  rows, final = rows_of(tmp_path / "whole"), arrays_of(tmp_path / "whole", STEPS)
  assert len({row["rate"] for row in rows}) == STEPS // UPDATES
  assert all(row["grad_norm"] > 0 for row in rows)
  remembered = memory_of(tmp_path / "whole", 1)
  batches = 1 + staleness
  assert sum(remembered["counts"].values()) == batches * 8
  assert remembered["deep"][0]["table"].dtype == np.float32
  for number in (1, 2, 3):
    again = tmp_path / f"after{number}"
    stopped_after(number, tmp_path / "whole", again)
    runs.run(config, again, quiet=True)
    assert rows_of(again) == rows
    found = arrays_of(again, STEPS)
    assert set(found) == set(final) and any("reference" in name for name in final)
    for name, array in final.items():
      np.testing.assert_array_equal(found[name], array, err_msg=name)
    if number < 3:
      for name in ("rate", "counts"):
        assert memory_of(again, 3)[name] == memory_of(tmp_path / "whole", 3)[name]
      np.testing.assert_array_equal(*(memory_of(w, 3)["deep"][0]["table"]
                                      for w in (again, tmp_path / "whole")))


def test_episodes_ask_the_reference_as_it_has_followed(pieces, tmp_path):
  config = config_of(pieces, **{"rollout.updates": 1, "reference.every": 2})
  runs.run(config, tmp_path / "run", quiet=True)
  gaps = [row["reference_gap"] for row in rows_of(tmp_path / "run")]
  assert max(gaps[0], gaps[2]) < 1e-4 and min(gaps[1], gaps[3]) > 1e-3
