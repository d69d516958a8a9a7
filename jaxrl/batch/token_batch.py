"""`Task` and `Trajectory` on the host, `TokenBatch` and `ModelOutputs` on the device."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.struct
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
