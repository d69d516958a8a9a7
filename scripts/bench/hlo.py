"""What a compiled program computes and communicates, counted in its HLO text.

XLA's own cost analysis counts the body of a loop once. Here a computation counts as often as it
runs: layers, vocabulary chunks and micro-batches are loops.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
import re

import numpy as np

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
MOVES = ("copy", "convert", "reshape", "bitcast", "transpose")  # the same values, elsewhere
CALLS = ("to_apply", "calls", "body", "true_computation", "false_computation")
DYNAMIC = "dynamic"  # a loop whose length the program computes


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation: `name = type opcode(operands), rest`."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  rest: str


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective of a program.

  Attributes:
    op: one of `COLLECTIVES`. An all-reduce of which each device keeps its own slice counts as the
      reduce-scatter that TPU and GPU compilers make of it.
    payload: bytes of the whole array, over the group: gathered, before it is scattered, or reduced.
    groups: ids of the devices of the first group.
    times: how often it runs.
    type, source: of the instruction, to find it again.
  """

  op: str
  payload: int
  group: tuple[int, ...]
  times: float
  type: str
  source: str


@dataclasses.dataclass(frozen=True)
class Costs:
  """Of one device, per run of the program.

  Attributes:
    flops: of matrix products, two per multiplication and addition.
    collectives: with more than one device in a group.
  """

  flops: float
  collectives: tuple[Collective, ...]


def costs(text: str, *, dynamic_trips: float = 1.0) -> Costs:
  """Counts a partitioned program.

  Args:
    text: of a scheduled or unscheduled HLO module, as partitioned for one device.
    dynamic_trips: runs of the body of a loop whose length is not a constant of the program.

  Raises:
    ValueError: the text holds no entry computation.
  """
  computations, entry = _parse(text)
  times = collections.Counter()
  for name, count in _runs(computations, entry, dynamic_trips):
    times[name] += count
  flops, found = 0.0, []
  for name, count in times.items():
    computation = computations[name]
    users = _users(computation)
    for instruction in computation.values():
      if instruction.opcode == "dot":
        flops += count * _dot_flops(instruction, computation)
      elif instruction.opcode.removesuffix("-start") in COLLECTIVES:
        found += _collectives(instruction, computation, users, count)
  return Costs(flops, tuple(c for c in found if len(c.group) > 1))


def array_bytes(type_: str) -> int:
  """Bytes of the arrays in an HLO type, all those of a tuple."""
  return sum(BYTES.get(dtype, 0) * math.prod(dims) for dtype, dims in _arrays(type_))


def first_group(rest: str) -> tuple[int, ...]:
  """Devices of the first replica group of a collective's attributes.

  Reads the forms `{{0,1},{2,3}}`, `[groups,size]<=[dims]T(order)` and
  `mesh['a'=2,'b'=4], device_ids=([dims]T(order)) {'b'}`.
  """
  if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
    return int(match[1]), int(match[2])
  if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
    return tuple(map(int, match[1].split(",")))
  if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
    return tuple(_ids(match[3])[:int(match[2])].tolist())
  match = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}",
                    rest)
  if not match:
    return ()
  axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
  size = math.prod(axes.values())
  ids = (_ids(match[2]) if match[2] else np.arange(size)).reshape(tuple(axes.values()))
  kept = re.findall(r"'(\w+)'", match[3])
  return tuple(ids[tuple(slice(None) if name in kept else 0 for name in axes)].reshape(-1).tolist())


def _ids(text):
  """Device ids of an iota such as `[2,8,4]T(2,1,0)`."""
  dims, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  dims = tuple(map(int, dims.split(",")))
  ids = np.arange(math.prod(dims)).reshape(dims)
  return (ids.transpose(tuple(map(int, order.split(",")))) if order else ids).reshape(-1)


# ------------------------------------------------------------------------------------------- text


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif current is not None and (match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)):
      current[match[1]] = _instruction(match[1], match[2])
  if entry is None:
    raise ValueError("no ENTRY computation in the HLO text: pass that of a whole module")
  for computation in computations.values():
    for operand in [o for i in computation.values() for o in i.operands]:
      _add_element(operand, computation)
  return computations, entry


def _add_element(name, computation):
  """Adds the instruction that `%x#1` stands for, as newer versions of XLA write elements of a tuple."""
  source, mark, index = name.rpartition("#")
  if mark and name not in computation:
    _add_element(source, computation)
    element = _members(computation[source].type)[int(index)]
    computation[name] = Instruction(name, element, "get-tuple-element", (source,), f", index={index}")


def _members(type_):
  """Types that a tuple's consists of."""
  found, depth = [""], 0
  for character in type_[1:-1]:
    depth += (character in "([{") - (character in ")]}")
    if character == "," and not depth:
      found.append("")
    else:
      found[-1] += character
  return [member.strip() for member in found]


def _instruction(name, line):
  line = re.sub(r"/\*.*?\*/", "", line)
  end = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
  type_, line = line[:end], line[end:].lstrip()
  start = line.index("(")
  close = _closing(line, start)
  inside, rest = line[start + 1:close], line[close + 1:]
  operands = tuple(re.findall(r"%([\w.\-]+(?:#\d+)*)", inside))
  return Instruction(name, type_, line[:start], operands,
                     inside + rest if line[:start] == "constant" else rest)


def _closing(text, start):
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if depth == 0:
      return i
  raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _arrays(type_) -> list[tuple[str, tuple[int, ...]]]:
  return [(dtype, tuple(int(d) for d in dims.split(",") if d))
          for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", type_)]


# ---------------------------------------------------------------------------------------- counting


def _runs(computations, name, dynamic_trips, times=1.0) -> Iterator[tuple[str, float]]:
  """Every computation that runs under `name`, and how often; one called twice comes twice."""
  yield name, times
  for instruction in computations[name].values():
    if instruction.opcode in (*COLLECTIVES, "reduce", "scatter", "sort", "map", "reduce-window",
                              "select-and-scatter"):
      continue  # these call functions of scalars
    trips = 1.0
    if instruction.opcode == "while":
      trips = _trips(instruction, computations)
      trips = dynamic_trips if trips == DYNAMIC else trips
    for callee in _callees(instruction):
      if callee in computations:
        yield from _runs(computations, callee, dynamic_trips, times * trips)


def _callees(instruction):
  found = [match for key in CALLS
           for match in re.findall(rf"\b{key}=%?([\w.\-]+)", instruction.rest)]
  if branches := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
    found += [name.strip().lstrip("%") for name in branches[1].split(",")]
  return found


def _trips(loop, computations):
  """Runs of a loop that counts up from 0 to a constant; `DYNAMIC` for others."""
  if known := re.search(r'known_trip_count[^\d]*(\d+)', loop.rest):
    return float(known[1])
  condition = computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
  compares = [i for i in condition.values() if i.opcode == "compare"]
  if len(compares) != 1 or "direction=LT" not in compares[0].rest:
    return DYNAMIC
  limit = condition.get(compares[0].operands[1])
  while limit is not None and limit.opcode in MOVES:
    limit = condition.get(limit.operands[0])
  if limit is None or limit.opcode != "constant":
    return DYNAMIC
  return float(re.match(r"-?\d+", limit.rest)[0])


def _dot_flops(dot, computation):
  (_, left), = _arrays(computation[dot.operands[0]].type)
  (_, out), = _arrays(dot.type)
  axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)
  contracted = [left[int(i)] for i in axes[1].split(",") if i] if axes else []
  return 2.0 * math.prod(out) * math.prod(contracted)


def _collectives(instruction, computation, users, times) -> list[Collective]:
  op = instruction.opcode.removesuffix("-start")
  group = first_group(instruction.rest)
  source = re.search(r'op_name="([^"]*)"', instruction.rest)
  found = []
  for operand in instruction.operands:  # one may move several arrays
    local = array_bytes(computation[operand].type)
    payload = local * (len(group) if op in ("all-gather", "all-to-all") else 1)
    kind = op
    if op == "all-reduce" and len(instruction.operands) == 1 and _is_scattered(
        instruction, computation, users, len(group)):
      kind = "reduce-scatter"
    found.append(Collective(kind, payload, group, times, computation[operand].type,
                            source[1] if source else ""))
  return found


def _users(computation: Mapping[str, Instruction]) -> Mapping[str, Sequence[Instruction]]:
  users = collections.defaultdict(list)
  for instruction in computation.values():
    for operand in instruction.operands:
      users[operand].append(instruction)
  return users


def _is_scattered(reduce, computation, users, parts):
  """Whether all that is read of an all-reduce is a slice per device."""
  ahead, slices = list(users[reduce.name]), []
  while ahead:
    user = ahead.pop()
    if user.opcode in MOVES:
      ahead += users[user.name]
    else:
      slices.append(user)
  return bool(slices) and all(
      s.opcode == "dynamic-slice" and _elements(s.type) * parts == _elements(reduce.type)
      for s in slices)


def _elements(type_):
  return sum(math.prod(dims) for _, dims in _arrays(type_))
