"""What adapters save and cost: memory of an update, and time of sampling.

  python scripts/bench/adapters.py          # results/bench/adapters.json

Memory is that of the compiled GRPO update with a KL to the reference, in float32 with AdamW, of a decoder of
30 M parameters: arguments, results and what is between. Sampling is timed with the matrices of the adapters
beside the model's, as it is done, and with a model into which they were merged before.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from configs import quickstart  # noqa: E402
from jaxrl import sharding  # noqa: E402
from jaxrl.models import adapters  # noqa: E402
from jaxrl.sampling import Request, Sampler, SamplingParams  # noqa: E402
from jaxrl.training import builders, state  # noqa: E402
from jaxrl.training.learner import make_learner, to_micro_batches  # noqa: E402

MODEL = dict(layers=8, d_model=512, heads=8, kv_heads=4, d_ff=1536, vocab_size=8192)
ADAPTER = dict(default=dict(rank=8, alpha=16.0))


def parse_arguments():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results/bench/adapters.json")
  parser.add_argument("--rounds", type=int, default=5, help="of sampling, in turn")
  return parser.parse_args()


def parts_of(model, place):
  """The parts of a run of GRPO."""
  config = quickstart.get_config()
  config.compilation_cache = "off"
  config.model.update(MODEL)
  config.model.adapters = model
  config.optimizer.warmup_steps = 0
  config.objective = [dict(name="clipped_surrogate"), dict(name="kl", beta=0.01)]
  config.batch.update(micro_batch_rows=8)
  return builders.build_parts(config, pathlib.Path(place), print)


def memory(parts):
  """Bytes of the state of the GRPO phase, and of its update."""
  phase = next(phase for phase in parts.phases if phase.kind == "rl")
  abstract, shape = builders.abstract_state(parts, phase), parts.shapes[phase.name]
  learner = make_learner(dataclasses.replace(phase.learning, streams=1),
                         jax.tree.map(lambda x: x.sharding, abstract))
  batch = to_micro_batches(shape.pack([]), shape.micro_batch_rows)
  batch = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch,
                       sharding.batch_sharding(parts.mesh)(batch))
  with jax.set_mesh(parts.mesh):
    signals = learner.signals.trace(abstract, batch).out_info[0]
    lowered = learner.update.lower(abstract, batch.with_signals(**signals))
  began = time.process_time()
  found = lowered.compile()
  seconds, used = time.process_time() - began, found.memory_analysis()
  return dict(parameters=sharding.bytes_of(abstract.params), optimizer=sharding.bytes_of(abstract.opt_state),
              reference=sharding.bytes_of(abstract.frozen), compile_cpu_seconds=seconds,
              update=used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
              + used.temp_size_in_bytes)


def sampling(parts, rounds):
  """Median seconds for 16 prompts x 8 samples of 32 tokens: beside the matrices, merged, and to merge."""
  mesh = sharding.make_mesh(1, 1, 1)
  params = state.initial_parameters(parts.decoder, jax.random.key_data(jax.random.key(0)), mesh)
  plain = dataclasses.replace(parts.decoder, adapters=())
  merge = jax.jit(lambda params: adapters.merged(params, parts.decoder.adapters))
  requests = [Request(tuple(range(4, 36)), 8, (i,), SamplingParams(max_tokens=32)) for i in range(16)]
  both, seconds = (Sampler(parts.decoder), Sampler(plain)), dict(beside=[], merged=[], merge=[])
  for _ in range(rounds + 1):
    began = time.perf_counter()
    merged = jax.block_until_ready(merge(params))
    seconds["merge"].append(time.perf_counter() - began)
    for name, sampler, own in zip(("beside", "merged"), both, (params, merged)):
      began = time.perf_counter()
      sampler.sample(own["params"], requests, jax.random.key(0))
      seconds[name].append(time.perf_counter() - began)
  return {name: float(np.median(values[1:])) for name, values in seconds.items()}


def main():
  arguments, found = parse_arguments(), {}
  for name, model in (("whole", {}), ("adapters", ADAPTER)):
    with tempfile.TemporaryDirectory() as place:
      parts = parts_of(model, place)
      found[name] = memory(parts)
      parts.scorer.close()
      print(name, json.dumps(found[name]), flush=True)
  found["sampling"] = sampling(parts, arguments.rounds)
  print("sampling", json.dumps(found["sampling"]))
  arguments.out.write_text(json.dumps({"model": MODEL, "adapter": ADAPTER, **found}, indent=1) + "\n")


if __name__ == "__main__":
  main()
