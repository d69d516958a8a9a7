"""The two compiled functions of a phase: prepare a batch (once), update on it (once or more).

Weights and credit are computed over the whole batch, so a loop over micro-batches adds up to the
same gradient whatever their number. The loop's length is that of the rows in use: padding up to a
bucketed shape costs the compute of less than one micro-batch. Rows are interleaved, so that each
device holds an equal part of every micro-batch and none has to be moved: with a unit the rows of
one trunk (one row where there are no trunks), unit `j * micro_batches + i` is unit j of micro-batch
i.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl import compose
from jaxrl import programs
from jaxrl import sharding
from jaxrl.advantages.chain import credit
from jaxrl.batch import BY_ROWS
from jaxrl.batch import TokenBatch
from jaxrl.models import adapters
from jaxrl.models import model_outputs
from jaxrl.models import outputs as model_signals
from jaxrl.objectives import aggregate
from jaxrl.training import frozen
from jaxrl.training import master
from jaxrl.training import streams
from jaxrl.training.learning import Learning
from jaxrl.training.state import TrainState

MEANS = "mean_weights"  # the signal with the weights of diagnostics


@dataclasses.dataclass(frozen=True)
class Learner:
  """Compiled functions of one phase: jitted, or on a CPU with several cores `streams.SideBySide`.

  Attributes:
    signals: `(state, batch) -> ({name: array}, carried, metrics)`: what the loss reads and no
      update changes, what the credit chain remembers, and scalars that it logs.
    update: `(state, batch) -> (state, metrics)` for a prepared batch; donates the state.
    measure: `(state, batch) -> metrics` for a prepared batch: loss and diagnostics, and no update.
  """

  signals: Callable[[TrainState, TokenBatch], tuple[dict[str, jax.Array], Any, dict]]
  update: Callable[[TrainState, TokenBatch], tuple[TrainState, dict[str, jax.Array]]]
  measure: Callable[[TrainState, TokenBatch], dict[str, jax.Array]]

  def prepare(self, state: TrainState, batch: TokenBatch
              ) -> tuple[TrainState, TokenBatch, dict[str, jax.Array]]:
    """The state with what credit remembers, the batch with its signals, ready for any number of
    updates, and metrics of credit."""
    signals, carried, metrics = self.signals(state, batch)
    return state.replace(carried=carried), batch.with_signals(**signals), metrics


def make_learner(learning: Learning, state_shardings: TrainState) -> Learner:
  """Makes `prepare`, `update` and `measure`; `state_shardings` keeps the state where it is.

  A prepared batch keeps the shardings of `sharding.put_batch`, so that one read back from a
  checkpoint is updated on by the same program, to the same bits.
  """
  mesh = jax.tree.leaves(state_shardings)[0].mesh
  by_rows = jax.NamedSharding(mesh, sharding.partition_spec(("rows",)))
  of_signals = (by_rows, state_shardings.carried, None)
  functions = (
      (functools.partial(_outputs, learning), functools.partial(_signals, learning),
       dict(out_shardings=of_signals)),
      (functools.partial(_sums, learning, learning.part(state_shardings.params)),
       functools.partial(_update, learning, learning.part(state_shardings.params)),
       dict(donate_argnums=0, out_shardings=(state_shardings, None))),
      (functools.partial(_measured, learning), _measure, {}))

  def count(batch):
    return min(learning.streams, _micro_batches(batch))

  def program(part, whole, how, worth_it=True):
    if learning.streams == 1 or not worth_it:
      return programs.jit(_in_one(part, whole), **how)
    return streams.SideBySide(programs.jit(part), programs.jit(whole, **how), count, mesh)
  signals, update, measure = functions
  return Learner(program(*signals, worth_it=any(learning.frozen_signals.values())), program(*update),
                 program(*measure))


def _in_one(part, whole):
  """One program for all of the work, named as its last part."""
  def run(state, batch):
    return whole(state, batch, [part(state, batch)])
  run.__name__ = getattr(whole, "func", whole).__name__
  return run


def to_micro_batches(batch: TokenBatch, rows: int) -> TokenBatch:
  """Interleaves the units of a packed host batch for micro-batches of `rows` rows.

  Raises:
    ValueError: a micro-batch would tear the rows of a trunk apart.
  """
  total, unit = batch.tokens.shape[0], batch.rows_per_trunk
  if rows % unit or total % rows:
    raise ValueError(f"micro-batches of {rows} rows do not divide {total} rows, {unit} to a trunk")

  def interleave(x):
    inside = unit * len(x) // total  # rows of a unit, or its trunk
    units = x.reshape(total // rows, rows // unit, inside, *x.shape[1:])
    return units.swapaxes(0, 1).reshape(x.shape)
  return map_rows(interleave, batch).replace(micro_batch_rows=rows)


def map_rows(function: Callable, batch: TokenBatch) -> TokenBatch:
  """Applies a function to every array that is laid out by rows, or by the trunks of rows."""
  return batch.replace(**{name: jax.tree.map(function, getattr(batch, name)) for name in BY_ROWS})


def _signals(learning: Learning, state: TrainState, batch: TokenBatch, outputs: Sequence[dict]
             ) -> tuple[dict[str, jax.Array], Any, dict[str, jax.Array]]:
  """What the loss reads and no update changes, {name: [rows, length]}; memory, metrics.

  Args:
    outputs: of all parts of the batch, see `_outputs`.
  """
  # Each part has filled its own micro-batches and left zeros elsewhere.
  found = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *outputs)
  read = {signal for term in learning.terms for signal in compose.signals_of(term)}
  signals, carried, metrics = {k: x for k, x in found.items() if k in read}, state.carried, {}
  if learning.with_behaviour:
    now = {name: found[f"old_{name}"] for source, name in learning.sources(learning.advantage)
           if source == frozen.POLICY}
    pieces = [compose.at(piece, state.step) for piece in learning.advantage]
    give = credit(pieces, learning.terms, learning.hint)
    earned = give(batch.with_signals(**found, **now), batch.rewards, carried)
    signals |= {k: x for k, x in earned.signals.items() if k in read}
    signals["advantages"], carried, metrics = earned.values, earned.carried, dict(earned.metrics)
  whole, carried = batch.with_signals(**(found | signals)), dict(carried)
  for index, term in enumerate(learning.terms):
    name = compose.name_of(term)
    for signal in compose.signals_of(term):
      if signal not in whole.signals | signals and not model_signals.is_signal(signal):
        raise aggregate.missing(f"config.objective[{index}] ({name})", signal, whole,
                                learning.hint(signal))
    more, memory = compose.prepared(compose.at(term, state.step), whole, carried.get(name))
    signals |= more
    if name in carried:
      carried[name] = memory
  return signals, carried, metrics


def _outputs(learning, state, batch, part=0, parts=1):
  """Signals of frozen models and of the policy before updates; where there are several parts, 0 on
  the rows of others."""
  found = {}
  for source in (*state.frozen, *state.others, frozen.OLD):
    if names := learning.frozen_signals[source]:
      params = state.params if source == frozen.OLD else state.model(source)
      outputs = _forward(learning, learning.decoder_of(source), params, batch, names, state, part, parts)
      found |= {f"{source}_{name}": x for name, x in outputs.items()}
  return found


def _forward(learning, decoder, params, batch, names, state, part, parts):
  """Named outputs of a forward pass over a part's micro-batches. -> {name: [all rows, length, ...]}"""
  reference = _reference(state, names)

  def one(i):
    outputs = model_outputs(decoder, params, _rows(batch, i), signals=names,
                            logprobs="logprobs" in names,
                            temperature=learning.temperature_at(state.step),
                            vocabulary_chunk=learning.vocabulary_chunk, reference=reference,
                            reference_config=learning.decoder_of(frozen.REFERENCE))
    return {name: _by_unit(outputs.get(name), batch) for name in names}

  def all_rows(x, axes):  # the first of which say which token
    return x.reshape(*batch.tokens.shape, *x.shape[axes:])

  def body(i, out):
    return jax.tree.map(lambda o, x: jax.lax.dynamic_update_index_in_dim(o, x, i, 1), out, one(i))

  count = _micro_batches(batch)
  if count == 1:
    return jax.tree.map(lambda x: all_rows(x, 3), one(0))
  zeros = jax.tree.map(lambda s: jnp.zeros((s.shape[0], count, *s.shape[1:]), s.dtype),
                       jax.eval_shape(one, 0))
  return jax.tree.map(lambda x: all_rows(x, 4), _over_part(batch, part, parts, body, zeros))


def _sums(learning: Learning, shardings: Any, state: TrainState, batch: TokenBatch, part: int = 0,
          parts: int = 1) -> tuple[jax.Array, dict[str, jax.Array], jax.Array, Any]:
  """Loss, metrics, gap and gradient of a prepared batch, summed over a part's micro-batches."""
  batch, reference = _weighted(learning, batch), _reference(state, learning.term_signals)
  # Jitted, so that the loop and the shapes of its sums share one trace.
  gradient_of = jax.jit(jax.value_and_grad(functools.partial(_loss_of_part, learning), has_aux=True))

  def one(i):
    (loss, (metrics, gap)), gradient = gradient_of(learning.part(state.params), state.params,
                                                   _rows(batch, i), state.step, reference)
    gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
    if _devices(shardings) > 1:  # else XLA would be free to keep whole sums on every device
      gradient = jax.lax.with_sharding_constraint(gradient, shardings)
    return loss, metrics, gap, gradient

  if _micro_batches(batch) == 1:  # no second copy of the gradient
    return one(0)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
  return _over_part(batch, part, parts, lambda i, total: _add(total, one(i)), zeros)


def _update(learning: Learning, shardings: Any, state: TrainState, batch: TokenBatch,
            sums: Sequence[tuple]) -> tuple[TrainState, dict[str, jax.Array]]:
  """The state after one update, and metrics; `sums` are those of all parts, see `_sums`."""
  loss, metrics, gap, gradient = functools.reduce(_add, sums)
  rate = learning.learning_rate(state.step - state.skipped_steps)  # as the optimiser counts
  before = learning.part(state.params)
  state, grad_norm = _apply(learning, shardings, state, loss, gradient)
  state = state.replace(frozen=frozen.refresh(learning.models, state.frozen, before,
                                              learning.part(state.params), state.step))
  metrics |= {"loss": loss, "grad_norm": grad_norm, "skipped_steps": state.skipped_steps,
              "bad_steps": state.bad_steps, "learning_rate": jnp.asarray(rate)}
  if learning.with_behaviour:
    metrics["logprob_gap"] = gap
    metrics.setdefault("kl", metrics.get("behaviour_kl", jnp.zeros(())))
  return state, metrics


def _weighted(learning, batch):
  """The batch with the weights of its tokens, which travel with the rows that they belong to."""
  weights = {_weights_of(a): aggregate.loss_weights(batch, a.kind, constant=a.constant)
             for a in learning.aggregations}
  means = {_means_of(term): aggregate.mean_weights(batch, compose.is_by_sequence(term))
           for term in learning.terms}
  means[MEANS] = aggregate.mean_weights(batch)
  return batch.with_signals(**means, **weights)


def _reference(state, signals):
  """Parameters of the reference, if signals compare whole distributions with its own."""
  return state.model(frozen.REFERENCE) if model_signals.DIVERGENCE in signals else None


def _measured(learning: Learning, state: TrainState, batch: TokenBatch, part: int = 0, parts: int = 1
              ) -> dict[str, jax.Array]:
  """Loss and metrics of a prepared batch, summed over a part's micro-batches."""
  batch, reference = _weighted(learning, batch), _reference(state, learning.term_signals)

  def one(i):
    loss, (metrics, _) = _loss(learning, state.params, _rows(batch, i), state.step, reference)
    return {"loss": loss, **metrics}

  add = functools.partial(jax.tree.map, jnp.add)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
  return _over_part(batch, part, parts, lambda i, total: add(total, one(i)), zeros)


def _measure(state, batch, measured):
  """The metrics of all parts, see `_measured`."""
  del state, batch
  return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *measured)


def _add(total, more):
  """Sums of losses, metrics and gradients; the largest of the gaps."""
  (loss, metrics, gap, gradient), (loss_, metrics_, gap_, gradient_) = total, more
  add = functools.partial(jax.tree.map, jnp.add)
  return loss + loss_, add(metrics, metrics_), jnp.maximum(gap, gap_), add(gradient, gradient_)


def _devices(shardings):
  return jax.tree.leaves(shardings)[0].mesh.size


def _over_part(batch, part, parts, body, start):
  """What `fori_loop(..., body, start)` gives over one of equal shares of the micro-batches in use."""
  used = _used(batch)
  return jax.lax.fori_loop(used * part // parts, used * (part + 1) // parts, body, start)


def _means_of(term):
  """The name of the signal with the weights of a term's diagnostics."""
  return f"{MEANS}/sequences" if compose.is_by_sequence(term) else MEANS


def _weights_of(aggregation):
  """The name of the signal with the weights of an aggregation."""
  return f"loss_weights/{aggregation.kind}/{aggregation.constant}"


def _loss(learning, params, rows, step, reference):
  """Loss of one micro-batch, its metrics, and the largest gap between sampler and trainer."""
  signals = learning.term_signals | ({"entropy"} if learning.with_behaviour else frozenset())
  outputs = model_outputs(learning.decoder, params, rows, signals=signals,
                          logprobs=learning.reads_logprobs,
                          temperature=learning.temperature_at(step),
                          vocabulary_chunk=learning.vocabulary_chunk, reference=reference,
                          reference_config=learning.decoder_of(frozen.REFERENCE))
  means = [rows.signals[_means_of(term)] for term in learning.terms]
  weights = [a.weight_at(step) * rows.signals[_weights_of(a)] for a in learning.aggregations]
  terms = [compose.at(term, step) for term in learning.terms]
  loss, metrics = aggregate.sum_of_terms(terms)(outputs, rows, weights, means)
  gap = jnp.zeros(())
  if learning.with_behaviour:
    metrics["entropy"] = jnp.sum(rows.signals[MEANS] * outputs.entropy)
    gap = jnp.max(jnp.where(rows.loss_mask, jnp.abs(outputs.logprobs - rows.behaviour_logprobs), 0))
  return loss, jax.lax.stop_gradient((metrics, gap))


def _loss_of_part(learning, part, params, *rest):
  """The same as a function of what is trained, so that nothing else has a gradient."""
  return _loss(learning, adapters.joined(params, part), *rest)


def _gradient_of(learning, shardings, state):
  """What transformations call for the gradient of a loss of their own: `(loss, batch) -> gradient`
  at the current parameters, in one stream. The loss has `terms` and `aggregations`."""
  def gradient_of(loss, batch):
    own = dataclasses.replace(learning, terms=loss.terms, aggregations=loss.aggregations,
                              advantage=(), with_behaviour=False, temperature=1.0)
    mesh = jax.tree.leaves(shardings)[0].mesh
    if mesh.size > 1 and batch.tokens.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
      batch = jax.lax.with_sharding_constraint(batch, sharding.batch_sharding(mesh)(batch))
    plain = state.replace(carried={})
    batch = batch.with_signals(**_signals(own, plain, batch, [_outputs(own, plain, batch)])[0])
    return _sums(own, shardings, state, batch)[3]
  return gradient_of


def _apply(learning, shardings, state, loss, gradient):
  """One optimiser update, skipped and counted when a gradient is not finite."""
  grad_norm = optax.tree.norm(gradient)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  opt_state = state.opt_state
  if learning.offload:  # fetched when there is a gradient, and no activations any more
    gradient, opt_state = jax.lax.optimization_barrier((gradient, opt_state))
    opt_state = sharding.on_device(opt_state)

  def take(params, opt_state):
    return master.step(learning.optimizer, gradient, opt_state, params,
                       gradient_of=_gradient_of(learning, shardings, state))

  part, opt_state = jax.lax.cond(finite, take, lambda *same: same, learning.part(state.params), opt_state)
  bad = 1 - finite.astype(jnp.int32)
  return state.replace(step=state.step + 1, params=adapters.joined(state.params, part), opt_state=opt_state,
                       bad_steps=(state.bad_steps + 1) * bad,
                       skipped_steps=state.skipped_steps + bad), grad_norm


def _micro_batches(batch):
  """Micro-batches that a batch is interleaved for, padding included."""
  rows = batch.tokens.shape[0]
  return rows // (batch.micro_batch_rows or rows)


def _by_unit(x, batch):
  """[rows, ...] -> [units, rows of a unit, ...]"""
  return x.reshape(-1, batch.rows_per_trunk, *x.shape[1:])


def _rows(batch, i):
  """Micro-batch `i` of an interleaved batch. [rows, length]"""
  count = _micro_batches(batch)
  units = len(batch.trunk_lengths) // count

  def take(x):
    inside = len(x) // (units * count)  # rows of a unit, or its trunk
    mine = jax.lax.dynamic_index_in_dim(x.reshape(units, count, inside, *x.shape[1:]), i, 1, False)
    return mine.reshape(units * inside, *x.shape[1:])
  return map_rows(take, batch).replace(micro_batch_rows=0)


def _used(batch):
  """Micro-batches that hold anything; packing fills the first of them first."""
  used = _by_unit(jnp.any(batch.segment_ids != 0, axis=1), batch)
  used = used.reshape(-1, _micro_batches(batch), batch.rows_per_trunk)
  return jnp.sum(jnp.any(used, axis=(0, 2)))
