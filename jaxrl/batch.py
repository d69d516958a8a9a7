"""From tasks to device batches: `Task` (host) -> `Trajectory` (host) -> `TokenBatch` (device).

Every per-token array is indexed by the token it is *about*: `behaviour_logprobs[t]` and
`loss_mask[t]` speak of `tokens[t]`, and so does every log-probability a model returns. Nothing else
in jaxrl shifts by one.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

PREFERENCE = "preference"  # the column that says which sequence of a pair is the better one
TUPLE, STRONGER = "tuple", "stronger"  # columns that say which pairs are compared, and which is the stronger
PADDING = -1  # sequence and group id of padding: out of range, so segment sums drop it
CRITIQUE = -1  # tag of tokens behind an answer that speak about it, which its scores do not see


@dataclasses.dataclass(frozen=True)
class Task:
  """One problem, ready for sampling. `row` keeps every field of its source."""

  id: str
  prompt: list[int]  # token ids; contexts are never re-tokenised text
  question: str = ""
  answer: str = ""  # the reference that verifiers compare with
  solution: str = ""  # the text to imitate in supervised tuning; holds the answer
  reply: list[int] = dataclasses.field(default_factory=list)  # its tokens, where a chat template wrote them
  said: list[bool] = dataclasses.field(default_factory=list)  # tokens of the prompt to imitate as well
  row: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Trajectory:
  """One sequence of tokens on the host, with what is known about it.

  Attributes:
    tokens: token ids. [length]
    loss_mask: tokens that are trained on; never the first, which nothing predicts. [length]
    behaviour_logprobs: log-probability of each token when it was sampled, 0 elsewhere. [length]
    turn_ids: turn of a conversation that each token belongs to, 0 where there is one turn. [length]
    tag_ids: free segment labels (thought, answer, step, ...), 0 where unused. [length]
    group: sequences with equal `group` are compared with one another; any integer.
    reward: one scalar; meaningless unless `scored`.
    scored: False takes the sequence out of group statistics and of every loss.
    weight: multiplies the loss of this sequence.
    columns: more scalars per sequence, the same keys in every trajectory of a batch.
    signals: more arrays per token, the same keys in every trajectory of a batch. [length]
    task_id, prompt_length, text, finish: where it came from and how it ended (`stop` or `length`).
    evidence: named criteria behind the reward.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray
  behaviour_logprobs: np.ndarray | None = None
  turn_ids: np.ndarray | None = None
  tag_ids: np.ndarray | None = None
  group: int = 0
  reward: float = 0.0
  scored: bool = True
  weight: float = 1.0
  columns: dict[str, float] = dataclasses.field(default_factory=dict)
  signals: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  task_id: str = ""
  prompt_length: int = 0
  text: str = ""
  finish: str = ""
  evidence: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self.tokens = np.asarray(self.tokens, np.int32)
    length = self.tokens.shape[0]

    def per_token(name, value, dtype):
      value = np.zeros(length, dtype) if value is None else np.asarray(value, dtype)
      if value.shape != (length,):
        raise ValueError(f"trajectory of task {self.task_id!r}: {name} has shape {value.shape}, "
                         f"but there are {length} tokens")
      return value

    self.loss_mask = per_token("loss_mask", self.loss_mask, bool)
    self.behaviour_logprobs = per_token("behaviour_logprobs", self.behaviour_logprobs, np.float32)
    self.turn_ids = per_token("turn_ids", self.turn_ids, np.int32)
    self.tag_ids = per_token("tag_ids", self.tag_ids, np.int32)
    self.signals = {k: per_token(f"signals[{k!r}]", v, np.float32) for k, v in self.signals.items()}
    if length and self.loss_mask[0]:
      raise ValueError(f"trajectory of task {self.task_id!r}: loss_mask[0] is True, but nothing "
                       "predicts the first token; start the prompt with a BOS token")


@flax.struct.dataclass
class TokenBatch:
  """Sequences of any kind, packed into rows. Padding has segment 0 and sequence -1.

  Sequences with the same prompt may share one copy of it: then rows hold what follows the prompt,
  and all tokens of `rows / trunks` neighbouring rows also see the tokens of their trunk. Nothing
  is trained on in a trunk, so losses and credit need not know of it.

  Attributes, per token:
    tokens, positions: token id and its index within its segment.
    segment_ids: attention boundary, 0 for padding, unique over the batch.
    sequence_ids: index into the per-sequence arrays.
    loss_mask, behaviour_logprobs, turn_ids, tag_ids: as in `Trajectory`.
    signals: more arrays per token (`reference_logprobs`, `advantages`, ...).
  Attributes, per sequence:
    rewards, weights: as in `Trajectory`.
    group_ids: index of the group, counted from 0 over the batch; -1 for padding.
    sequence_mask: real and scored.
    columns: more scalars per sequence.
  Attributes, per trunk:
    trunk_tokens: a prompt, padded at its end; of length 0 where rows hold whole sequences.
    trunk_lengths: tokens of it.
  Static:
    micro_batch_rows: rows of each micro-batch that the batch is interleaved for (see
      `training.learner.to_micro_batches`); 0 is all rows, in order.
    longest: tokens that no sequence has more of, beyond which attention need not look; 0 if unknown.

  The sequences of a row fill it from its first token on, in falling order of their lengths.
  """

  tokens: Int[Array, "rows length"]
  positions: Int[Array, "rows length"]
  segment_ids: Int[Array, "rows length"]
  sequence_ids: Int[Array, "rows length"]
  loss_mask: Bool[Array, "rows length"]
  behaviour_logprobs: Float[Array, "rows length"]
  turn_ids: Int[Array, "rows length"]
  tag_ids: Int[Array, "rows length"]
  rewards: Float[Array, "sequences"]
  weights: Float[Array, "sequences"]
  group_ids: Int[Array, "sequences"]
  sequence_mask: Bool[Array, "sequences"]
  trunk_tokens: Int[Array, "trunks trunk_length"]
  trunk_lengths: Int[Array, "trunks"]
  signals: dict[str, Float[Array, "rows length"]] = flax.struct.field(default_factory=dict)
  columns: dict[str, Float[Array, "sequences"]] = flax.struct.field(default_factory=dict)
  micro_batch_rows: int = flax.struct.field(pytree_node=False, default=0)
  longest: int = flax.struct.field(pytree_node=False, default=0)

  @property
  def num_sequences(self) -> int:
    """Length of the per-sequence arrays, padding included (static)."""
    return self.rewards.shape[0]

  @property
  def rows_per_trunk(self) -> int:
    """Neighbouring rows that share a trunk (static)."""
    return self.tokens.shape[0] // max(self.trunk_lengths.shape[0], 1)

  def with_signals(self, **signals) -> "TokenBatch":
    """The batch with more arrays per token, or others of the same names."""
    return self.replace(signals={**self.signals, **signals})


PER_TOKEN = ("tokens", "positions", "segment_ids", "sequence_ids", "loss_mask",
             "behaviour_logprobs", "turn_ids", "tag_ids", "signals")
BY_ROWS = (*PER_TOKEN, "trunk_tokens", "trunk_lengths")  # distributed over devices


@flax.struct.dataclass
class ModelOutputs:
  """What a model says about the tokens of a batch; fields that nobody asked for are None."""

  logprobs: Float[Array, "rows length"] | None = None  # of tokens[t], 0 where nothing predicts it
  entropy: Float[Array, "rows length"] | None = None  # of the distribution that tokens[t] is from
  hidden: Float[Array, "rows length width"] | None = None  # final hidden state at tokens[t]
  # Those of other layers, by the name of the signal: `hidden@3`.
  layers: dict[str, Float[Array, "rows length width"]] = flax.struct.field(default_factory=dict)
  values: Float[Array, "rows length"] | None = None  # value of the state before tokens[t]
  action_values: Float[Array, "rows length"] | None = None  # the same head, read at tokens[t]
  scores: Float[Array, "rows length heads"] | None = None  # scalar heads read at tokens[t]
  yes_logprobs: Float[Array, "rows length"] | None = None  # of config.model.verdict, after tokens[t]
  # Of the distribution that tokens[t] is from, by name: see `models.distributions`.
  distribution: dict[str, Float[Array, "rows length"]] = flax.struct.field(default_factory=dict)

  def get(self, name: str) -> Float[Array, "rows length ..."] | None:
    """A signal by name, None if nobody asked for it."""
    return (self.layers | self.distribution).get(name, getattr(self, name, None))


# ---------------------------------------------------------------------------------------- packing


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


# --------------------------------------------------------------------------------- segment helpers


def sum_by_sequence(batch: TokenBatch, values: Float[Array, "rows length"]
                    ) -> Float[Array, "sequences"]:
  """Sum of a per-token array over the tokens of each sequence (mask it first); empty gives 0."""
  return jax.ops.segment_sum(values.reshape(-1), batch.sequence_ids.reshape(-1),
                             num_segments=batch.num_sequences)


def mean_by_sequence(batch: TokenBatch, values: Float[Array, "rows length"]
                     ) -> Float[Array, "sequences"]:
  """Mean over the loss tokens of each sequence; a sequence without any gives 0."""
  mask = batch.loss_mask.astype(values.dtype)
  total = sum_by_sequence(batch, jnp.where(batch.loss_mask, values, 0))
  return total / jnp.maximum(sum_by_sequence(batch, mask), 1)


def to_tokens(batch: TokenBatch, values: Float[Array, "sequences"]) -> Float[Array, "rows length"]:
  """The value of each token's sequence, 0 on padding."""
  real = batch.sequence_ids != PADDING
  return jnp.where(real, values[jnp.where(real, batch.sequence_ids, 0)], 0)


def at_last_tokens(batch: TokenBatch, values: Float[Array, "sequences"]
                   ) -> Float[Array, "rows length"]:
  """The value of a sequence at its last loss token, 0 elsewhere."""
  position = jnp.where(batch.loss_mask, batch.positions, -1)
  last = jax.ops.segment_max(position.reshape(-1), batch.sequence_ids.reshape(-1),
                             num_segments=batch.num_sequences)
  is_last = batch.loss_mask & (batch.positions == to_tokens(batch, last))
  return jnp.where(is_last, to_tokens(batch, values), 0)


def _by_group(batch, reduced):
  """Value of its group at each scored sequence, 0 elsewhere. [groups] -> [sequences]"""
  return jnp.where(batch.sequence_mask, reduced[jnp.maximum(batch.group_ids, 0)], 0)


def _scored_groups(batch):
  return jnp.where(batch.sequence_mask, batch.group_ids, PADDING)


def sum_by_group(batch: TokenBatch, values: Float[Array, "sequences"]) -> Float[Array, "sequences"]:
  """At each scored sequence, the sum over the scored sequences of its group; 0 elsewhere."""
  return _by_group(batch, jax.ops.segment_sum(
      jnp.where(batch.sequence_mask, values, 0), _scored_groups(batch),
      num_segments=batch.num_sequences))


def count_by_group(batch: TokenBatch) -> Float[Array, "sequences"]:
  """At each scored sequence, the number of scored sequences in its group; 0 elsewhere."""
  return sum_by_group(batch, jnp.ones_like(batch.rewards))


def mean_by_group(batch: TokenBatch, values: Float[Array, "sequences"],
                  weights: Float[Array, "sequences"] | None = None) -> Float[Array, "sequences"]:
  """At each scored sequence, the mean over the scored sequences of its group; 0 elsewhere.

  A group whose values are all equal has exactly that value as its mean. With `weights`, none below
  0, each sequence counts as so many.
  """
  # Summing differences keeps what rounding would take from small differences of large values.
  origin = jax.lax.stop_gradient(max_by_group(batch, values))
  weights = jnp.ones_like(batch.rewards) if weights is None else weights
  total, count = sum_by_group(batch, weights * (values - origin)), sum_by_group(batch, weights)
  return origin + total / jnp.where(count > 0, count, 1)


def deviation_by_group(batch: TokenBatch, values: Float[Array, "sequences"],
                       weights: Float[Array, "sequences"] | None = None
                       ) -> Float[Array, "sequences"]:
  """At each scored sequence, its value minus the mean of its group; 0 elsewhere.

  Exactly 0 in a group whose values are all equal, singletons included. Weights as in
  `mean_by_group`.
  """
  origin = jax.lax.stop_gradient(max_by_group(batch, values))
  shifted = jnp.where(batch.sequence_mask, values - origin, 0)
  return shifted - mean_by_group(batch, shifted, weights)


def max_by_group(batch: TokenBatch, values: Float[Array, "sequences"]) -> Float[Array, "sequences"]:
  """At each scored sequence, the maximum over the scored sequences of its group; 0 elsewhere."""
  return _by_group(batch, jax.ops.segment_max(
      jnp.where(batch.sequence_mask, values, -jnp.inf), _scored_groups(batch),
      num_segments=batch.num_sequences))


def min_by_group(batch: TokenBatch, values: Float[Array, "sequences"]) -> Float[Array, "sequences"]:
  """At each scored sequence, the minimum over the scored sequences of its group; 0 elsewhere."""
  return -max_by_group(batch, -values)


def std_by_group(batch: TokenBatch, values: Float[Array, "sequences"],
                 weights: Float[Array, "sequences"] | None = None, *, ddof: int = 0
                 ) -> Float[Array, "sequences"]:
  """At each scored sequence, the standard deviation of its group; 0 elsewhere.

  Groups with one value only give exactly 0, singletons with `ddof=1` too. Weights as in
  `mean_by_group`.
  """
  weights = jnp.ones_like(batch.rewards) if weights is None else weights
  squares = sum_by_group(batch, weights * deviation_by_group(batch, values, weights) ** 2)
  variance = squares / jnp.maximum(sum_by_group(batch, weights) - ddof, 1)
  positive = variance > 0  # the square root has no gradient at 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


def column_of(batch: TokenBatch, name: str | None, reader: str) -> Float[Array, "sequences"] | None:
  """A column that a piece was told to read; None if it was told none.

  Raises:
    ValueError: the batch has no such column; `reader` is who was told.
  """
  if name is None:
    return None
  if name not in batch.columns:
    raise ValueError(f"{reader} reads the column {name!r}, and this batch has "
                     f"{sorted(batch.columns) or 'none'}: an episode or edit supplies it "
                     "(`@compose.supplies(columns=...)`)")
  return batch.columns[name]


def as_one_group(batch: TokenBatch) -> TokenBatch:
  """The batch with all its sequences in one group: `*_by_group` become statistics of the batch."""
  return batch.replace(group_ids=jnp.where(batch.group_ids == PADDING, PADDING, 0))
