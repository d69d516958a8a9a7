"""What a phase learns with, and which signals of which models that takes."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import optax

from jaxrl import compose
from jaxrl.advantages.chain import initial_carried
from jaxrl.models import DecoderConfig
from jaxrl.models import adapters
from jaxrl.models import outputs as model_signals
from jaxrl.objectives import aggregate
from jaxrl.schedule import Schedule
from jaxrl.training import frozen


@dataclasses.dataclass(frozen=True)
class Learning:
  """What the jitted functions of a phase are made of, see `learner`.

  Attributes:
    decoder: the model.
    terms: objective terms, as `compose.build` returns them.
    advantage: chain of credit, empty where nothing is rewarded.
    aggregations: of each term.
    optimizer: of the phase.
    learning_rate: its schedule, for the logs.
    temperature: of the distribution whose log-probabilities are meant, or a schedule of it.
    updates_per_batch: on samples of one temperature.
    vocabulary_chunk: logits exist for this much of the vocabulary at a time.
    with_behaviour: tokens were sampled, so their `behaviour_logprobs` mean something.
    streams: threads that share the micro-batches, on one device: see `streams.SideBySide`.
    models: frozen ones that pieces may read, by name, and how they follow the policy.
    decoders: of those of them that other runs have trained, by name.
    asks_reference: rollouts ask the reference, whatever the pieces read.
    transforms: those of gradients and updates that are part of the optimiser.
    trains: names of the adapters that are trained; () is all, if there are any.
    offload: the optimiser's arrays lie in host memory between updates, see `sharding.on_host`.
  """

  decoder: DecoderConfig
  terms: Sequence[Callable]
  advantage: Sequence[Callable]
  aggregations: Sequence[aggregate.Aggregation]
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  temperature: float | Schedule
  vocabulary_chunk: int
  with_behaviour: bool
  updates_per_batch: int = 1
  streams: int = 1
  models: Mapping[str, frozen.Refresh] = dataclasses.field(
      default_factory=lambda: {frozen.REFERENCE: frozen.Refresh()})
  decoders: Mapping[str, DecoderConfig] = dataclasses.field(default_factory=dict)
  asks_reference: bool = False
  transforms: Sequence[Callable] = ()
  trains: tuple[str, ...] = ()
  offload: bool = False

  def part(self, params: Any) -> Any:
    """What of the parameters, or of a tree like them, is trained."""
    return adapters.trained(params, self.decoder.adapters, self.trains)

  @property
  def kept(self) -> tuple[str, ...]:
    """The frozen models that pieces or rollouts read, and those that they follow, but for `others`."""
    return frozen.kept(self.models, self._read_models)

  @property
  def others(self) -> dict[str, DecoderConfig]:
    """The frozen models of other runs that pieces read."""
    return {name: decoder for name, decoder in self.decoders.items() if name in self._read_models}

  def decoder_of(self, source: str) -> DecoderConfig:
    """That of a frozen model, or of the policy."""
    return self.decoders.get(source, self.decoder)

  def temperature_at(self, step: jax.Array) -> float | jax.Array:
    """That of the samples which update `step` learns from."""
    if not isinstance(self.temperature, Schedule):
      return self.temperature
    return self.temperature(step - step % self.updates_per_batch)

  @property
  def needs_values(self) -> bool:
    """Whether a piece reads values."""
    return any(name in model_signals.VALUES for _, name in self._read)

  @property
  def reads_logprobs(self) -> bool:
    """Whether logits are wanted; not by terms that declare scores, unless log-probabilities too."""
    declared = [compose.signals_of(term) for term in self.terms]
    return self.with_behaviour or any("scores" not in names or "logprobs" in names
                                      for names in declared)

  @property
  def term_signals(self) -> frozenset[str]:
    """Model outputs that the loss reads, in every update."""
    return frozenset(name for source, name in self.sources(self.terms) if source == frozen.POLICY)

  @property
  def frozen_signals(self) -> dict[str, frozenset[str]]:
    """Model outputs that are computed once per batch, of the policy that it begins with (`old`) and
    of frozen models. A chain runs once per batch, so for it the policy is the old one."""
    of_terms = {(source, name) for source, name in self.sources(self.terms) if source != frozen.POLICY}
    of_chain = {(frozen.OLD if source == frozen.POLICY else source, name)
                for source, name in self.sources(self.advantage)}
    return {wanted: frozenset(name for source, name in of_terms | of_chain if source == wanted)
            for wanted in (*self.models, frozen.OLD)}

  @property
  def carried(self) -> dict[str, Any]:
    """What the pieces of the chain and the terms remember before the first batch."""
    return initial_carried([*self.advantage, *self.terms])

  def sources(self, pieces: Sequence[Callable]) -> set[tuple[str, str]]:
    """(`policy`, `old` or a frozen model; name) of the model outputs that pieces read."""
    found = set()
    for piece in pieces:
      for signal in compose.signals_of(piece):
        source, _, name = signal.partition("_")
        if signal == model_signals.DIVERGENCE or source not in (frozen.OLD, *self.models):
          source, name = frozen.POLICY, signal
        if model_signals.is_signal(name):
          found.add((source, name))
    return found

  def hint(self, signal: str) -> str:
    """What to say of a signal that nothing gives, if it might be that of a frozen model."""
    model, _, name = signal.partition("_")
    if not model_signals.is_signal(name) or model in self.models:
      return ""
    return (f". There is no frozen model {model!r}{compose.nearest(model, self.models)}; one is made by "
            f"config.frozen.{model} = dict(every=..., decay=...)")

  @property
  def _read_models(self):
    read = {frozen.REFERENCE if name == model_signals.DIVERGENCE else source
            for source, name in self._read}
    read |= {frozen.REFERENCE} if self.asks_reference else set()
    return read & set(self.models)

  @property
  def _read(self):
    references = [r for piece in self.transforms for r in piece.keywords.get("references", ())]
    return self.sources([*self.terms, *self.advantage, *(t for r in references for t in r.terms)])
