"""The least work that a row of the comparison takes, and the time that a machine needs for it.

Counted are the matrix products that any implementation has to make: prompts once per group, causal
attention over visible tokens only, logits of response tokens only, two backward products for each
forward one. Element-wise work (norms, softmax, rotations) and everything on the host count nothing.
Bytes are those of parameters, optimiser state and caches; activations count nothing.
"""

from collections.abc import Mapping
import dataclasses

import numpy as np
from peers.common import Work
from peers.common import length_probabilities
from peers.common import pair_lengths

FLOAT = 4  # bytes
UPDATE = 7  # parameter-sized arrays that an Adam step reads or writes, the gradient included


@dataclasses.dataclass(frozen=True)
class Phase:
  """A part of a row.

  Attributes:
    name: of the part.
    flops: floating-point operations.
    moved: bytes read and written.
    used: bytes of the memory that these are in.
  """

  name: str
  flops: float
  moved: float
  used: float


def forward_flops(work: Work, tokens: float, pairs: float, logits: float) -> float:
  """FLOPs of matrix products in a forward pass.

  Args:
    work: names the shape of the model.
    tokens: that go through the layers.
    pairs: of a query and a key that it sees.
    logits: tokens whose distribution over the vocabulary is computed.
  """
  width = work.d_model // work.heads
  attention = work.d_model * width * (2 * work.heads + 2 * work.kv_heads)
  linear = 2 * work.layers * (attention + 3 * work.d_model * work.d_ff)
  return (linear * tokens + 4 * work.layers * work.heads * width * pairs
          + 2 * work.d_model * work.vocab * logits)


def parameters(work: Work) -> int:
  """Number of parameters, without norms."""
  width = work.d_model // work.heads
  layer = work.d_model * width * (2 * work.heads + 2 * work.kv_heads) + 3 * work.d_model * work.d_ff
  return work.layers * layer + work.vocab * work.d_model * (1 if work.tied else 2)


def phases(work: Work) -> list[Phase]:
  """What a step of the work's section consists of."""
  size = FLOAT * parameters(work)
  if work.section == "sft":
    tokens = work.sft_batch * work.sft_len
    pairs = work.sft_batch * work.sft_len * (work.sft_len + 1) / 2
    return [_update(work, forward_flops(work, tokens, pairs, tokens))]
  if work.section in ("dpo", "reward"):
    forward = _forward_of_pairs(work)
    reference = [Phase("reference", forward, size, size)] if work.section == "dpo" else []
    return [*reference, _update(work, forward)]
  probabilities = length_probabilities(work)
  lengths = np.arange(1, work.new_tokens + 1)
  mean, square = probabilities @ lengths, probabilities @ lengths ** 2
  prompt_tokens = work.prompts * work.prompt_len
  prompt_pairs = prompt_tokens * (work.prompt_len + 1) / 2
  response_tokens = work.rows * mean
  response_pairs = work.rows * (mean * work.prompt_len + (square + mean) / 2)
  prefill = Phase("prefill", forward_flops(work, prompt_tokens, prompt_pairs, work.prompts), size,
                  size)
  decode = Phase("decode", forward_flops(work, response_tokens, response_pairs, response_tokens),
                 *_decode_bytes(work, size, probabilities, lengths))
  if work.section == "sampling":
    return [prefill, decode]
  forward = forward_flops(work, prompt_tokens + response_tokens, prompt_pairs + response_pairs,
                          response_tokens)
  reference = [Phase("reference", forward, size, size)] if work.beta else []
  return [prefill, decode, *reference, _update(work, forward)]


def limit_seconds(work: Work, gflops: float, bandwidth: Mapping[int, float]) -> float:
  """Seconds that a step takes at least on a machine.

  Args:
    work: what is done.
    gflops: of the machine, in matrix products.
    bandwidth: GB/s, by the megabytes of memory in use.
  """
  total = 0.0
  for phase in phases(work):
    fitting = [size for size in sorted(bandwidth) if 1e6 * size >= phase.used]
    rate = bandwidth[fitting[0] if fitting else max(bandwidth)]
    total += max(phase.flops / (1e9 * gflops), phase.moved / (1e9 * rate))
  return total


def _update(work, forward):
  size = FLOAT * parameters(work)
  return Phase("update", 3 * forward, UPDATE * size, UPDATE * size)


def _forward_of_pairs(work):
  """FLOPs of a pass over all pairs: prompts once, logits of answers unless only a score is read."""
  answers = pair_lengths(work) - work.prompt_len
  prompts = work.pairs * work.prompt_len
  seen = prompts * (work.prompt_len + 1) / 2 + np.sum(answers * (work.prompt_len + (answers + 1) / 2))
  logits = answers.sum() if work.section == "dpo" else 0
  return forward_flops(work, prompts + answers.sum(), seen, logits)


def _decode_bytes(work, size, probabilities, lengths):
  """Bytes moved and used: every step reads all parameters and the caches of rows under way."""
  alive = np.cumsum(probabilities[::-1])[::-1]  # share of rows that have a token `length`
  entry = 2 * FLOAT * work.layers * work.kv_heads * (work.d_model // work.heads)
  # A prompt's cache is read once for all its samples, as long as one of them goes on.
  prefix = work.prompts * work.prompt_len * np.sum(1 - (1 - np.minimum(alive, 1)) ** work.samples)
  suffix = work.rows * np.sum(alive * lengths)
  cache = work.prompts * work.prompt_len + work.rows * probabilities @ lengths
  return size * len(lengths) + entry * (prefix + suffix), size + entry * cache
