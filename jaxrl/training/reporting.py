"""Everything that a run leaves behind in its directory, and what it says meanwhile.

  config.json        what was run, resolved
  metrics.jsonl      one object per step, and one per evaluation
  samples/*.jsonl    prompts, completions, criteria, rewards; one file per phase
  tensorboard/       the same metrics as events, tagged `phase/metric`
  curves.png         the metrics as a picture (see `curves`)
  summary.json       phases with the evaluations before and after, cost, versions, devices

With several processes only the first writes and speaks; the others may make the same calls.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import pathlib
import re
import sys
import time
from typing import Any, TextIO

import jax

from jaxrl.training import jsonl, machine
from jaxrl.training.terminal import Terminal

# Where there is a PyTorch, tensorboardX would load it: a second at every start, and nothing here needs it.
_hidden = "torch" not in sys.modules
if _hidden:
  sys.modules["torch"] = None
try:
  import tensorboardX
  from tensorboardX import summary as tensorboard
finally:
  if _hidden:
    del sys.modules["torch"]

SAMPLES_SECONDS = 30.0  # at least, between two tables of samples
ON_POLICY = ("a policy loss near 0 is expected on-policy: its gradient is what trains; watch the "
             "reward instead")


class Reporter:
  """One place that writes what a run leaves behind; a context manager, or call `close` at the end.

  Args:
    workdir: created if need be. After a restart, call `rewind` before the first step.
    quiet: plain log lines, no samples on the terminal.
    stream: where to speak; standard output by default.
    clock: seconds, monotonic.
  """

  def __init__(self, workdir: str | pathlib.Path, *, quiet: bool = False,
               stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
    self.workdir = pathlib.Path(workdir)
    self.compiles = machine.CompileCounter()
    self._clock = clock
    self._started = clock()
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    self.workdir.mkdir(parents=True, exist_ok=True)
    self.terminal = Terminal(quiet=quiet, stream=stream, clock=clock)
    self._metrics = jsonl.JsonLines(self.workdir / "metrics.jsonl")
    self._samples: dict[str, jsonl.JsonLines] = {}
    self._event_writer: Any = None
    self._events_from: int | None = None  # first step of this process, after a restart
    self._step = 0
    self._made = 0
    self._samples_shown: float | None = None

  def __enter__(self) -> "Reporter":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def config(self, config: Mapping[str, Any]) -> None:
    """Writes `config.json`: plain JSON values, which read back equal."""
    if self._writes:
      jsonl.write_json(self.workdir / "config.json", config, exact=True)

  def rewind(self, step: int) -> None:
    """Forgets what is recorded of later steps: they are going to be made again.

    Args:
      step: the last step to keep.
    """
    if not self._writes:
      return
    self._step = step
    self._metrics.keep(lambda row: jsonl.number(row.get("step")) <= step)
    for path in sorted((self.workdir / "samples").glob("*.jsonl")):
      self._sample_file(path.stem).keep(lambda row: jsonl.number(row.get("step")) <= step)
    self._close_events()
    self._events_from = step + 1

  def start_phase(self, name: str, kind: str, total_steps: int, done: int = 0) -> None:
    """Begins a phase, or continues one of which `done` steps were made before a restart."""
    if not self._writes:
      return
    self._samples_shown = None
    self._made = done
    self.terminal.start_phase(name, kind, total_steps, done)
    if kind == "rl":
      self.terminal.note(ON_POLICY)

  def step(self, step: int, phase: str, metrics: Mapping[str, Any]) -> None:
    """Records one optimiser step.

    Args:
      step: counted over the whole run, from 1.
      phase: name of the phase.
      metrics: name -> scalar. `loss`, `reward`, `entropy`, `kl`, `response_tokens` and
        `tokens_per_second` are drawn; all are recorded, with the `compilations` of this process
        so far and the `compile_seconds` that they took.
    """
    if not self._writes:
      return
    self._step = step
    metrics = {**metrics, "compilations": self.compiles.count,
               "compile_seconds": self.compiles.seconds}
    self._metrics.append({"step": step, "phase": phase, **metrics})
    self._add_events(phase, metrics)
    self._made += 1
    self.terminal.advance(self._made, metrics)

  def evaluation(self, moment: str, metrics: Mapping[str, Any]) -> None:
    """Records an evaluation, after the last step recorded.

    One that a killed run had recorded of the same moment already is replaced.

    Args:
      moment: `start`, or the name of the phase that has just ended.
      metrics: name -> scalar; `greedy_accuracy`, `sampled_accuracy` and `pass_at_<k>` are drawn.
    """
    if not self._writes:
      return
    self._metrics.keep(lambda row: "evaluation" not in row or row["phase"] != moment)
    self._metrics.append({"step": self._step, "phase": moment, "evaluation": True, **metrics})
    self._add_events("evaluation", metrics)
    shown = "  ".join(f"{name} {jsonl.number(value):.4g}" for name, value in metrics.items())
    self.terminal.note(f"evaluation, {moment}: {shown}")

  def samples(self, phase: str, step: int, rows: Sequence[Mapping[str, Any]], *,
              replace: bool = False) -> None:
    """Records sampled completions, and shows some of them now and then.

    Args:
      phase: names the file.
      step: as in `step`.
      rows: `prompt`, `completion`, `criteria`, `reward`, `advantage`, and whatever else is worth
        keeping; see `jsonl.jsonable`.
      replace: forget what the file held before.
    """
    if not self._writes or not rows:
      return
    if replace:
      self._sample_file(file_name(phase)).keep(lambda row: False)
    self._sample_file(file_name(phase)).extend({"step": step, "phase": phase, **row}
                                               for row in rows)
    now = self._clock()
    if self._samples_shown is None or now - self._samples_shown >= SAMPLES_SECONDS:
      self._samples_shown = now
      self.terminal.show_samples(f"samples at step {step} of {phase}", rows)

  def end_phase(self) -> None:
    """Ends the phase that was started last and draws the curves."""
    if not self._writes:
      return
    self.terminal.end_phase()
    if self._event_writer:
      self._event_writer.flush()
    self.draw()

  def note(self, message: str) -> None:
    """Says one line."""
    if self._writes:
      self.terminal.note(message)

  def draw(self, summary: Mapping[str, Any] | None = None) -> None:
    """Draws `curves.png`. A picture that cannot be drawn is reported and stops nothing."""
    if not self._writes:
      return
    try:
      from jaxrl.training import curves  # matplotlib takes long to load
      curves.draw(jsonl.read(self._metrics.path), summary, self.workdir / "curves.png")
    except Exception as error:
      self.terminal.note(f"curves.png was not drawn ({type(error).__name__}: {error}); the numbers "
                         f"are in {self._metrics.path}")

  def summary(self, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `summary.json`; at the end of a run, use `finish`.

    Args:
      summary: `phases: [{name, kind, seconds, before, after}]`, and whatever else is worth keeping.

    Returns:
      What was written: the above and `total_seconds` (of this process, unless given), `compile`,
      `peak_memory`, `versions` and `devices`.
    """
    content = {
        "total_seconds": self._clock() - self._started,
        **summary,
        "compile": {"count": self.compiles.count, "from_disk": self.compiles.from_disk,
                    "seconds": self.compiles.seconds},
        "peak_memory": machine.peak_memory(),
        "versions": machine.versions(),
        "device": machine.devices(),
    }
    if self._writes:
      jsonl.write_json(self.workdir / "summary.json", content)
    return jsonl.jsonable(content)

  def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
    """As `summary`, then draws the curves a last time and shows the table at the end."""
    content = self.summary(summary)
    self.draw(content)
    self.show_result(content)
    return content

  def show_result(self, summary: Mapping[str, Any]) -> None:
    """Shows the table of a finished run."""
    if self._writes:
      self.terminal.show_result(summary.get("phases", ()), {
          "curves": self.workdir / "curves.png", "samples": self.workdir / "samples",
          "metrics": self._metrics.path, "summary": self.workdir / "summary.json"})

  def close(self) -> None:
    """Closes all files and leaves the terminal as it was found."""
    self.compiles.close()
    if self._writes:
      self.terminal.close()
      self._metrics.close()
      for file in self._samples.values():
        file.close()
      self._close_events()

  def _add_events(self, prefix: str, metrics: Mapping[str, Any]) -> None:
    event = tensorboard.Summary()  # one for all: each goes through two threads, which take the time of this one
    for name, value in metrics.items():
      value = jsonl.number(value)
      if math.isfinite(value):  # TensorBoard draws nothing else, and its writer warns of each
        event.MergeFrom(tensorboard.scalar(f"{prefix}/{name}", value))
    if event.value:
      self._events.file_writer.add_summary(event, self._step)

  def _sample_file(self, name: str) -> jsonl.JsonLines:
    if name not in self._samples:
      self._samples[name] = jsonl.JsonLines(self.workdir / "samples" / f"{name}.jsonl")
    return self._samples[name]

  @property
  def _events(self) -> Any:
    """The writer of TensorBoard's events, opened when there is something to write."""
    if self._event_writer is None:
      self._event_writer = tensorboardX.SummaryWriter(str(self.workdir / "tensorboard"),
                                                      purge_step=self._events_from)
    return self._event_writer

  def _close_events(self) -> None:
    if self._event_writer:
      self._event_writer.close()
    self._event_writer = None


def file_name(phase: str) -> str:
  """A phase's name as a file name on any system."""
  return re.sub(r"[^\w.-]+", "_", phase).lstrip(".") or "phase"
