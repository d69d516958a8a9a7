"""What is asked of the sampler and what it returns."""

from collections.abc import Sequence
import dataclasses

import numpy as np

LARGEST = 2 ** 31 - 1  # number that a device counts with
HOTTEST = float(np.finfo(np.float32).max)
LEAST_SHARE = 1e-30  # of top_p, far from where float32 has nothing but 0


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How to sample and when to stop.

  Attributes:
    max_tokens: tokens per sample, at most.
    temperature: divides the logits; 0 is greedy.
    top_k, top_p, min_p: truncation as in `draw.Distribution`; 0, 1 and 0 are off.
    stop_ids: a sample ends with the first of these tokens, which is part of it.
    stop_strings: a sample ends with the token that completes one of these strings.

  Raises:
    ValueError: a value out of range.
  """

  max_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  stop_ids: tuple[int, ...] = ()
  stop_strings: tuple[str, ...] = ()

  def __post_init__(self):
    def check(ok, name, remedy):
      if not ok:
        raise ValueError(f"sampling.{name}={getattr(self, name)!r}: {remedy}")
    check(1 <= self.max_tokens <= LARGEST, "max_tokens",
          f"a sample needs at least 1 token, and has at most {LARGEST}")
    check(0 <= self.temperature <= HOTTEST, "temperature", f"use 0 (greedy) or more, up to {HOTTEST:.1e}")
    check(0 <= self.top_k <= LARGEST, "top_k", "use a positive number of tokens, or 0 to switch it off")
    check(LEAST_SHARE <= self.top_p <= 1, "top_p", "use a share in (0, 1]; 1 switches it off")
    check(0 <= self.min_p <= 1, "min_p", "use a share in [0, 1]; 0 switches it off")
    check(all(0 <= i <= LARGEST for i in self.stop_ids), "stop_ids", f"token ids are from 0 to {LARGEST}")
    check(not isinstance(self.stop_strings, str)
          and all(s and "\ufffd" not in s for s in self.stop_strings), "stop_strings",
          "use a tuple of non-empty strings without U+FFFD, which stands for half a character")


@dataclasses.dataclass(frozen=True)
class Request:
  """`n` samples that continue one prompt.

  Attributes:
    prompt: token ids, at least one.
    n: number of samples.
    key: integers that identify the request within the run, e.g. (step, episode, request). Sample
      i is a function of the parameters, the prompt, the settings, the base key, `key` and i.
    params: how to sample.

  Raises:
    ValueError: no prompt, no samples, or a key that does not fit 32 bits.
  """

  prompt: Sequence[int]
  n: int
  key: tuple[int, ...]
  params: SamplingParams

  def __post_init__(self):
    if not len(self.prompt):
      raise ValueError(f"request {self.key}: the prompt is empty; start it with a BOS token")
    if self.n < 1:
      raise ValueError(f"request {self.key}: n={self.n}, but at least 1 sample must be asked for")
    if not all(0 <= k < 2 ** 32 for k in self.key):
      raise ValueError(f"request {self.key}: its key must be made of integers in [0, 2**32)")


@dataclasses.dataclass(frozen=True)
class Sample:
  """One completion.

  Attributes:
    tokens: without the prompt, with the stop token. [length]
    logprobs: of each token under the model at the sampling temperature (1 if greedy), whatever the
      truncation. [length]
    finish: `stop` (stop token or stop string) or `length`.
    text_end: where a stop string begins in the decoded text, so that `decode(tokens)[:text_end]`
      is the text without it; None if no stop string ended the sample.
  """

  tokens: np.ndarray
  logprobs: np.ndarray
  finish: str
  text_end: int | None = None
