"""The shape of a phase's batches, decided before its first: layout, rows at a time, expected size.

Batches are padded up to what is expected from the first, as a batch that is larger than all before
compiles anew. Micro-batches of nothing but padding cost no compute, and what is expected comes from
limits in the config and from a few prompts of the data; a batch that exceeds it is still packed, and
shapes stay larger then.
"""

from collections.abc import Sequence
import dataclasses
import math

import jax
import ml_collections
import numpy as np

from jaxrl import chips
from jaxrl import sharding
from jaxrl.batch import Layout, TokenBatch, Trajectory
from jaxrl.batch import bucket, first_fit_decreasing, pack, prompt_length
from jaxrl.models import DecoderConfig
from jaxrl.models import packed_attention

PAIRED = ("preference", "reward")  # kinds of phases whose sequences are compared within groups
WORTH_SHARING = 0.9  # of the work that whole sequences would take
SEVERAL = 8  # groups, to know how well whole sequences fill rows
MOST_PADDING = 1 << 22  # tokens that a batch is padded to in advance
CPU_BLOCK = 470_000  # activations of a micro-batch, as counted below: they stay in a core's cache
BUSY = 8192  # tokens at a time that keep any device busy
PARTS = 8  # micro-batches of the largest batch, at least, where they are not smaller than that
SMALL, QUARTERS = 256, 4  # tokens of a micro-batch on a CPU, and micro-batches of rows that vary, at least
HALF = 0.5  # of the memory that parameters and optimiser leave, for a micro-batch's activations


@dataclasses.dataclass(frozen=True)
class Shape:
  """What batches of a phase look like.

  Attributes:
    layout: of rows and trunks.
    micro_batch_rows: rows of one forward and backward pass, over all devices.
    rows, sequences: that no batch is likely to exceed.
    together: whether the sequences of a group share a row, or the rows of a trunk.
    longest: of `TokenBatch`.
    prompt: tokens that no prompt of rollouts is likely to exceed.
  """

  layout: Layout
  micro_batch_rows: int
  rows: int = 1
  sequences: int = 1
  together: bool = False
  longest: int = 0
  prompt: int = 0

  @property
  def tokens_at_a_time(self) -> int:
    """Of a micro-batch, over all devices."""
    return _tokens(self.layout, self.micro_batch_rows)

  def pack(self, trajectories: Sequence[Trajectory]) -> TokenBatch:
    """A host batch of at least this shape."""
    layout = self.layout
    return pack(trajectories, row_length=layout.row_length, trunk_length=layout.trunk_length,
                rows_per_trunk=layout.rows_per_trunk, rows_multiple=self.micro_batch_rows,
                min_rows=self.rows, min_sequences=self.sequences, together=self.together, longest=self.longest)

  def at_least(self, rows: int, row_length: int, sequences: int, trunk_length: int) -> "Shape":
    """The same, made up to the sizes of an earlier batch."""
    layout = dataclasses.replace(
        self.layout, row_length=max(self.layout.row_length, row_length),
        trunk_length=max(self.layout.trunk_length, trunk_length))
    return dataclasses.replace(self, layout=layout, rows=max(self.rows, rows),
                               sequences=max(self.sequences, sequences))


def shape_of(settings: ml_collections.ConfigDict, decoder: DecoderConfig, mesh: jax.sharding.Mesh,
             sizes: Sequence[int], *, kept_bytes: int = 0, compares: bool = False,
             shared: Sequence[tuple[int, Sequence[int]]] = ()) -> Shape:
  """The shape of a phase's batches.

  Args:
    settings: of the phase.
    decoder: the model.
    mesh: that trains.
    sizes: tokens of some prompts, or pairs of answers with their prompts, that the phase may draw.
    kept_bytes: of parameters, optimiser, reference and gradients on one device.
    compares: whether a loss compares rollouts: groups then stay together, and are taken to be pairs.
    shared: of those pairs, tokens of the prompt, and of each answer without it.
  """
  together, prompt = compares or settings.kind in PAIRED, 0
  if together:
    longest, groups = max(sizes, default=1), settings.batch.examples * (2 if settings.data.weaker else 1)
    if settings.kind == "rl":
      longest, groups = 2 * (longest + settings.rollout.max_tokens), settings.rollout.prompts
    row = settings.batch.row_length
    row = row if row >= longest else bucket(longest)
    whole = Layout(row if settings.kind == "rl" else _fullest(sizes, row, groups))
    layout = _layout_of_pairs(settings, decoder, whole, sizes, shared)
    rows = (groups * layout.rows_per_trunk if layout.trunk_length else
            _rows_at_most(layout, longest, groups))
    sequences = 2 * groups
  elif settings.kind == "rl":
    known = list(sizes) or [max(settings.data.max_prompt_tokens, 1)]
    prompts = [known[i % len(known)] for i in range(settings.rollout.prompts)]
    samples, prompt = settings.rollout.episode.get("samples", 1), max(prompts)
    layout = _layout_of_rollouts(settings, decoder, prompt, samples)
    responses = [settings.rollout.max_tokens] * samples
    sequences = len(prompts) * samples
    if layout.trunk_length:
      rows = len(prompts) * _rows(layout, responses)
    else:
      rows = _rows_at_most(layout, prompt + settings.rollout.max_tokens, sequences)
  else:
    layout = Layout(settings.batch.row_length)
    sequences, rows = settings.batch.examples, _rows_of_examples(settings)
  micro = _micro_batch_rows(settings, decoder, layout, mesh, kept_bytes, rows)
  return Shape(layout, micro, _padded(rows, layout), sequences, together, _longest(settings), prompt)


@dataclasses.dataclass(frozen=True)
class Fitter:
  """Shapes of rollouts of which some were seen.

  What is expected before the first batch serves responses of the longest length and of half of it. Where
  most are much shorter, another layout computes half as much (48% less where they have 40 of 256 tokens).

  Attributes:
    settings: of the phase.
    decoder: the model.
    mesh: that trains.
    prompt: tokens of the longest one that is expected.
    kept_bytes: as in `shape_of`.
  """

  settings: ml_collections.ConfigDict
  decoder: DecoderConfig
  mesh: jax.sharding.Mesh
  prompt: int
  kept_bytes: int = 0

  def best(self, shape: Shape, trajectories: Sequence[Trajectory], longest: Sequence[int]) -> tuple[Shape, float]:
    """The shape in which a batch costs least, and the share of the work in its present one that this saves.

    Args:
      shape: the present one.
      trajectories: of a batch.
      longest: as `longest_of`, of all batches so far.
    """
    groups = groups_of(trajectories)
    if not groups:
      return shape, 0.0

    def rows(layout):
      if layout.trunk_length:
        return sum(_rows(layout, responses) for _, responses in groups)
      return _rows_of_whole(layout, [len(t.tokens) for t in trajectories])  # also those that train nothing

    def work(shape):  # micro-batches are computed as a whole
      used = -(-rows(shape.layout) // shape.micro_batch_rows)
      return _work(shape.layout, self.decoder, used * shape.micro_batch_rows)
    # Other rows at a time alone would follow the chances of single batches.
    found = [self._shape(layout, rows(layout), shape.sequences) for layout in self._layouts(longest)
             if layout != shape.layout]
    if self.settings.batch.micro_batch_rows:  # to bound memory
      found = [other for other in found if other.tokens_at_a_time <= shape.tokens_at_a_time]
    least = min([shape, *found], key=work)
    return least, 1 - work(least) / work(shape)

  def _layouts(self, longest):
    prompt, response, sequence = longest
    whole, *shared = _layouts(self.settings, max(prompt, self.prompt),
                              max(response, self.settings.rollout.max_tokens))
    return [whole if whole.row_length >= sequence else Layout(bucket(sequence)), *shared]

  def _shape(self, layout, rows, sequences):
    """A shape for batches that have so many rows in use, padded up to those of the longest responses."""
    s = self.settings
    samples, longest = s.rollout.episode.get("samples", 1), s.rollout.max_tokens
    if layout.trunk_length:
      most = s.rollout.prompts * _rows(layout, [min(longest, layout.row_length)] * samples)
    else:
      most = _rows_at_most(layout, min(self.prompt + longest, layout.row_length), s.rollout.prompts * samples)
    micro = _micro_batch_rows(s, self.decoder, layout, self.mesh, self.kept_bytes, rows)
    if not s.batch.micro_batch_rows:  # other batches have other rows in use
      unit = self.mesh.shape["data"] * self.mesh.shape["fsdp"] * layout.rows_per_trunk
      small = SMALL if chips.platform() == "cpu" else BUSY
      fewer = max(rows // QUARTERS, small * unit // _tokens(layout, unit))
      micro = min(micro, max(1, fewer // unit) * unit)
    return Shape(layout, micro, _padded(max(rows, most), layout), sequences)


def longest_of(trajectories: Sequence[Trajectory], before: Sequence[int] = (0, 0, 0)) -> tuple[int, int, int]:
  """Tokens of the longest prompt, the longest response and the longest sequence, or what was longer before."""
  groups = groups_of(trajectories)
  prompt, response, sequence = before
  return (max([prompt, *(tokens for tokens, _ in groups)]),
          max([response, *(tokens for _, sizes in groups for tokens in sizes)]),
          max([sequence, *(len(t.tokens) for t in trajectories)]))


def groups_of(trajectories: Sequence[Trajectory]) -> list[tuple[int, list[int]]]:
  """Of all prompts of a batch, their tokens, and those of every response that trains after them."""
  found: dict[bytes, tuple[int, list[int]]] = {}
  for t in trajectories:
    head = prompt_length(t)
    if head < len(t.tokens):
      found.setdefault(t.tokens[:head].tobytes(), (head, []))[1].append(len(t.tokens) - head)
  return list(found.values())


def _padded(rows, layout):
  """Rows that batches are padded to in advance."""
  return rows if 0 < rows * layout.row_length <= MOST_PADDING else 1


def _longest(settings):
  """Tokens of the longest sequence that is not sampled, 0 where the config sets no limits."""
  d = settings.data
  if settings.kind == "rl" or not (d.max_prompt_tokens and d.max_completion_tokens):
    return 0
  return d.max_prompt_tokens + (2 if d.critique else 1) * d.max_completion_tokens


def _fullest(sizes, least, groups):
  """The row length, from `least` to a quarter more, in which batches of such sizes take least tokens."""
  batches = [sizes[i:i + groups] for i in range(0, len(sizes), groups)]

  def tokens(length):
    return length * sum(len(first_fit_decreasing(batch, length)) for batch in batches)
  return min(range(least, least + least // 4 + 1, _round_up(-(-least // 48), 8)), key=tokens)


def _layout_of_pairs(settings, decoder, whole, sizes, shared):
  """Rows of whole pairs, or where that takes less a trunk for each and its answers in one row or in several."""
  heads, answers = zip(*shared) if shared else ((), ())
  if not settings.batch.share_prompts or not any(heads):
    return whole
  head = _round_up(max(heads))
  in_one = Layout(_round_up(max(map(sum, answers))), head)
  each = Layout(_round_up(max(map(max, answers))), head, max(map(len, answers)))

  def cost(layout, units):
    tokens = units * (layout.trunk_length + layout.rows_per_trunk * layout.row_length)
    # Attention relative to all other work.
    return tokens * (1 + (layout.trunk_length + layout.row_length) / (4 * decoder.d_model))
  best = min(in_one, each, key=lambda layout: cost(layout, len(shared)))
  rows = len(first_fit_decreasing(sizes, whole.row_length))
  return best if cost(best, len(shared)) < WORTH_SHARING * cost(whole, rows) else whole


def _layout_of_rollouts(settings, decoder, prompt, samples):
  """Whole sequences, or rows and trunks that serve full-length and shorter responses well."""
  longest = settings.rollout.max_tokens
  whole, *shared = _layouts(settings, prompt, longest)
  if samples < 2:
    return whole

  def cost(layout):
    total = 0.0
    for share in (1.0, 0.5):  # of the longest response, which half of them come near to
      responses = [math.ceil(longest * share * x) for x in np.linspace(share, 1, samples)]
      if layout.trunk_length:
        rows = SEVERAL * _rows(layout, responses)
      else:
        rows = _rows_of_whole(layout, SEVERAL * [prompt + n for n in responses])
      total += _work(layout, decoder, rows) / (prompt + sum(responses))
    return total
  best = min(shared, key=cost, default=whole)
  return best if cost(best) < WORTH_SHARING * cost(whole) else whole


def _layouts(settings, prompt, longest):
  """Layouts for responses of up to `longest` tokens: whole sequences, then those that share prompts."""
  row, trunk = settings.batch.row_length, _round_up(prompt)
  whole = Layout(row if row >= prompt + longest else bucket(prompt + longest))
  if not settings.batch.share_prompts or not prompt:
    return [whole]
  rows = dict.fromkeys(_round_up(longest * n) for n in (1, 2, 4, 8))
  return [whole, *(Layout(row, trunk, 2 ** i) for row in rows for i in range(6))]


def _work(layout, decoder, rows):
  """What rows of a layout cost, those between that are padding included."""
  return _tokens(layout, rows) * (1 + layout.row_length / (4 * decoder.d_model))  # attention, relative to the rest


def _tokens(layout, rows):
  return rows * layout.row_length + rows // layout.rows_per_trunk * layout.trunk_length


def _rows_of_whole(layout, sizes):
  """Rows that whole sequences take."""
  return len(first_fit_decreasing(sizes, layout.row_length))


def _rows(layout, responses):
  """Rows that the responses to one prompt take beside its trunks, padding rows included."""
  unit = layout.rows_per_trunk
  return -(-len(first_fit_decreasing(responses, layout.row_length)) // unit) * unit


def _round_up(size, multiple=16):
  return -(-size // multiple) * multiple


def _rows_at_most(layout, longest, sequences):
  """Rows that so many sequences take at most: all but the last hold what fits at its longest."""
  return -(-sequences // max(1, layout.row_length // longest))


def _rows_of_examples(settings):
  """Rows of a batch, 0 where the config sets no limits to know them from."""
  length, longest = settings.batch.row_length, _longest(settings)
  return _rows_at_most(Layout(length), min(longest, length), settings.batch.examples) if longest else 0


def _micro_batch_rows(settings, decoder, layout, mesh, kept_bytes, rows):
  """Rows at a time: those of the config, made up to whole trunks, or as many as work well.

  The latter are made fewer where every loop over micro-batches then computes fewer rows beside the
  `rows` that are expected (0 if unknown), or more of the padding of smaller batches is left out.
  """
  devices = mesh.shape["data"] * mesh.shape["fsdp"]
  unit = devices * layout.rows_per_trunk
  if settings.batch.micro_batch_rows:
    return -(-settings.batch.micro_batch_rows // unit) * unit
  per_unit = layout.rows_per_trunk * layout.row_length + layout.trunk_length
  tokens = _tokens_at_a_time(settings, decoder, layout, mesh, kept_bytes)
  most = max(1, round(tokens / per_unit))
  units, streams = -(-rows // unit), sharding.streams(mesh)
  most = min(most, max(-(-BUSY // per_unit), -(-units // PARTS)))
  if not rows:
    return unit * most
  most = min(most, -(-units // streams))

  def computed(each):  # units of all loops, padding included
    return -(-units // (each * streams)) * each * streams
  return unit * min(range(most, most // 2, -1), key=computed)


def _tokens_at_a_time(settings, decoder, layout, mesh, kept_bytes):
  """Tokens of a micro-batch on one device."""
  if chips.platform() == "cpu":
    keys = layout.trunk_length + min(layout.row_length, _longest(settings) or layout.row_length)
    # A score counts as a quarter of an activation: so the fastest come out of rows of 96 to 512 tokens.
    return max(SMALL, int(CPU_BLOCK / (decoder.mlp_width + decoder.heads * keys / 4)))
  limit = chips.memory_bytes(jax.local_devices()[0]) or 16 << 30
  room = HALF * max(limit - kept_bytes, limit // 8)
  return max(256, int(room / _bytes_per_token(settings, decoder, layout, mesh.shape["tensor"])))


def _bytes_per_token(settings, decoder, layout, tensor):
  """Activations that the backward pass needs of one token, roughly."""
  c, size = decoder, np.dtype(jax.numpy.dtype(decoder.dtype)).itemsize
  inside = (3 * c.mlp_width + 3 * (c.heads + c.kv_heads) * c.width) / tensor + 4 * c.d_model
  kept = {"none": c.layers * (inside + 2 * c.d_model),
          "dots": c.layers * (inside + 2 * c.d_model) / 2,
          "full": c.layers * c.d_model + inside}[c.remat]
  logits = 3 * 4 * min(settings.batch.vocabulary_chunk or 8192, math.ceil(c.vocab_size / tensor))
  # Scores and weights of attention; the backward pass makes those of long rows and under
  # rematerialisation again, one layer at a time.
  scores = 2 * 4 * c.heads / tensor * (layout.trunk_length + layout.row_length)
  scores *= c.attention != "fused"
  again = c.remat == "full" or layout.row_length > packed_attention.BLOCK
  return size * kept + logits + 6 * 4 * c.d_model + scores * (1 if again else c.layers)
