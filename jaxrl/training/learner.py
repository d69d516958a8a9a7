"""The two jitted functions of a phase: prepare a batch (once), update on it (once or more).

Weights and credit are computed over the whole batch, so a loop over micro-batches adds up to the
same gradient whatever their number. The loop's length is that of the rows in use: padding up to a
bucketed shape costs no compute. Rows are interleaved, so that each device holds an equal part of
every micro-batch and none has to be moved: row `j * micro_batches + i` is row j of micro-batch i.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from jaxrl import compose
from jaxrl import sharding
from jaxrl.advantages.chain import chain
from jaxrl.batch import PER_TOKEN
from jaxrl.batch import TokenBatch
from jaxrl.models import DecoderConfig
from jaxrl.models import model_outputs
from jaxrl.objectives import aggregate
from jaxrl.training.state import TrainState

REFERENCE = "reference_logprobs"


@dataclasses.dataclass(frozen=True)
class Learning:
  """What the jitted functions are made of.

  Attributes:
    decoder: the model.
    terms: objective terms, as `compose.build` returns them.
    advantage: chain of credit, empty where nothing is rewarded.
    aggregation, constant: see `objectives.aggregate.loss_weights`.
    optimizer: of the phase.
    learning_rate: its schedule, for the logs.
    temperature: of the distribution whose log-probabilities are meant.
    vocabulary_chunk: logits exist for this much of the vocabulary at a time.
    micro_batch_rows: rows of one forward and backward pass.
    with_behaviour: tokens were sampled, so their `behaviour_logprobs` mean something.
  """

  decoder: DecoderConfig
  terms: Sequence[Callable]
  advantage: Sequence[Callable]
  aggregation: str
  constant: float
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  temperature: float
  vocabulary_chunk: int
  micro_batch_rows: int
  with_behaviour: bool

  @property
  def needs_reference(self) -> bool:
    """Whether a piece reads log-probabilities of the reference."""
    return any(REFERENCE in compose.signals_of(p) for p in (*self.terms, *self.advantage))

  @property
  def term_signals(self) -> frozenset[str]:
    """Model outputs that the loss reads, in every update."""
    return frozenset(s for p in self.terms for s in compose.signals_of(p)) - {REFERENCE}

  @property
  def advantage_signals(self) -> frozenset[str]:
    """Model outputs that the credit chain reads, once per batch."""
    return frozenset(s for p in self.advantage for s in compose.signals_of(p)) - {REFERENCE}


@dataclasses.dataclass(frozen=True)
class Learner:
  """Jitted functions of one phase.

  Attributes:
    prepare: `(state, batch) -> batch` with the signals that credit and loss read.
    update: `(state, batch) -> (state, metrics)`; donates the state.
  """

  prepare: Callable[[TrainState, TokenBatch], TokenBatch]
  update: Callable[[TrainState, TokenBatch], tuple[TrainState, dict[str, jax.Array]]]


def make_learner(learning: Learning, state_shardings: TrainState) -> Learner:
  """Jits `prepare` and `update`; `state_shardings` keeps the state where it is.

  A prepared batch keeps the shardings of `sharding.put_batch`, so that one read back from a
  checkpoint is updated on by the same program, to the same bits.
  """
  mesh = jax.tree.leaves(state_shardings)[0].mesh
  return Learner(
      jax.jit(functools.partial(_prepare, learning), out_shardings=_batch_shardings(mesh)),
      jax.jit(functools.partial(_update, learning), donate_argnums=0,
              out_shardings=(state_shardings, None)))


def _batch_shardings(mesh: jax.sharding.Mesh) -> TokenBatch:
  """Those of `sharding.put_batch`, one for each field, whatever signals and columns there are."""
  by_rows = jax.NamedSharding(mesh, sharding.partition_spec(("rows",)))
  return TokenBatch(**{field.name: by_rows if field.name in PER_TOKEN else sharding.replicated(mesh)
                       for field in dataclasses.fields(TokenBatch)})


def to_micro_batches(batch: TokenBatch, rows: int) -> TokenBatch:
  """Interleaves the rows of a packed host batch for micro-batches of `rows` rows."""
  def interleave(x):
    return x.reshape(-1, rows, x.shape[-1]).swapaxes(0, 1).reshape(x.shape)
  return map_tokens(interleave, batch)


def map_tokens(function: Callable, batch: TokenBatch) -> TokenBatch:
  """Applies a function to every per-token array of a batch."""
  return batch.replace(**{name: jax.tree.map(function, getattr(batch, name))
                          for name in PER_TOKEN})


def _prepare(learning: Learning, state: TrainState, batch: TokenBatch) -> TokenBatch:
  if learning.needs_reference:
    batch = batch.with_signals(**_forward(learning, state.reference, batch, frozenset(),
                                          {"logprobs": REFERENCE}))
  if learning.advantage_signals:
    names = {s: s for s in learning.advantage_signals}
    batch = batch.with_signals(**_forward(learning, state.params, batch,
                                          learning.advantage_signals, names))
  if learning.with_behaviour:
    batch = batch.with_signals(advantages=chain(learning.advantage)(batch, batch.rewards))
  return batch


def _forward(learning, params, batch, signals, names):
  """Named outputs of a forward pass over all micro-batches. -> {name: [all rows, length]}"""
  rows, count = learning.micro_batch_rows, _count(learning, batch)

  def one(i):
    outputs = model_outputs(learning.decoder, params, _rows(batch, i, rows), signals=signals,
                            temperature=learning.temperature,
                            vocabulary_chunk=learning.vocabulary_chunk)
    return {new: getattr(outputs, old) for old, new in names.items()}

  def body(i, out):
    return jax.tree.map(lambda o, x: jax.lax.dynamic_update_index_in_dim(o, x, i, 1), out, one(i))

  out = jax.tree.map(lambda s: jnp.zeros((rows, count, *s.shape[1:]), s.dtype),
                     jax.eval_shape(one, 0))
  out = jax.lax.fori_loop(0, _used(batch, rows), body, out)
  return jax.tree.map(lambda o: o.reshape(-1, *o.shape[2:]), out)


def _update(learning: Learning, state: TrainState, batch: TokenBatch
            ) -> tuple[TrainState, dict[str, jax.Array]]:
  rows = learning.micro_batch_rows
  weights = aggregate.loss_weights(batch, learning.aggregation, constant=learning.constant)
  # Weights travel with the rows that they belong to.
  batch = batch.with_signals(loss_weights=weights, mean_weights=aggregate.mean_weights(batch))
  # Jitted, so that the loop below finds what `eval_shape` has traced.
  gradient_of = jax.jit(jax.value_and_grad(functools.partial(_loss, learning), has_aux=True))

  def body(i, total):
    (loss, (metrics, gap)), gradient = gradient_of(state.params, _rows(batch, i, rows))
    total_loss, total_metrics, total_gap, total_gradient = total
    add = functools.partial(jax.tree.map, lambda t, x: t + x.astype(t.dtype))
    return (total_loss + loss, add(total_metrics, metrics), jnp.maximum(total_gap, gap),
            add(total_gradient, gradient))

  (_, (metrics, _)), _ = jax.eval_shape(gradient_of, state.params, _rows(batch, 0, rows))
  zeros = (jnp.zeros(()), jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), metrics),
           jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), state.params))
  loss, metrics, gap, gradient = jax.lax.fori_loop(0, _used(batch, rows), body, zeros)
  rate = learning.learning_rate(state.step - state.skipped_steps)  # as the optimiser counts
  state, grad_norm = _apply(learning, state, loss, gradient)
  metrics |= {"loss": loss, "grad_norm": grad_norm, "skipped_steps": state.skipped_steps,
              "bad_steps": state.bad_steps, "learning_rate": jnp.asarray(rate)}
  if learning.with_behaviour:
    metrics["logprob_gap"] = gap
    metrics.setdefault("kl", metrics.get("behaviour_kl", jnp.zeros(())))
  return state, metrics


def _loss(learning, params, rows):
  """Loss of one micro-batch, its metrics, and the largest gap between sampler and trainer."""
  signals = learning.term_signals | ({"entropy"} if learning.with_behaviour else frozenset())
  outputs = model_outputs(learning.decoder, params, rows, signals=signals,
                          temperature=learning.temperature,
                          vocabulary_chunk=learning.vocabulary_chunk)
  means = rows.signals["mean_weights"]
  loss, metrics = aggregate.sum_of_terms(learning.terms)(outputs, rows,
                                                         rows.signals["loss_weights"], means)
  gap = jnp.zeros(())
  if learning.with_behaviour:
    metrics["entropy"] = jnp.sum(means * outputs.entropy)
    gap = jnp.max(jnp.where(rows.loss_mask, jnp.abs(outputs.logprobs - rows.behaviour_logprobs), 0))
  return loss, jax.lax.stop_gradient((metrics, gap))


def _apply(learning, state, loss, gradient):
  """One optimiser update, skipped and counted when a gradient is not finite."""
  grad_norm = optax.tree.norm(gradient)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

  def take(params, opt_state):
    updates, opt_state = learning.optimizer.update(
        jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  params, opt_state = jax.lax.cond(finite, take, lambda *same: same, state.params,
                                   state.opt_state)
  bad = 1 - finite.astype(jnp.int32)
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state,
                       bad_steps=(state.bad_steps + 1) * bad,
                       skipped_steps=state.skipped_steps + bad), grad_norm


def _count(learning, batch):
  """Micro-batches of a batch, padding included."""
  return batch.tokens.shape[0] // learning.micro_batch_rows


def _rows(batch, i, rows):
  """Micro-batch `i` of an interleaved batch. [rows, length]"""
  def take(x):
    return jax.lax.dynamic_index_in_dim(x.reshape(rows, -1, *x.shape[1:]), i, 1, keepdims=False)
  return map_tokens(take, batch)


def _used(batch, rows):
  """Micro-batches that hold anything; packing fills the first of them first."""
  used = jnp.any(batch.segment_ids != 0, axis=1).reshape(rows, -1)
  return jnp.sum(jnp.any(used, axis=0))
