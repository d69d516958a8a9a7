"""From a packed batch to what losses read: log-probabilities, entropy, values, scores, states.

Here, and nowhere else, what a state says about the next token moves to the token it is about.
"""

from collections.abc import Collection

from flax.core import meta
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxrl.batch import ModelOutputs, TokenBatch
from jaxrl.compose import nearest
from jaxrl.models.decoder import Decoder, DecoderConfig
from jaxrl.models.logprobs import token_logprobs

MODEL_SIGNALS = ("entropy", "hidden", "values", "scores")
VALUE_HEAD = "value"  # of `heads_on_top`; the others are scores


def init_parameters(config: DecoderConfig, key: Array) -> PyTree:
  """Random parameters, `{"params": ...}`, boxed with their logical axes until `unbox`."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  return Decoder(config).init(key, tokens, tokens, jnp.ones_like(tokens))


def unbox(parameters: PyTree) -> PyTree:
  """The same tree with plain arrays."""
  return meta.unbox(parameters)


def model_outputs(config: DecoderConfig, params: PyTree, batch: TokenBatch, *,
                  signals: Collection[str] = (), logprobs: bool = True,
                  temperature: float | Array = 1.0, vocabulary_chunk: int = 4096) -> ModelOutputs:
  """Runs the decoder over packed rows and computes what was asked for.

  Args:
    config: of the decoder.
    params: plain arrays, `{"params": ...}`.
    batch: packed rows.
    signals: any of `MODEL_SIGNALS`:
      `entropy`: of the distribution that tokens[t] is drawn from, in nats; differentiable.
      `hidden`: final hidden state at tokens[t].
      `values`: the head `value` read just before tokens[t].
      `scores`: all other heads read at tokens[t], in the order of the config.
    logprobs: whether log-probabilities are wanted; without them and entropy no logit is computed.
    temperature: of the distribution that the log-probabilities and entropies are about.
    vocabulary_chunk: as `chunk` of `token_logprobs`.

  Returns:
    `logprobs`, `entropy` and `values` are 0 on padding and at the first token of every segment,
    which nothing predicts. What was not asked for is None.

  Raises:
    ValueError: unknown signal, or a head that the config lacks.
  """
  _check_signals(config, signals)
  decoder = Decoder(config)
  hidden, _ = decoder.apply(params, batch.tokens, batch.positions, batch.segment_ids)
  outputs = ModelOutputs(hidden=hidden if "hidden" in signals else None)
  if logprobs or "entropy" in signals:
    about_next = token_logprobs(
        hidden, decoder.apply(params, method="vocabulary"), jnp.roll(batch.tokens, -1, axis=1),
        chunk=vocabulary_chunk, temperature=temperature, soft_cap=config.logit_soft_cap,
        entropy="entropy" in signals)
    shifted = [None if x is None else about_own_token(batch, x) for x in about_next]
    outputs = outputs.replace(logprobs=shifted[0] if logprobs else None, entropy=shifted[1])
  heads = {name: decoder.apply(params, name, hidden, method="head")
           for name, _ in config.heads_on_top
           if ("values" if name == VALUE_HEAD else "scores") in signals}
  if "values" in signals:
    outputs = outputs.replace(values=about_own_token(batch, heads.pop(VALUE_HEAD)[..., 0]))
  if "scores" in signals:
    outputs = outputs.replace(scores=jnp.concatenate(list(heads.values()), axis=-1))
  return outputs


def about_own_token(batch: TokenBatch, about_next: Float[Array, "rows length"]
                    ) -> Float[Array, "rows length"]:
  """Moves what position t says about tokens[t + 1] to t + 1; 0 where a segment starts."""
  segments = batch.segment_ids
  predicted = (segments == jnp.roll(segments, 1, axis=1)) & (segments != 0)
  predicted &= jnp.arange(segments.shape[1]) > 0
  return jnp.where(predicted, jnp.roll(about_next, 1, axis=1), 0)


def _check_signals(config, signals):
  for name in signals:
    if name not in MODEL_SIGNALS:
      raise ValueError(f"a model has no signal {name!r}{nearest(name, MODEL_SIGNALS)}")
  heads = [name for name, _ in config.heads_on_top]
  if "values" in signals and VALUE_HEAD not in heads:
    raise ValueError(f"signal 'values' needs a value head, but config.model.heads_on_top={heads}: "
                     f"add ({VALUE_HEAD!r}, 1) to config.model.heads_on_top")
  if "scores" in signals and not set(heads) - {VALUE_HEAD}:
    raise ValueError(f"signal 'scores' needs a scalar head, but config.model.heads_on_top={heads}: "
                     "add ('score', 1) to config.model.heads_on_top")
