"""One decoder-only transformer for the Llama, Qwen, Gemma, OLMo and GPT-NeoX dialects.

A dialect is a setting of `DecoderConfig`, never another model file. The same parameters serve three
calls: packed rows in training, prompts before sampling (both `Decoder.__call__`), and one token for
each sample of each prompt (`Decoder.decode`).
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from jaxrl import sharding
from jaxrl.models import adapters
from jaxrl.models import cached_attention
from jaxrl.models import experts
from jaxrl.models import packed_attention
from jaxrl.models import products
from jaxrl.models import rope
from jaxrl.models.cached_attention import DecodeStep, KeyValues, LayerCache, Rows
from jaxrl.models.decoder_config import ACTIVATIONS, REMAT_POLICIES, THRESHOLDS, VALUE, DecoderConfig
from jaxrl.models.packed_attention import PackedRows

STATES = "states"  # the collection of `Decoder.keep`


def partitioned(initializer, *axes):
  """An initializer whose parameter carries logical axis names."""
  return nn.with_logical_partitioning(initializer, axes)


class RMSNorm(nn.Module):
  """Root-mean-square normalisation over the last axis, computed in float32."""

  config: DecoderConfig
  axis: str = "embed"

  @nn.compact
  def __call__(self, x):
    c = self.config
    init = nn.initializers.zeros if c.norm_offset else nn.initializers.ones
    scale = self.param("scale", partitioned(init, self.axis), (x.shape[-1],), c.param_dtype)
    shape, x32 = x.shape, sharding.flat(x.astype(jnp.float32))
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 ** 2, axis=-1, keepdims=True) + c.norm_epsilon)
    return (x32 * (scale.astype(jnp.float32) + c.norm_offset)).astype(c.dtype).reshape(shape)


class LayerNorm(nn.Module):
  """Normalisation to mean 0 and variance 1 over the last axis, computed in float32."""

  config: DecoderConfig
  axis: str = "embed"

  @nn.compact
  def __call__(self, x):
    c = self.config
    scale, bias = (self.param(name, partitioned(init, self.axis), (x.shape[-1],), c.param_dtype)
                   for name, init in (("scale", nn.initializers.ones), ("bias", nn.initializers.zeros)))
    shape, x32 = x.shape, sharding.flat(x.astype(jnp.float32))
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 ** 2, axis=-1, keepdims=True) + c.norm_epsilon)
    return (x32 * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(c.dtype).reshape(shape)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class Projection(nn.Module):
  """A dense layer with named axes: contracts the last `len(inputs)` axes into `outputs`."""

  config: DecoderConfig
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]
  shape: tuple[int, ...]  # of the outputs
  use_bias: bool = False
  scale: float = 1.0  # of the initial variance

  @nn.compact
  def __call__(self, x):
    c, n = self.config, len(self.inputs)
    init = nn.initializers.variance_scaling(
        self.scale, "fan_in", "normal", in_axis=tuple(range(n)),
        out_axis=tuple(range(n, n + len(self.shape))))
    kernel = self.param("kernel", partitioned(init, *self.inputs, *self.outputs),
                        x.shape[-n:] + self.shape, c.param_dtype)
    y = products.contract(n, x, kernel.astype(c.dtype))
    if self.has_variable("scales", "kernel"):  # of integers, see sampling.precision
      y = y * self.get_variable("scales", "kernel").astype(c.dtype)
    for adapter in adapters.of_module(self, c.adapters):
      y = y + adapters.LowRank(adapter, self.inputs, self.outputs, self.shape, c.dtype, name=adapter.name)(x)
    if self.use_bias:
      bias = self.param("bias", partitioned(nn.initializers.zeros, *self.outputs), self.shape,
                        c.param_dtype)
      y = y + bias.astype(c.dtype)
    return y


class Constant(nn.Module):
  """Numbers that are learned and depend on no input."""

  config: DecoderConfig
  outputs: int

  @nn.compact
  def __call__(self, x):
    bias = self.param("bias", partitioned(nn.initializers.zeros, "head"), (self.outputs,),
                      self.config.param_dtype)
    return jnp.broadcast_to(bias.astype(self.config.dtype), (*x.shape[:-1], self.outputs))


class Attention(nn.Module):
  """Grouped-query attention with rotary positions, over packed rows or over a cache."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x, turns, packed, cache, step, sliding):
    c = self.config
    heads = functools.partial(Projection, c, ("embed",), use_bias=c.qkv_bias)
    q = heads(outputs=("heads", "head_dim"), shape=(c.heads, c.width), name="query")(x)
    k = heads(outputs=("kv_heads", "head_dim"), shape=(c.kv_heads, c.width), name="key")(x)
    v = heads(outputs=("kv_heads", "head_dim"), shape=(c.kv_heads, c.width), name="value")(x)
    if c.qk_norm:
      q = self._normalised(q, "query_norm", "heads")
      k = self._normalised(k, "key_norm", "kv_heads")
    turns = _turns_of_layer(c, turns, sliding)
    q, k = rope.rotate(q, turns), rope.rotate(k, turns)
    q = q * (c.query_scale or c.width ** -0.5)
    q = q.reshape(*q.shape[:2], c.kv_heads, c.heads // c.kv_heads, c.width)
    window = _window(c, sliding)
    if cache is not None:
      q, k, v = q[:, 0], k[:, 0], v[:, 0]  # one token per row
      out = cached_attention.attend(q, k, v, cache, *step, window=window,
                                    soft_cap=c.attention_soft_cap)
    else:
      out = packed_attention.attend(q, k, v, packed, window=window, soft_cap=c.attention_soft_cap,
                                    kernel=c.attention)
      k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [rows, kv_heads, length, width]
    out = out.reshape(*x.shape[:2], c.heads, c.width)
    out = Projection(c, ("heads", "head_dim"), ("embed",), (c.d_model,), c.output_bias,
                     scale=0.5 / c.layers, name="output")(out)
    return out, KeyValues(k, v)

  def _normalised(self, x, name, axis):
    """Queries or keys, normalised by head or over all of them."""
    if not self.config.qk_norm_across_heads:
      return RMSNorm(self.config, "head_dim", name=name)(x)
    return RMSNorm(self.config, axis, name=name)(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


def _turns(c: DecoderConfig, positions):
  """Rotations at every position: of full layers, and of sliding ones where they differ."""
  scaling = dict(c.rope_scaling)
  full = rope.turns(positions, rope.frequencies(c.rotated, c.rope_theta, scaling, c.rope_length))
  if (factor := rope.attention_factor(scaling)) != 1:
    full = jax.tree.map(lambda turn: factor * turn, full)
  if not c.rope_local_theta:
    return [full]
  return [full, rope.turns(positions, rope.frequencies(c.rotated, c.rope_local_theta, {}))]


def _turns_of_layer(c: DecoderConfig, turns, sliding):
  if not c.rope_local_theta:
    return turns[0]
  return jax.tree.map(lambda full, local: jnp.where(sliding, local, full), *turns)


def _window(c: DecoderConfig, sliding):
  """Visible tokens in this layer, None if all layers see everything."""
  if not any(c.is_sliding):
    return None
  return jnp.where(sliding, c.sliding_window, np.iinfo(np.int32).max)


class MLP(nn.Module):
  """Feed-forward layer: `down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))`."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x):
    c = self.config
    wide = functools.partial(Projection, c, ("embed",), ("mlp",), (c.d_ff,), c.mlp_bias)
    activation = ACTIVATIONS[c.activation]
    hidden = (products.gated(activation, wide(name="gate")(x), wide(name="up")(x)) if c.gated_mlp else
              activation(wide(name="up")(x)))
    return Projection(c, ("mlp",), ("embed",), (c.d_model,), c.mlp_bias, scale=0.5 / c.layers,
                      name="down")(hidden)


class Experts(nn.Module):
  """Several gated MLPs, a few of which each token is sent to, see `models.experts`."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x):
    c = self.config
    logits = Projection(c, ("embed",), ("experts",), (c.experts,), name="router")(x)
    chosen, weights = experts.route(logits, c.experts_per_token, normalise=c.normalise_experts)
    wide = functools.partial(ExpertKernel, c, ("embed", "mlp"), (c.d_model, c.expert_d_ff))
    down = ExpertKernel(c, ("mlp", "embed"), (c.expert_d_ff, c.d_model), 0.5 / c.layers, name="down")
    return experts.mixture(x, chosen, weights.astype(c.dtype), wide(name="gate")(), wide(name="up")(), down(),
                           activation=ACTIVATIONS[c.activation])


class ExpertKernel(nn.Module):
  """The matrices of all experts. [experts, inputs, outputs]"""

  config: DecoderConfig
  axes: tuple[str, str]
  shape: tuple[int, int]
  scale: float = 1.0  # of the initial variance

  @nn.compact
  def __call__(self):
    c = self.config
    init = nn.initializers.variance_scaling(self.scale, "fan_in", "normal", batch_axis=0)
    kernel = self.param("kernel", partitioned(init, "experts", *self.axes), (c.experts, *self.shape),
                        c.param_dtype).astype(c.dtype)
    if self.has_variable("scales", "kernel"):  # of integers, see sampling.precision
      kernel = kernel * self.get_variable("scales", "kernel").astype(c.dtype)[:, None]
    return kernel


class Block(nn.Module):
  """Attention and MLP with residual connections; returns `(x, KeyValues)` as `nn.scan` wants."""

  config: DecoderConfig
  sparse: bool = False

  @nn.compact
  def __call__(self, x, turns, packed, step, cache, sliding):
    c = self.config

    def norm(name, x, wanted):
      return NORMS[c.norm](c, name=name)(x) if wanted else x
    out, key_values = Attention(c, name="attention")(
        norm("attention_norm", x, c.pre_norms), turns, packed, cache, step, sliding)
    attended = x + norm("attention_post_norm", out, c.post_norms)
    read = norm("mlp_norm", x if c.parallel_residual else attended, c.pre_norms)
    out = Experts(c, name="experts")(read) if self.sparse else MLP(c, name="mlp")(read)
    x = attended + norm("mlp_post_norm", out, c.post_norms)
    # Without this, XLA may split activations by `fsdp` like the parameters, not by rows.
    return sharding.constrain(x, "rows", "length", None) if cache is None else x, key_values


class Keeping(Block):
  """A block of a scan that keeps the states after some layers; others pass them on.

  The carry is `(x, {layer: states})`, so that memory holds those of the layers wanted, not of all.
  """

  def __call__(self, carry, turns, packed, step, cache, sliding, layer):
    x, kept = carry
    x, key_values = super().__call__(x, turns, packed, step, cache, sliding)
    return (x, {wanted: jnp.where(layer == wanted, x, old) for wanted, old in kept.items()}), key_values


def _rematerialised(c: DecoderConfig, block: type[Block] = Block) -> type[nn.Module]:
  """The block whose backward pass computes again what the config says."""
  if c.remat == "none":
    return block
  return nn.remat(block, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan_layers)


@functools.lru_cache(maxsize=32)
def _block(c: DecoderConfig, sparse: bool) -> Callable:
  """`(variables, *arguments) -> (x, KeyValues)`: one function, so that layers are traced once."""
  block = _rematerialised(c)(c, sparse, parent=None)
  return jax.jit(lambda variables, *args: block.apply(variables, *args), static_argnums=6)


class Decoder(nn.Module):
  """Token ids to final hidden states; `vocabulary` is the matrix that makes logits of them.

  Attributes:
    config: sizes and dialect.
    keep: layers whose states are sown into the collection `states`, each under its number: 0 is what
      enters the first block, i what leaves the i-th. `apply(..., mutable=[STATES])` returns them.
  """

  config: DecoderConfig
  keep: tuple[int, ...] = ()

  def setup(self):
    c = self.config
    shape, axes = (c.vocab_size, c.d_model), ("vocab", "embed")
    init = partitioned(nn.initializers.normal(c.d_model ** -0.5), *axes)
    self.embedding = self.param("embedding", init, shape, c.param_dtype)
    if not c.tie_embeddings:
      self.unembedding = self.param("unembedding", init, shape, c.param_dtype)
    if c.scan_layers:
      self.blocks = nn.scan(
          _rematerialised(c, Keeping if self.keep else Block), variable_axes={"params": 0, "scales": 0},
          split_rngs={"params": True}, length=c.layers,
          in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0, *([0] if self.keep else ())),
          metadata_params={nn.PARTITION_NAME: "layers"})(c, all(c.is_sparse))
    else:
      self.blocks = [Block(c, sparse) for sparse in c.is_sparse]
    self.final_norm = NORMS[c.norm](c)
    exact = dataclasses.replace(c, dtype="float32")  # a value in bfloat16 has three digits
    self.tops = {name: Constant(exact, outputs, name=f"{name}_head") if name == THRESHOLDS else
                 Projection(exact, ("embed",), ("head",), (outputs,), scale=1e-4, name=f"{name}_head",
                            use_bias=c.score_bias or name == VALUE)
                 for name, outputs in c.heads_on_top}

  def __call__(self, tokens: Int[Array, "units length"], positions: Int[Array, "units length"],
               segment_ids: Int[Array, "units length"], *, trunk_length: int = 0, rows: int = 1,
               longest: int = 0, falling: bool = False,
               offset: Float[Array, "units length width"] | None = None
               ) -> tuple[Float[Array, "units length width"], KeyValues | Sequence[KeyValues]]:
    """Final hidden states of packed rows, and the keys and values of every layer.

    Args:
      tokens, positions, segment_ids: of rows, or of units `[trunk | row | row | ...]`.
      trunk_length, rows, longest, falling: what a unit is made of, see `packed_attention.PackedRows`.
      offset: added to what enters the first layer; gradients with respect to it are those with
        respect to embeddings, token by token.
    """
    packed = PackedRows(positions, segment_ids, trunk_length, rows, longest, falling)
    turns = _turns(self.config, positions)
    hidden, key_values = self._run(tokens, turns, packed, None, None, offset)
    if self.is_initializing():
      for head in self.tops.values():
        head(hidden.astype(jnp.float32))
    return hidden, key_values

  def decode_step(self, rows: Rows, index: Int[Array, ""], count: int) -> DecodeStep:
    """What `decode` needs to know of the token at some place of the suffix, for `count` rows.

    A loop over tokens computes it one step ahead: if it were made where it is used, XLA would
    compute the rotations again in every layer and for every head.
    """
    positions = rows.prompt_lengths(count)[:, None] + index
    return DecodeStep(index, _turns(self.config, positions))

  def decode(self, tokens: Int[Array, "rows"], rows: Rows, step: DecodeStep,
             cache: LayerCache | Sequence[LayerCache]
             ) -> tuple[Float[Array, "rows width"], KeyValues | Sequence[KeyValues]]:
    """Hidden states of one new token per row; the caller stores its keys and values.

    Args:
      tokens: the newest token of every row.
      rows: the prompts that they continue.
      step: made by `decode_step`; its index is the number of suffix tokens already in the cache.
      cache: one per layer, or one with layers in front when `scan_layers`.
    """
    hidden, new = self._run(tokens[:, None], step.turns, None, (rows, step.index), cache)
    return hidden[:, 0], new

  def head(self, name: str, hidden: Float[Array, "rows length width"]
           ) -> Float[Array, "rows length outputs"]:
    """Outputs of a scalar head, in float32."""
    return self.tops[name](hidden.astype(jnp.float32))

  def vocabulary(self) -> Float[Array, "vocab width"]:
    """The matrix whose product with a hidden state gives logits (before soft-capping)."""
    return self.embedding if self.config.tie_embeddings else self.unembedding

  def _run(self, tokens, turns, packed, step, cache, offset=None):
    c = self.config
    pin = sharding.constrain if cache is None else lambda x, *names: x
    x = pin(pin(self.embedding, "vocab", None)[tokens].astype(c.dtype), "rows", "length", None)
    if c.scale_embeddings:
      x = x * jnp.asarray(c.d_model ** 0.5, c.dtype)
    if offset is not None:
      x = x + offset.astype(c.dtype)
    kept = dict.fromkeys(self.keep, x)
    if c.scan_layers and self.keep:
      (x, kept), key_values = self.blocks((x, kept), turns, packed, step, cache, jnp.array(c.is_sliding),
                                          jnp.arange(1, c.layers + 1))
    elif c.scan_layers:
      x, key_values = self.blocks(x, turns, packed, step, cache, jnp.array(c.is_sliding))
    else:
      key_values = []
      for i, block in enumerate(self.blocks):
        run = block if self.is_initializing() else functools.partial(
            _block(c, c.is_sparse[i]), block.variables)
        x, kv = run(x, turns, packed, step, cache and cache[i], c.is_sliding[i])
        key_values.append(kv)
        kept |= {i + 1: x} if i + 1 in kept else {}
    for layer, states in kept.items():
      self.sow(STATES, str(layer), states)
    return self.final_norm(x), key_values
