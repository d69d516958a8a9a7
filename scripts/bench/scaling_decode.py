"""Bounds of sampling, and what it costs to sample on other devices than those that train.

A decoding step reads all weights once, and the cache of every row; both bound the tokens per
second. Asynchronous training samples with weights that are one update old on devices of its own;
they need the new weights once per update.
"""

import dataclasses

from jaxrl import chips
import scaling_model as model


@dataclasses.dataclass(frozen=True)
class Decoding:
  """A decoding step of `rows` rows on `tensor` devices.

  Attributes:
    seconds: of a step.
    tokens_per_second: per device.
    weight_bytes, cache_bytes: read per token and device.
    bound: `HBM (weights)`, `HBM (cache)`, `compute` or `interconnect`.
    fits: weights and cache fit the memory.
  """

  rows: int
  tensor: int
  seconds: float
  tokens_per_second: float
  weight_bytes: float
  cache_bytes: float
  bound: str
  fits: bool


def decoding(shape: model.Shape, machine: chips.Machine, rows: int, tensor: int, context: int,
             shared: int = 0, samples: int = 1) -> Decoding:
  """Roofline of a step, with weights and cache in bfloat16.

  Args:
    rows: samples on one copy of the weights.
    context: tokens that each row attends to, on average.
    shared: tokens of them that belong to the prompt and are stored and read once for its samples.
    samples: of each prompt.
  """
  weights = 2 * shape.products / tensor
  tokens = rows * (context - shared) + -(-rows // samples) * shared
  cache = tokens * shape.cache_bytes / tensor
  flops = rows * (2 * shape.products + 4 * context * shape.heads * shape.width * shape.layers)
  reduced = machine.collective_seconds("all-reduce", 2 * rows * shape.d_model, list(range(tensor)))
  parts = {"HBM (weights)": weights / machine.hbm_rate, "HBM (cache)": cache / machine.hbm_rate,
           "compute": flops / tensor / machine.flops, "interconnect": 2 * shape.layers * reduced}
  memory = parts["HBM (weights)"] + parts["HBM (cache)"]
  seconds = max(memory, parts["compute"]) + parts["interconnect"]
  whole = 2 * shape.parameters / tensor + cache
  return Decoding(rows, tensor, seconds, rows / seconds / tensor, weights / rows, cache / rows,
                  max(parts, key=parts.get), whole < 0.9 * machine.hbm_bytes)


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """Sampling of one update.

  Attributes:
    sequences, prompt, response: number of samples, and tokens of each.
    samples: of each prompt, which share its cache.
  """

  sequences: int
  prompt: int
  response: int
  samples: int


def rollout_seconds(shape: model.Shape, machine: chips.Machine, devices: int, work: Rollouts
                    ) -> tuple[float, int]:
  """Least seconds to decode everything, all samples being equally long, and `tensor` of that.

  Samples wait for one another in practice; this is the bound without that.
  """
  found = []
  for tensor in (1, 2, 4, 8):
    copies = max(devices // tensor, 1)
    rows = -(-work.sequences // copies)
    for waves in (1, 2, 4, 8, 16, 32, 64):
      step = decoding(shape, machine, -(-rows // waves), tensor,
                      work.prompt + work.response // 2, work.prompt, work.samples)
      if step.fits and tensor <= devices:
        found.append((waves * work.response * step.seconds, tensor))
  return min(found, default=(float("inf"), 0))


def transfer_seconds(shape: model.Shape, machine: chips.Machine, trainers: int, samplers: int,
                     tensor: int) -> float:
  """Moving new weights, in bfloat16, from `trainers` devices to every copy on other `samplers`.

  One copy goes from all trainers to as many samplers, each its own part, over the network between
  hosts; the copies then gather it from one another.
  """
  whole = 2 * shape.parameters
  across = whole / ((machine.network_rate or machine.link_rate) * min(trainers, samplers))
  copies = list(range(0, samplers, tensor))
  return across + machine.collective_seconds("all-gather", whole / tensor, copies)
