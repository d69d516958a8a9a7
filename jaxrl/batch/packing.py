"""Trajectories packed into the rows of a batch, their prompts once each, and back."""

from collections.abc import Mapping, Sequence
import dataclasses

import jax
import numpy as np

from jaxrl.batch.token_batch import PADDING
from jaxrl.batch.token_batch import TokenBatch
from jaxrl.batch.token_batch import Trajectory


def bucket(size: int, minimum: int = 1) -> int:
  """The smallest power of two that is at least `size` and `minimum`."""
  return 1 << max(size - 1, minimum - 1, 0).bit_length()


def _bundles(trajectories: Sequence[Trajectory], together: bool) -> list[list[int]]:
  """Items that share a row, or the rows of a trunk: those of a group, or each by itself."""
  if not together:
    return [[item] for item in range(len(trajectories))]
  groups = {}
  for item, t in enumerate(trajectories):
    groups.setdefault(t.group, []).append(item)
  return list(groups.values())


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """Assigns items to bins of equal capacity: longest first, each into the first bin with room."""
  room, row_of = _place(dict(enumerate(lengths)), [], capacity, len(lengths))
  bins = [[] for _ in room]
  for item, row in row_of.items():
    bins[row].append(item)
  return bins


def _place(sizes: Mapping[int, int], room: Sequence[int], capacity: int, most: int
           ) -> tuple[list[int], dict[int, int]] | None:
  """Puts items into rows with some room, longest first, or into new ones, of which there are `most` with those.

  Returns:
    Room in all rows then, and the row of each item, in the order of placing; None if they do not fit.
  """
  room, row_of = list(room), {}
  for item in sorted(sizes, key=lambda i: (-sizes[i], i)):
    row = next((row for row, left in enumerate(room) if sizes[item] <= left), len(room))
    if row == most:
      return None
    room += [capacity] * (row == len(room))
    room[row] -= sizes[item]
    row_of[item] = row
  return room, row_of


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where sequences go.

  Attributes:
    row_length: tokens of a row.
    trunk_length: tokens of a trunk, 0 for none.
    rows_per_trunk: neighbouring rows that share one.
  """

  row_length: int
  trunk_length: int = 0
  rows_per_trunk: int = 1


def shared_length(trajectories: Sequence[Trajectory]) -> int:
  """Tokens that all sequences of a group begin with, before anything in one of them is in its mask."""
  first, *others = (t.tokens for t in trajectories)
  count = min(int(t.loss_mask.argmax()) if t.loss_mask.any() else len(t.tokens) for t in trajectories)
  for tokens in others:
    differs = tokens[:count] != first[:count]
    count = int(differs.argmax()) if differs.any() else count
  return count


def prompt_length(trajectory: Trajectory) -> int:
  """Tokens before the first one that is trained on, all of them if none is."""
  mask = trajectory.loss_mask & trajectory.scored
  return int(mask.argmax()) if mask.any() else len(mask)


def pack(trajectories: Sequence[Trajectory], *, row_length: int = 0, trunk_length: int = 0,
         rows_per_trunk: int = 1, rows_multiple: int = 1, min_rows: int = 1,
         min_sequences: int = 1, together: bool = False, longest: int = 0) -> TokenBatch:
  """Packs trajectories into a batch of NumPy arrays whose shape comes from few buckets.

  Args:
    trajectories: in the order of the per-sequence arrays; may be empty.
    row_length: row length wanted; a longer sequence raises it to its power of two.
    trunk_length: more than 0 puts prompts, up to the first token that is trained on, into trunks,
      one for all sequences that begin with it; a longer prompt raises it to its power of two.
    rows_per_trunk: rows that share a trunk; a prompt that needs more gets another trunk.
    rows_multiple: the row count is a power of two times this (micro-batch rows x devices).
    min_rows: smallest row count, to keep several batches in one bucket.
    min_sequences: smallest length of the per-sequence arrays, likewise.
    together: the sequences of a group share a row, or the rows of one trunk, so that a loss may compare
      them in any split into micro-batches; a group that does not fit raises the row length to the power of
      two in which it does. The trunk of a group is what all of its sequences begin with, and unscored ones
      are stored too.
    longest: of the batch, unless a sequence is longer.

  Raises:
    ValueError: when trajectories disagree on the keys of `columns` or `signals`, or rows_multiple would
      tear the rows of a trunk apart.
  """
  if rows_multiple % rows_per_trunk:
    raise ValueError(f"rows_multiple={rows_multiple} is no multiple of rows_per_trunk="
                     f"{rows_per_trunk}, which belong together")
  whole = _bundles(trajectories, together)
  heads = [0] * len(trajectories)
  for items in whole if trunk_length else ():
    shared = [trajectories[item] for item in items]
    head = shared_length(shared) if together else prompt_length(shared[0])
    for item in items:
      heads[item] = head
  sizes = [len(t.tokens) - head for t, head in zip(trajectories, heads)]
  length = _row_length(row_length, [{i: sizes[i] for i in items} for items in whole],
                       rows_per_trunk if trunk_length else 1)
  deepest = max((head for t, head in zip(trajectories, heads) if head < len(t.tokens)), default=0)
  trunk_length = trunk_length if trunk_length >= deepest else bucket(deepest)
  if trunk_length:
    bins, prompts = _with_trunks(trajectories, heads, whole, Layout(length, trunk_length, rows_per_trunk))
  else:
    bins, prompts = [[item for bundle in row for item in whole[bundle]] for row in first_fit_decreasing(
        [sum(sizes[item] for item in items) for items in whole], length)], []
  rows = rows_multiple * bucket(-(-max(len(bins), min_rows) // rows_multiple))
  batch = _empty(rows, length, rows // rows_per_trunk, trunk_length,
                 bucket(len(trajectories), min_sequences), _common_keys(trajectories, "signals"),
                 _common_keys(trajectories, "columns"))
  for trunk, prompt in enumerate(prompts):
    batch.trunk_tokens[trunk, :len(prompt)] = prompt
    batch.trunk_lengths[trunk] = len(prompt)
  for row, items in enumerate(bins):
    start = 0
    for item in sorted(items, key=lambda i: -sizes[i]):
      t, head = trajectories[item], heads[item]
      at = (row, slice(start, start + len(t.tokens) - head))
      batch.tokens[at] = t.tokens[head:]
      batch.positions[at] = np.arange(head, len(t.tokens))
      batch.segment_ids[at] = item + 1
      batch.sequence_ids[at] = item
      batch.loss_mask[at] = (t.loss_mask & t.scored)[head:]
      batch.behaviour_logprobs[at] = t.behaviour_logprobs[head:]
      batch.turn_ids[at] = t.turn_ids[head:]
      batch.tag_ids[at] = t.tag_ids[head:]
      for name, array in batch.signals.items():
        array[at] = t.signals[name][head:]
      start += len(t.tokens) - head
  groups = {}
  for item, t in enumerate(trajectories):
    batch.rewards[item] = t.reward if t.scored else 0.0
    batch.weights[item] = t.weight
    batch.group_ids[item] = groups.setdefault(t.group, len(groups))
    batch.sequence_mask[item] = t.scored
    for name, array in batch.columns.items():
      array[item] = t.columns[name]
  return batch.replace(longest=longest if all(len(t.tokens) <= longest for t in trajectories) else 0)


def _row_length(wanted, bundles, rows):
  """The length wanted, or the least power of two, at which every bundle of sizes fits into so many rows."""
  longest = max((size for sizes in bundles for size in sizes.values()), default=0)

  def fits(length):
    return length >= max(longest, 1) and all(_place(sizes, [], length, rows) for sizes in bundles)
  length = wanted if fits(wanted) else bucket(longest)
  while not fits(length):
    length *= 2
  return length


def _empty(rows, length, trunks, trunk_length, sequences, signals, columns):
  """A host batch of padding only."""
  def tokens_of(dtype, fill=0):
    return np.full((rows, length), fill, dtype)

  return TokenBatch(
      tokens=tokens_of(np.int32), positions=tokens_of(np.int32), segment_ids=tokens_of(np.int32),
      sequence_ids=tokens_of(np.int32, PADDING), loss_mask=tokens_of(bool),
      behaviour_logprobs=tokens_of(np.float32), turn_ids=tokens_of(np.int32),
      tag_ids=tokens_of(np.int32), rewards=np.zeros(sequences, np.float32),
      weights=np.zeros(sequences, np.float32), group_ids=np.full(sequences, PADDING, np.int32),
      sequence_mask=np.zeros(sequences, bool),
      trunk_tokens=np.zeros((trunks, trunk_length), np.int32),
      trunk_lengths=np.zeros(trunks, np.int32),
      signals={k: tokens_of(np.float32) for k in signals},
      columns={k: np.zeros(sequences, np.float32) for k in columns})


def _with_trunks(trajectories, heads, bundles, layout: Layout) -> tuple[list[list[int]], list[np.ndarray]]:
  """Items of every row, and the prompt of every trunk, `rows_per_trunk` rows each."""
  by_prompt: dict[bytes, list[list[int]]] = {}
  capacity = layout.row_length, layout.rows_per_trunk
  for items in bundles:
    t, head = trajectories[items[0]], heads[items[0]]
    if any(head < len(trajectories[item].tokens) for item in items):
      by_prompt.setdefault(t.tokens[:head].tobytes(), []).append(items)
  bins, prompts = [], []
  for members in by_prompt.values():
    units = []  # room in the rows of each, and their items
    sizes = [{i: len(trajectories[i].tokens) - heads[i] for i in items} for items in members]
    for of_items in sorted(sizes, key=lambda of_items: -sum(of_items.values())):
      for room, rows in units:
        if placed := _place(of_items, room, *capacity):
          break
      else:
        room, rows = [], [[] for _ in range(layout.rows_per_trunk)]
        units.append((room, rows))
        placed = _place(of_items, room, *capacity)
      room[:], row_of = placed
      for item in of_items:
        rows[row_of[item]].append(item)
    first = members[0][0]
    for _, rows in units:
      bins += rows
      prompts.append(trajectories[first].tokens[:heads[first]])
  return bins, prompts


def unpack(batch: TokenBatch) -> list[Trajectory]:
  """The trajectories of a host batch in their order, without what `pack` does not carry.

  `loss_mask` and `reward` of an unscored trajectory come back as False and 0. A sequence that has
  nothing to train on is not stored beside its trunk and comes back empty, and what a trajectory
  knows of its prompt's tokens, the tokens aside, comes back as 0 where prompts are shared.
  """
  batch = jax.tree.map(np.asarray, batch)
  trajectories = []
  for item in range(int((batch.group_ids != PADDING).sum())):
    at = np.nonzero(batch.sequence_ids == item)  # row-major, so in order of position
    prompt = batch.tokens[:0, 0]
    if batch.trunk_tokens.shape[1] and len(at[0]):
      trunk = at[0][0] // batch.rows_per_trunk
      prompt = batch.trunk_tokens[trunk, :batch.trunk_lengths[trunk]]

    def whole(array):
      return np.concatenate([np.zeros(len(prompt), array.dtype), array[at]])

    trajectories.append(Trajectory(
        tokens=np.concatenate([prompt, batch.tokens[at]]), loss_mask=whole(batch.loss_mask),
        behaviour_logprobs=whole(batch.behaviour_logprobs), turn_ids=whole(batch.turn_ids),
        tag_ids=whole(batch.tag_ids), group=int(batch.group_ids[item]),
        reward=float(batch.rewards[item]), scored=bool(batch.sequence_mask[item]),
        weight=float(batch.weights[item]),
        columns={k: float(v[item]) for k, v in batch.columns.items()},
        signals={k: whole(v) for k, v in batch.signals.items()}))
  return trajectories


def _common_keys(trajectories, field):
  keys = [tuple(sorted(getattr(t, field))) for t in trajectories]
  for t, k in zip(trajectories, keys):
    if k != keys[0]:
      raise ValueError(f"cannot pack trajectories with different {field}: task "
                       f"{trajectories[0].task_id!r} has {list(keys[0])}, task {t.task_id!r} has "
                       f"{list(k)}")
  return keys[0] if keys else ()
