"""What every system of the comparison has in common: the work, its prompts, reward and clock.

Runs in the environments of all systems, so it imports nothing but NumPy and the standard library.
Token ids 0, 1, 2 are padding, BOS and EOS everywhere. A process measures one section:

  on_jaxrl.py '{"section": "grpo", "prompts": 16, ...}'

and its last line on standard output is `RESULT ` and a JSON object; see `Clock.result`.
"""

import dataclasses
import importlib.metadata
import json
import os
import resource
import sys
import time

import numpy as np

PAD, BOS, EOS = 0, 1, 2
SPECIALS = 3
NEVER = 1 << 30  # an EOS id that is never sampled, so that every response has its full length
RESULT = "RESULT "


@dataclasses.dataclass(frozen=True)
class Work:
  """One measurement.

  Attributes:
    section: `sampling`, `grpo`, `sft`, `dpo` or `reward`.
    prompts, samples, prompt_len, new_tokens: of sampling and GRPO; `prompt_len` counts the BOS.
    median_len: 0, or the median of a log-normal distribution of response lengths that
      `new_tokens` cuts off; see `countdown`.
    sigma: standard deviation of the logarithm of those lengths.
    beta: weight of the KL term; 0 means no reference model.
    sft_batch, sft_len: sequences and their tokens in supervised tuning.
    pairs, pair_len: pairs of answers per update, and the mean length of their sequences; each begins
      with a prompt of `prompt_len` tokens and ends with EOS.
    spread: longest over shortest sequence of the pairs, see `pair_lengths`.
    vocab, layers, d_model, heads, kv_heads, d_ff: of the model; its embeddings are tied, but for
      `countdown`.
    warmup, iters, seconds: steps that are not measured, and steps that are; at least 2 of these
      are made, and no more are begun after so many seconds.
    started, stat: clock and CPU times of the machine when the process was started.
    seed: of parameters and prompts.
    row_length, micro_batch_rows: jaxrl's settings; 0 is the length of a sequence, and its default.
    devices: CPU devices that jaxrl pretends to have.
    overrides: more of jaxrl's settings, `(path, value)` as on its command line.
    micro_prompts: Tunix's prompts per gradient micro-batch; 0 is all.
  """

  section: str
  prompts: int = 16
  samples: int = 8
  prompt_len: int = 32
  new_tokens: int = 64
  median_len: int = 0
  sigma: float = 1.0
  beta: float = 0.04
  sft_batch: int = 32
  sft_len: int = 96
  pairs: int = 32
  pair_len: int = 96
  spread: float = 1.0
  vocab: int = 512
  layers: int = 4
  d_model: int = 128
  heads: int = 4
  kv_heads: int = 2
  d_ff: int = 384
  warmup: int = 2
  iters: int = 5
  seconds: float = 12.0
  started: float = 0.0
  stat: tuple = ()
  seed: int = 0
  row_length: int = 0
  micro_batch_rows: int = 0
  devices: int = 1
  overrides: tuple = ()
  micro_prompts: int = 4

  @property
  def rows(self) -> int:
    """Responses per step."""
    return self.prompts * self.samples

  @property
  def tied(self) -> bool:
    """Whether input and output embeddings are one."""
    return not self.median_len

  @property
  def learning_rate(self) -> float:
    """So small with `countdown` that it stays as it is: all steps of all systems have responses like the first."""
    return 1e-9 if self.median_len else 1e-5

  @property
  def eos(self) -> int:
    """The EOS id while sampling."""
    return EOS if self.median_len else NEVER


def from_command_line() -> Work:
  """The work that this process was started for."""
  values = json.loads(sys.argv[1])
  return Work(**{**values, "stat": tuple(values.get("stat") or cpu_times()),
                 "started": values.get("started") or time.time()})


def prompts(work: Work, count: int) -> np.ndarray:
  """Prompts of random token ids behind a BOS. [count, prompt_len]"""
  ids = np.random.default_rng(work.seed).integers(SPECIALS, work.vocab, (count, work.prompt_len))
  ids[:, 0] = BOS
  if work.median_len:
    ids[:, -1] = work.vocab - 1  # see `countdown`
  return ids


def pair_lengths(work: Work) -> np.ndarray:
  """Tokens of both sequences of every pair, prompt and EOS included.

  They are spread evenly from shortest to longest, and are as many in sum as if all had `pair_len`.
  [pairs, 2]

  Raises:
    ValueError: the shortest has no room for a token of an answer.
  """
  mean = work.pair_len
  short = np.round(np.linspace(2 * mean / (1 + work.spread), mean, work.pairs)).astype(int)
  if short.min() < work.prompt_len + 2:
    raise ValueError(f"pair_len={mean} with spread={work.spread} makes sequences of {short.min()} tokens, "
                     f"but prompts have {work.prompt_len}: use a longer pair_len or shorter prompts")
  lengths = np.concatenate([short, 2 * mean - short])
  return np.random.default_rng(work.seed).permutation(lengths).reshape(work.pairs, 2)


def pairs(work: Work) -> list[tuple]:
  """A prompt behind a BOS, and two answers without their EOS, of random token ids, for each pair."""
  rng = np.random.default_rng(work.seed + 1)
  return [(prompt, *(rng.integers(SPECIALS, work.vocab, n - work.prompt_len - 1) for n in both))
          for prompt, both in zip(prompts(work, work.pairs), pair_lengths(work))]


def pair_tokens(work: Work) -> int:
  """Tokens of all answers of an update, EOS included."""
  return int(pair_lengths(work).sum()) - 2 * work.pairs * work.prompt_len


def share_of_even(ids: list) -> float:
  """The reward: how many of the token ids are even, computed in Python as rewards are."""
  return sum(1 for i in ids if i % 2 == 0) / max(1, len(ids))


def length_probabilities(work: Work) -> np.ndarray:
  """Probability of every response length from 1 to `new_tokens`; longer ones are cut.

  Without `median_len`, all responses have `new_tokens` tokens. [new_tokens]
  """
  if not work.median_len:
    return np.eye(1, work.new_tokens, work.new_tokens - 1)[0]
  lengths = np.arange(1, work.new_tokens + 1)
  density = np.exp(-0.5 * (np.log(lengths / work.median_len) / work.sigma) ** 2) / lengths
  return density / density.sum()


def countdown(work: Work) -> tuple[np.ndarray, np.ndarray]:
  """Embeddings that make any of the systems sample responses of log-normally distributed length.

  With output projections of zero in all blocks, a model's next token depends on its last one alone.
  Here token `SPECIALS + k` is followed by `SPECIALS + k - 1`, and so down to EOS; the first token
  of a response, behind a prompt that ends in the last id of the vocabulary, is drawn with the
  probability of the length that it stands for. No system can take a short cut: all matrices keep
  their shapes.

  Returns:
    Input and output embeddings, each [vocab, d_model], for a final RMSNorm with scale 1.

  Raises:
    ValueError: the vocabulary has too few tokens to count down from `new_tokens`.
  """
  if work.new_tokens + SPECIALS > work.vocab:
    raise ValueError(f"vocab={work.vocab}: counting down from new_tokens={work.new_tokens} needs "
                     f"at least {work.new_tokens + SPECIALS}")
  rng, vocab, width = np.random.default_rng(work.seed), work.vocab, work.d_model
  inputs = rng.normal(size=(vocab, width))
  inputs[:, 0] = 0.0  # the first axis belongs to the start token alone
  inputs[-1] = np.eye(1, width)[0]
  inputs *= np.sqrt(width) / np.linalg.norm(inputs, axis=1, keepdims=True)  # as RMSNorm would
  after = np.r_[EOS, SPECIALS:SPECIALS + work.new_tokens - 2]  # what follows each counting token
  outputs = np.zeros((vocab, width))
  outputs[after] = 0.7 * inputs[SPECIALS:SPECIALS + work.new_tokens - 1]
  first = np.full(vocab, -30.0)
  starts = np.r_[EOS, SPECIALS:SPECIALS + work.new_tokens - 1]  # of lengths 1, 2, ...
  first[starts] = np.log(np.maximum(length_probabilities(work), 1e-12))
  outputs[:, 0] = first / np.sqrt(width)
  return inputs.astype(np.float32), outputs.astype(np.float32)


def cpu_times() -> tuple[float, float]:
  """Seconds that all CPUs together were busy, and all their time, since the machine started."""
  with open("/proc/stat") as file:
    return parse_stat(file.read())


def parse_stat(text: str) -> tuple[float, float]:
  """As `cpu_times`, of the contents of /proc/stat; waiting for a disk is not being busy."""
  fields = text.split("\n")[0].split()[1:9]
  user, nice, system, idle, wait, interrupt, soft, stolen = map(int, fields)
  busy = user + nice + system + interrupt + soft + stolen
  ticks = os.sysconf("SC_CLK_TCK")
  return busy / ticks, (busy + idle + wait) / ticks


def other_share(before: tuple, after: tuple, own: float) -> float:
  """Share of the machine's CPU time between two `cpu_times` that was not the `own` seconds."""
  busy, total = after[0] - before[0], after[1] - before[1]
  return max(0.0, busy - own) / max(total, 1e-9)


def own_seconds() -> float:
  """CPU time of this process and of its children that have ended."""
  times = os.times()
  return times.user + times.system + times.children_user + times.children_system


def peak_rss_mb() -> float:
  """Highest resident memory of this process, in MB (10**6 bytes).

  From /proc where there is one: the figure of `getrusage` begins with the parent's.
  """
  try:
    with open("/proc/self/status") as file:
      lines = dict(line.split(":", 1) for line in file)
    return int(lines["VmHWM"].split()[0]) * 1024 / 1e6
  except (OSError, KeyError):
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class CompileMeter:
  """How long JAX traced, lowered and compiled, up to the first call of `read`.

  What happens within another step of its kind, or beside it in a thread, counts once.
  """

  PARTS = {"jaxpr_trace_duration": "trace", "jaxpr_to_mlir_module_duration": "lower",
           "backend_compile_duration": "compile"}

  def __init__(self):
    import jax
    self._spans = {part: [] for part in self.PARTS.values()}
    self._found = None
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event, duration, **_):
    part = self.PARTS.get(event.rsplit("/", 1)[-1])
    if part:
      now = time.perf_counter()
      self._spans[part].append((now - duration, now))

  def read(self) -> dict:
    """`trace_s`, `lower_s` and `compile_s` until now, or until it was first asked."""
    self._found = self._found or {f"{part}_s": covered(spans)
                                  for part, spans in self._spans.items()}
    return self._found


def covered(spans: list) -> float:
  """Seconds that lie in at least one of some (start, end)."""
  total, reached = 0.0, float("-inf")
  for start, end in sorted(spans):
    total += max(0.0, end - max(start, reached))
    reached = max(reached, end)
  return total


class Clock:
  """Counts steps and times those behind the warm-up; `tick` at the end of each step."""

  def __init__(self, work: Work, on_first=lambda: {}):
    """Args:
      work: how many steps.
      on_first: more figures to be kept, taken at the end of the first step.
    """
    self.work = work
    self._on_first = on_first
    self._first = {}
    self._ends = []

  def tick(self) -> bool:
    """Says whether enough was measured."""
    work = self.work
    now = time.perf_counter()
    self._ends.append(now)
    count = len(self._ends)
    if count == 1:
      self._first = {"first_step_s": time.time() - work.started,
                     "start_other_cpu": other_share(work.stat, cpu_times(), own_seconds()),
                     **self._on_first()}
    if count == work.warmup:
      self._before = cpu_times(), own_seconds()
    measured = count - work.warmup
    if measured <= 0:
      return work.iters == 0
    late = now - self._ends[work.warmup - 1] > work.seconds
    enough = measured >= work.iters or (measured >= 2 and late)
    if enough:
      self._other = other_share(self._before[0], cpu_times(), own_seconds() - self._before[1])
    return enough

  def result(self, packages: list, **more) -> None:
    """Prints the result.

    Its `steps_s` are seconds of each measured step, `other_cpu` the share of other processes
    meanwhile, `first_step_s` and `start_other_cpu` the same from the start of the process to the
    end of its first step; then peak memory, versions, and whatever else is given.
    """
    ends = self._ends[self.work.warmup - 1:]
    steps = [] if not self.work.iters else [b - a for a, b in zip(ends, ends[1:])]
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(RESULT + json.dumps({
        "steps_s": steps, "other_cpu": self._other if steps else None, **self._first,
        "peak_rss_mb": peak_rss_mb(), "versions": versions, **more}), flush=True)
