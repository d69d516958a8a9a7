"""From a packed batch to what losses read: log-probabilities, entropy, values, scores, states.

Here, and nowhere else, the state before a token meets the token that it predicts.
"""

from collections.abc import Collection, Iterable
import dataclasses

from flax.core import meta
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.compose import nearest
from jaxrl.models import adapters
from jaxrl.models import distributions
from jaxrl.models.decoder import STATES, Decoder, DecoderConfig
from jaxrl.models.decoder_config import VALUE as VALUE_HEAD
from jaxrl.models.logprobs import token_logits, token_logprobs

DIVERGENCE = "reference_kl"  # the signal of two models
MODEL_SIGNALS = ("logprobs", "entropy", "hidden", "values", "action_values", "scores", "yes_logprobs",
                 *distributions.SIGNALS)
VALUES = ("values", "action_values")  # of the critic, if the config has one
HIDDEN = "hidden"


def init_parameters(config: DecoderConfig, key: Array) -> PyTree:
  """Random parameters, boxed with their logical axes until `unbox`.

  `{"params": ...}` are the policy's; with `config.critic` there are `{"critic": ...}` too.
  """
  tokens = jnp.zeros((1, 2), jnp.int32)

  def init(config, key):
    params = Decoder(config).init(key, tokens, tokens, jnp.ones_like(tokens))["params"]
    return adapters.without_other_layers(params, config.adapters)
  if not config.critic:
    return {"params": init(config, key)}
  return {"params": init(config, key), "critic": init(critic_of(config), jax.random.fold_in(key, 1))}


def is_signal(name: str) -> bool:
  """Whether a model can say what is named; other signals come from episodes or credit."""
  return name == DIVERGENCE or layer_of(name) is not None or distributions.split(name)[0] in MODEL_SIGNALS


def layer_of(name: str) -> int | None:
  """`hidden@-2` -> -2; None for signals that are no states of a layer.

  Raises:
    ValueError: no whole number after the @.
  """
  base, at, layer = name.partition("@")
  if base != HIDDEN or not at:
    return None
  try:
    return int(layer)
  except ValueError:
    raise ValueError(f"signal {name!r} is written {HIDDEN}@LAYER, as in {HIDDEN}@3 or {HIDDEN}@-2") from None


def critic_of(config: DecoderConfig) -> DecoderConfig:
  """The decoder whose only head is the value: that of `config.critic`."""
  return dataclasses.replace(config, critic=False, adapters=(), tie_embeddings=True,
                             heads_on_top=((VALUE_HEAD, 1),))


def critic_from_policy(config: DecoderConfig, params: PyTree) -> PyTree:
  """The parameters with a critic that begins as the policy, adapters included and its head aside."""
  policy, critic = adapters.merged(params["params"], config.adapters), params["critic"]
  copied = {name: jax.tree.map(jnp.copy, policy[name]) if name in policy else own
            for name, own in critic.items()}
  return {**params, "critic": copied}


def unbox(parameters: PyTree) -> PyTree:
  """The same tree with plain arrays."""
  return meta.unbox(parameters)


def model_outputs(config: DecoderConfig, params: PyTree, batch: TokenBatch, *,
                  signals: Collection[str] = (), logprobs: bool = True,
                  temperature: float | Array = 1.0, vocabulary_chunk: int = 4096,
                  reference: PyTree | None = None, reference_config: DecoderConfig | None = None
                  ) -> ModelOutputs:
  """Runs the decoder over packed rows and computes what was asked for.

  Args:
    config: of the decoder.
    params: plain arrays, `{"params": ...}`.
    batch: packed rows.
    signals: any of `MODEL_SIGNALS`:
      `entropy`: of the distribution that tokens[t] is drawn from, in nats; differentiable.
      `hidden`: final hidden state at tokens[t].
      `hidden@L`: that of a layer: 0 is what enters the first, i what leaves the i-th, and that of the
        last is the final one, after the last norm; -1, -2, ... count from it, as in transformers.
      `values`: the head `value` read just before tokens[t].
      `action_values`: the head `value` read at tokens[t], which knows the token.
      `scores`: all other heads read at tokens[t], in the order of the config, and its verdict.
      `yes_logprobs`: log-probability of "yes", the first token of the verdict, just after tokens[t].
      `reference_kl`: KL(policy || reference) over the whole vocabulary.
      those of `models.distributions`: of the distribution that tokens[t] is drawn from.
    logprobs: whether log-probabilities are wanted; without them and entropy no logit is computed.
    temperature: of the distribution that the log-probabilities and entropies are about.
    vocabulary_chunk: as `chunk` of `token_logprobs`.
    reference: parameters of the reference, for `reference_kl`.
    reference_config: its decoder, if that is another one, over as many tokens.

  Returns:
    All but states, `scores` and `yes_logprobs` are 0 on padding and at the first token of segments,
    which nothing predicts. What was not asked for is None.

  Raises:
    ValueError: unknown signal, or a head that the config lacks.
  """
  check_signals(config, signals)
  decoder, layers = Decoder(config), _layers(config, signals)
  keep = tuple(sorted(set(layers.values()) - {config.layers}))
  hidden, before, kept = _hidden_states(decoder.clone(keep=keep), params, batch)
  predicted = _is_predicted(batch)
  outputs = ModelOutputs(hidden=hidden if HIDDEN in signals else None,
                         layers={name: kept.get(layer, hidden) for name, layer in layers.items()})
  logprobs = logprobs or "logprobs" in signals
  vocabulary = decoder.apply(params, method="vocabulary")
  if logprobs or "entropy" in signals:
    about_tokens = token_logprobs(
        before, vocabulary, batch.tokens, chunk=vocabulary_chunk,
        temperature=temperature, soft_cap=config.logit_soft_cap, entropy="entropy" in signals)
    kept = [None if x is None else jnp.where(predicted, x, 0) for x in about_tokens]
    outputs = outputs.replace(logprobs=kept[0] if logprobs else None, entropy=kept[1])
  how = dict(temperature=temperature, soft_cap=config.logit_soft_cap)
  of_distribution = [s for s in signals
                     if s not in layers and distributions.split(s)[0] in distributions.SIGNALS]
  found = {}
  if of_distribution:
    found = distributions.about_tokens(before, vocabulary, of_distribution, **how)
  if DIVERGENCE in signals:
    reference, theirs = jax.lax.stop_gradient(reference), Decoder(reference_config or config)
    _, other, _ = _hidden_states(theirs, reference, batch)
    found[DIVERGENCE] = distributions.divergence(
        before, vocabulary, other, theirs.apply(reference, method="vocabulary"),
        other_soft_cap=theirs.config.logit_soft_cap, **how)
  outputs = outputs.replace(distribution={k: jnp.where(predicted, x, 0) for k, x in found.items()})
  if set(VALUES) & set(signals):
    critic, critic_params, states = decoder, params, (before, hidden)
    if config.critic:
      critic, critic_params = Decoder(critic_of(config)), {"params": params["critic"]}
      states = _hidden_states(critic, critic_params, batch)[1::-1]
    for name, state in zip(VALUES, states):
      if name in signals:
        values = critic.apply(critic_params, VALUE_HEAD, state, method="head")[..., 0]
        outputs = outputs.replace(**{name: jnp.where(predicted, values, 0)})
  if "scores" in signals:
    outputs = outputs.replace(scores=scores_at(decoder, params, hidden))
  if "yes_logprobs" in signals:
    yes = jnp.full_like(batch.tokens, config.verdict[0])
    outputs = outputs.replace(yes_logprobs=token_logprobs(
        hidden, vocabulary, yes, chunk=vocabulary_chunk, soft_cap=config.logit_soft_cap)[0])
  return outputs


def scores_at(decoder: Decoder, params: PyTree, hidden: Float[Array, "rows length width"]
              ) -> Float[Array, "rows length heads"]:
  """What all heads but `value` say at hidden states, in the order of the config, in float32.

  With `config.verdict` the last one is `z(yes) - z(no) = log p(yes) - log p(no)` (RLBFF,
  arXiv:2509.21319), from two rows of the vocabulary and no parameters of its own.
  """
  config = decoder.config
  found = [decoder.apply(params, name, hidden, method="head").astype(jnp.float32)
           for name, _ in config.heads_on_top if name != VALUE_HEAD]
  if config.verdict:
    two = decoder.apply(params, method="vocabulary")[jnp.array(config.verdict)]
    yes, no = jnp.split(token_logits(hidden, two, soft_cap=config.logit_soft_cap), 2, axis=-1)
    found.append(yes - no)
  return jnp.concatenate(found, axis=-1)


def _hidden_states(decoder, params, batch):
  """Hidden states at the tokens of rows, just before each of them, and after the layers that the
  decoder keeps, by their numbers. [rows, length, width]"""
  trunks, trunk_length = batch.trunk_tokens.shape
  index = jnp.broadcast_to(jnp.arange(trunk_length), batch.trunk_tokens.shape)
  in_trunk = index < batch.trunk_lengths[:, None]

  def unit(trunk, rows):
    return jnp.concatenate([trunk, rows.reshape(trunks, -1)], axis=1) if trunk_length else rows

  def of_rows(states):
    return states[:, trunk_length:].reshape(*batch.tokens.shape, -1)

  (hidden, _), sown = decoder.apply(
      params, unit(batch.trunk_tokens, batch.tokens), unit(index, batch.positions),
      unit(in_trunk.astype(jnp.int32), batch.segment_ids), trunk_length=trunk_length,
      rows=batch.rows_per_trunk if trunk_length else 1, longest=batch.longest, falling=True,
      mutable=[STATES])
  trunk, hidden = hidden[:, :trunk_length], of_rows(hidden)
  kept = {int(layer): of_rows(states) for layer, (states,) in sown.get(STATES, {}).items()}
  before = jnp.roll(hidden, 1, axis=1)
  if trunk_length:  # the end of its trunk is what comes before the first token of a segment
    last = jnp.maximum(batch.trunk_lengths - 1, 0)[:, None, None]
    last = jnp.repeat(jnp.take_along_axis(trunk, last, axis=1), batch.rows_per_trunk, axis=0)
    before = jnp.where(_starts(batch)[..., None], last, before)
  return hidden, before, kept


def _layers(config, signals):
  """The layers, counted from 0, whose states signals ask for, by the name of the signal."""
  found = {name: layer for name in signals if (layer := layer_of(name)) is not None}
  return {name: layer if layer >= 0 else config.layers + 1 + layer for name, layer in found.items()}


def _starts(batch: TokenBatch) -> Bool[Array, "rows length"]:
  """First tokens of segments, and of rows."""
  same = batch.segment_ids == jnp.roll(batch.segment_ids, 1, axis=1)
  return ~same | (jnp.arange(same.shape[1]) == 0)


def _is_predicted(batch: TokenBatch) -> Bool[Array, "rows length"]:
  """Tokens that another one comes before."""
  starts = _starts(batch)
  if batch.trunk_tokens.shape[1]:
    trunks = jnp.repeat(batch.trunk_lengths > 0, batch.rows_per_trunk)
    starts &= ~trunks[:, None]
  return ~starts & (batch.segment_ids != 0)


def check_signals(config: DecoderConfig, signals: Iterable[str]) -> None:
  """Refuses signals that a model cannot give.

  Raises:
    ValueError: unknown signal, or a head that the config lacks.
  """
  signals, heads = list(signals), [name for name, _ in config.heads_on_top]
  for name in signals:
    if not is_signal(name):
      raise ValueError(f"a model has no signal {name!r}{nearest(name, MODEL_SIGNALS)}")
  for name, layer in _layers(config, signals).items():
    if not 0 <= layer <= config.layers:
      raise ValueError(f"signal {name!r}, but config.model.layers={config.layers}: layers are 0, which is "
                       f"before the first, to {config.layers}, or -{config.layers + 1} to -1 from the end")
  wanted = sorted(set(VALUES) & set(signals))
  if wanted and VALUE_HEAD not in heads and not config.critic:
    raise ValueError(f"signal {wanted[-1]!r} needs a value head, but config.model.heads_on_top={heads}: "
                     f"add ({VALUE_HEAD!r}, 1) to config.model.heads_on_top, or set "
                     "config.model.critic for a critic of its own")
  if "scores" in signals and not set(heads) - {VALUE_HEAD} and not config.verdict:
    raise ValueError(f"signal 'scores' needs a scalar head, but config.model.heads_on_top={heads}: "
                     "add ('score', 1) to config.model.heads_on_top, or set config.model.verdict")
  if "yes_logprobs" in signals and not config.verdict:
    raise ValueError("signal 'yes_logprobs' needs config.model.verdict, such as ('yes', 'no')")
