"""Shape and dialect of a decoder: the settings of `config.model`, checked."""

import dataclasses
import functools
import importlib.util

import flax.linen as nn
import jax

from jaxrl.models import adapters
from jaxrl.models import packed_attention
from jaxrl.models.adapters import Adapter

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
THRESHOLDS, VALUE = "thresholds", "value"  # heads: one that is the same for all states, and a critic's
ACTIVATIONS = {"silu": nn.silu, "gelu": functools.partial(nn.gelu, approximate=False),
               "gelu_tanh": functools.partial(nn.gelu, approximate=True)}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Shape and dialect of a decoder.

  Attributes:
    head_dim: 0 means `d_model // heads`.
    layer_types: `full` or `sliding` per layer, repeated to cover all layers.
    sliding_window: tokens visible to a `sliding` layer, the query included.
    rope_scaling: items of `{"rope_type": "linear" | "llama3" | "yarn" | "longrope", ...}`, as in
      `rope.frequencies`.
    rope_length: with `longrope`, tokens of the longest sequence, which say what factors turn all of
      them: the long ones if it is above `original_max_position_embeddings`, else the short ones.
    rope_local_theta: RoPE base of `sliding` layers (Gemma 3); 0 means `rope_theta` and its scaling.
    rope_fraction: share of each head that is rotated, its first numbers (GPT-NeoX).
    norm: `rms`, or `layer` with mean and bias (GPT-NeoX).
    norm_offset: RMSNorm multiplies by `1 + scale` (Gemma) and not by `scale`.
    pre_norms: normalise what attention and MLP read (all but OLMo 2).
    post_norms: normalise what attention and MLP return (Gemma 2 and 3, OLMo 2).
    parallel_residual: the MLP reads what attention reads, not its sum with what attention returns
      (GPT-NeoX).
    qk_norm: RMSNorm over each head of queries and keys (Qwen 3, Gemma 3).
    qk_norm_across_heads: it is over all heads together, before they are told apart (OLMo 2).
    query_scale: factor on queries; 0 means `head_dim ** -0.5`.
    scale_embeddings: multiply embeddings by `sqrt(d_model)` (Gemma).
    attention_soft_cap, logit_soft_cap: `cap * tanh(x / cap)`; 0 is off (Gemma 2).
    gated_mlp: `down(activation(gate(x)) * up(x))`, else `down(activation(up(x)))` (GPT-NeoX).
    mlp_types: `dense` or `experts` per layer, repeated to cover all layers.
    experts: MLPs of an `experts` layer, gated and of width `expert_d_ff`, without biases.
    experts_per_token: how many of them each token is sent to, see `models.experts`.
    normalise_experts: their weights add up to 1.
    attention: `xla`, or `fused` (Tokamax, needs `pip install tokamax`), of packed rows.
    scan_layers: one stacked set of layer parameters, compiled once for any depth.
    remat: what the backward pass recomputes: `none`, `dots` (all but matrix products), `full`.
    heads_on_top: scalar heads over the final hidden state, name -> number of outputs; `thresholds`
      is a head whose numbers are the same for all states.
    score_bias: whether these heads, the value aside, have a bias; published reward models have none.
    verdict: ids of two tokens, "yes" and "no": the difference of their logits is one more score.
    critic: a second decoder beside the policy, with the head `value` (see `models.outputs`).
    adapters: low-rank additions to matrices of the blocks, which are trained instead of them.
    dtype, param_dtype: of activations and of parameters.
  """

  vocab_size: int
  layers: int = 4
  d_model: int = 128
  heads: int = 4
  kv_heads: int = 2
  head_dim: int = 0
  d_ff: int = 384
  layer_types: tuple[str, ...] = ("full",)
  sliding_window: int = 0
  rope_theta: float = 10_000.0
  rope_scaling: tuple[tuple[str, object], ...] = ()
  rope_local_theta: float = 0.0
  rope_fraction: float = 1.0
  rope_length: int = 0
  norm: str = "rms"
  norm_epsilon: float = 1e-6
  norm_offset: bool = False
  pre_norms: bool = True
  post_norms: bool = False
  parallel_residual: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  qk_norm_across_heads: bool = False
  query_scale: float = 0.0
  activation: str = "silu"
  gated_mlp: bool = True
  mlp_types: tuple[str, ...] = ("dense",)
  experts: int = 0
  experts_per_token: int = 0
  expert_d_ff: int = 0
  normalise_experts: bool = False
  tie_embeddings: bool = True
  scale_embeddings: bool = False
  attention_soft_cap: float = 0.0
  logit_soft_cap: float = 0.0
  attention: str = "xla"
  scan_layers: bool = False
  remat: str = "none"
  heads_on_top: tuple[tuple[str, int], ...] = ()
  score_bias: bool = True
  verdict: tuple[int, ...] = ()
  critic: bool = False
  adapters: tuple[Adapter, ...] = ()
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    def check(ok, message):
      if not ok:
        raise ValueError(f"config.model: {message}")
    for name in ("vocab_size", "layers", "d_model", "heads", "kv_heads", "d_ff"):
      check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
    check(self.heads % self.kv_heads == 0, f"kv_heads={self.kv_heads} does not divide "
          f"heads={self.heads}")
    check(self.head_dim or self.d_model % self.heads == 0, f"heads={self.heads} does not divide "
          f"d_model={self.d_model}; set head_dim")
    check(self.rotated % 2 == 0 < self.rotated <= self.width, f"head_dim={self.width} with rope_fraction="
          f"{self.rope_fraction} would rotate {self.rotated} numbers of each head, but RoPE rotates pairs")
    check(self.norm in ("rms", "layer"), f"norm={self.norm!r} is none of ['rms', 'layer']")
    check(not self.norm_offset or self.norm == "rms", "norm_offset is of norm='rms'")
    check(self.pre_norms or self.post_norms, "pre_norms=False leaves no norm: set post_norms")
    check(self.qk_norm or not self.qk_norm_across_heads, "qk_norm_across_heads needs qk_norm=True")
    check(self.mlp_types and set(self.mlp_types) <= {"dense", "experts"},
          f"mlp_types={self.mlp_types} must be `dense` or `experts`")
    if any(self.is_sparse):
      check(0 < self.experts_per_token <= self.experts and self.expert_d_ff > 0, "mlp_types has `experts`, "
            f"so experts={self.experts} and expert_d_ff={self.expert_d_ff} must be positive and "
            f"experts_per_token={self.experts_per_token} between 1 and experts")
      check(self.gated_mlp and not self.mlp_bias, "experts are gated and have no biases: leave gated_mlp=True "
            "and mlp_bias=False")
      check(all(self.is_sparse) or not self.scan_layers, f"scan_layers stacks layers that are alike, but "
            f"mlp_types={self.mlp_types} mixes two kinds: set scan_layers=False")
    check(self.remat in REMAT_POLICIES, f"remat={self.remat!r} is none of {list(REMAT_POLICIES)}")
    check(self.attention in packed_attention.KERNELS, f"attention={self.attention!r} is none of "
          f"{list(packed_attention.KERNELS)}")
    check(self.attention == "xla" or importlib.util.find_spec("tokamax"),
          "attention='fused' needs Tokamax: pip install tokamax, or leave 'xla'")
    check(self.activation in ACTIVATIONS, f"activation={self.activation!r} is none of "
          f"{list(ACTIVATIONS)}")
    check(self.layer_types and set(self.layer_types) <= {"full", "sliding"},
          f"layer_types={self.layer_types} must be `full` or `sliding`")
    check(not self.verdict or len(set(self.verdict)) == 2 and 0 <= min(self.verdict)
          and max(self.verdict) < self.vocab_size, f"verdict={self.verdict} must be two different tokens "
          f"below vocab_size={self.vocab_size}")
    check("sliding" not in self.layer_types or self.sliding_window > 0,
          "layer_types has `sliding`, so sliding_window must be positive")
    adapters.check_layers(self.adapters, self.layers)

  @property
  def width(self) -> int:
    """Dimension of one head."""
    return self.head_dim or self.d_model // self.heads

  @property
  def rotated(self) -> int:
    """Numbers of one head that RoPE rotates."""
    return int(self.width * self.rope_fraction)

  @property
  def mlp_width(self) -> int:
    """Hidden numbers of the widest MLP, per token."""
    kinds = {self.experts_per_token * self.expert_d_ff if sparse else self.d_ff for sparse in self.is_sparse}
    return max(kinds)

  @property
  def is_sparse(self) -> tuple[bool, ...]:
    """Per layer, whether its MLP is one of experts."""
    kinds = self.mlp_types
    return tuple(kinds[i % len(kinds)] == "experts" for i in range(self.layers))

  @property
  def is_sliding(self) -> tuple[bool, ...]:
    """Per layer, whether its attention is windowed."""
    kinds = self.layer_types
    return tuple(kinds[i % len(kinds)] == "sliding" for i in range(self.layers))
