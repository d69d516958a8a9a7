"""Bytes and FLOPs of traced programs, from what their compiler says."""

from collections.abc import Sequence
import dataclasses
import re

import jax

from jaxrl.planning import flops

UNITS = {"": 1, "K": 2 ** 10, "M": 2 ** 20, "G": 2 ** 30, "T": 2 ** 40}
NEEDED = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\)")  # what the TPU compiler says that it cannot have
CHEAP = {"xla_backend_optimization_level": 0}  # of machine code, which never runs


@dataclasses.dataclass(frozen=True)
class Program:
  """What running a program takes.

  Attributes:
    added: bytes on one device beside those of its arguments: temporary ones, and results that take no
      argument's place.
    flops: over all devices.
    refused: its compiler found that it does not fit the memory; `added` is then what it asked for.
  """

  added: float
  flops: float
  refused: bool = False


def measure(traced: Sequence[jax.stages.Traced], *, trips: float, streams: int = 1) -> Program:
  """What a call takes whose work is done by some programs.

  Args:
    traced: as `streams.trace`: what `streams` threads run at the same time, if they are several, and
      what puts their results together.
    trips: runs of the body of a loop whose length the programs compute, over all threads.
  """
  found = [_compiled(program) for program in traced]
  *parts, (last, _) = found
  return Program(last + streams * sum(added for added, _ in parts),
                 sum(flops.count(program, dynamic_trips=trips) for program in traced),
                 any(refused for _, refused in found))


def _compiled(program) -> tuple[float, bool]:
  """Bytes that it adds on one device of the mesh in context, and whether it was refused."""
  lowered, on_cpu = program.lower(), jax.sharding.get_mesh().devices.flat[0].platform == "cpu"
  try:
    memory = lowered.compile(compiler_options=CHEAP if on_cpu else None).memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    if not (needed := NEEDED.search(str(error))):
      raise
    return float(needed[1]) * UNITS[needed[2]], True
  return float(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes), False
