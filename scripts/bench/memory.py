"""What the levers of memory save, one by one and together: bytes of an update.

  python scripts/bench/memory.py            # results/bench/memory.json and .md

One supervised update of 8 rows of 256 tokens on a decoder of 34 M parameters with a vocabulary of 16384,
whose layers are scanned. Bytes of parameters and optimiser are those of the arrays, temporary ones are what
the compiler says of the update. While an offloaded optimiser is updated it is on the device beside the
gradient; XLA for CPUs counts no copy, so the peak here is at least that, as in plans.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time

import jax
import machine
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from configs import base  # noqa: E402
from jaxrl import config as configs  # noqa: E402
from jaxrl import sharding  # noqa: E402
from jaxrl.batch import Trajectory, pack  # noqa: E402
from jaxrl.training import builders, phases as phase_lib, state as states  # noqa: E402
from jaxrl.training.learner import make_learner, to_micro_batches  # noqa: E402

MODEL = dict(layers=8, d_model=512, heads=8, kv_heads=4, d_ff=1536, vocab_size=16384, scan_layers=True)
ROWS, LENGTH = 8, 256
BYTES = ("parameters", "optimizer", "optimizer_on_host", "temporary", "peak")
LOW = {"model.param_dtype": "bfloat16"}
MASTER = LOW | {"optimizer.master_dtype": "float32"}
MOMENT, OFFLOAD = {"optimizer.moments_dtype": "bfloat16"}, {"optimizer.offload": "True"}
REMAT, FEW = {"model.remat": "full"}, {"batch.micro_batch_rows": "2"}
LEVERS = {
    "float32, AdamW, all rows at once": {},
    "remat dots": {"model.remat": "dots"},
    "remat full": REMAT,
    "2 rows at a time": FEW,
    "remat full, 2 rows": REMAT | FEW,
    "lion": {"optimizer.name": "lion"},
    "adafactor": {"optimizer.name": "adafactor"},
    "bfloat16 first moment": MOMENT,
    "offload": OFFLOAD,
    "bfloat16 parameters, no master": LOW,
    "bfloat16 parameters, master": MASTER,
    "the same, bfloat16 first moment": MASTER | MOMENT,
    "the same, offload": MASTER | MOMENT | OFFLOAD,
    "the same, remat full, 2 rows": MASTER | MOMENT | OFFLOAD | REMAT | FEW,
}


def parse_arguments():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS))
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results/bench/memory")
  return parser.parse_args()


def parts_of(settings, place):
  """Phase and mesh of a run of supervised tuning."""
  config = base.get_config()
  config.compilation_cache = "off"
  config.data.train = "task:addition"
  config.model.update(MODEL)
  config.batch.update(row_length=LENGTH, micro_batch_rows=ROWS)
  config.phases = ("sft",)
  config.sft = dict(kind="sft", steps=9, objective=[dict(name="cross_entropy")])
  configs.override(config, settings)
  return builders.build_parts(config, pathlib.Path(place), print)


def batch_of(rows, mesh):
  """Rows that are full of random tokens."""
  rng = np.random.default_rng(0)
  mask = np.arange(LENGTH) > 0
  found = [Trajectory(tokens=rng.integers(0, MODEL["vocab_size"], LENGTH), loss_mask=mask, group=i)
           for i in range(ROWS)]
  host = pack(found, row_length=LENGTH, rows_multiple=rows)
  return sharding.put_batch(to_micro_batches(host, rows), mesh)


def measured(settings):
  """Bytes of an update in one program, as on an accelerator."""
  with tempfile.TemporaryDirectory() as place:
    parts = parts_of(settings, place)
  phase, = parts.phases
  learning = dataclasses.replace(phase.learning, streams=1)
  rng = jax.random.key_data(jax.random.key(0))
  state = builders.start_state(parts, phase, states.initial_parameters(parts.decoder, rng, parts.mesh), rng)
  learner = make_learner(learning, jax.tree.map(lambda x: x.sharding, state))
  found = dict(parameters=sharding.bytes_of(state.params), optimizer=sharding.bytes_of(state.opt_state),
               optimizer_on_host=sharding.bytes_of(state.opt_state, on_host=True),
               gradient=phase_lib.gradient_bytes(learning, state))
  with jax.set_mesh(parts.mesh):
    state, batch, _ = learner.prepare(state, batch_of(phase.settings.batch.micro_batch_rows, parts.mesh))
    memory = learner.update.lower(state, batch).compile().memory_analysis()
    found["temporary"] = memory.temp_size_in_bytes
    fetched = (found["gradient"] + found["optimizer_on_host"]) * (found["optimizer_on_host"] > 0)
    found["peak"] = found["parameters"] + found["optimizer"] + max(found["temporary"], fetched)
  parts.scorer.close()
  return found


def table(content):
  lines = ["# What the levers of memory save", "",
           f"Made by `python scripts/bench/memory.py` on {content['machine']}, {content['date']}: one "
           f"supervised update of {ROWS} rows of {LENGTH} tokens, {content['parameters'] / 1e6:.1f} M "
           f"parameters in scanned layers, vocabulary {MODEL['vocab_size']}, computed in float32.", "",
           "MB. Temporary bytes are those of XLA for CPUs, the gradient among them; it makes float32 copies "
           "of bfloat16 parameters, which accelerators need not. An offloaded optimiser is on the device "
           "while it is updated, beside the gradient: the peak is at least that. On a CPU host and device are one "
           "memory, so an offload saves nothing there.", "",
           "| lever | parameters | optimiser | on the host | temporary | peak on the device |",
           "| --- | --- | --- | --- | --- | --- |"]
  for row in content["rows"]:
    sizes = [row[name] / 1e6 for name in BYTES]
    lines.append(f"| {row['lever']} | " + " | ".join(f"{size:.0f}" for size in sizes) + " |")
  return "\n".join(lines) + "\n"


def main():
  arguments = parse_arguments()
  content = dict(machine=machine.name(), date=time.strftime("%Y-%m-%d"), model=MODEL,
                 rows_of_tokens=[ROWS, LENGTH], rows=[])
  for lever in arguments.levers:
    found = measured(LEVERS[lever])
    content["parameters"] = found["gradient"] // 4
    content["rows"].append(dict(lever=lever, settings=LEVERS[lever], **found))
    print(lever, json.dumps(found), flush=True)
    jax.clear_caches()
    arguments.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(content))


if __name__ == "__main__":
  main()
