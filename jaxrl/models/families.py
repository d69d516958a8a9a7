"""Families of published models: what their `config.json` and tensors are called here.

A family is a row of `FAMILIES`, never a model file: which fields of `DecoderConfig` its config sets
(`fields`, `flags`) and how its attention is windowed. What a config says beside these is not read by
the model of `transformers` that has this architecture, except for what is refused by name.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

from jaxrl.models.decoder import DecoderConfig

SCORE, VALUE = "score", "value"  # heads: of a published reward model, and one that is never published
REQUIRED = object()
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYERS = {"full_attention": "full", "sliding_attention": "sliding"}
ROPE_TYPES = {  # type -> its parameters, which `rope.frequencies` reads under the same names
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
SAME = ("vocab_size", "layers", "d_model", "heads", "kv_heads", "d_ff", "norm_epsilon", "norm_offset",
        "post_norms", "qkv_bias", "output_bias", "mlp_bias", "qk_norm", "activation", "tie_embeddings",
        "scale_embeddings", "attention_soft_cap", "logit_soft_cap")  # fields that say it in one way only
FULL, SLIDING = ("full",), ("sliding",)
# What a config may say only in one way, in any family.
FIXED = {"use_bidirectional_attention": (None, False), "quantization_config": (None,),
         "partial_rotary_factor": (None, 1, 1.0)}

_COMMON = dict(
    vocab_size=("vocab_size", REQUIRED), layers=("num_hidden_layers", REQUIRED),
    d_model=("hidden_size", REQUIRED), heads=("num_attention_heads", REQUIRED),
    kv_heads=("num_key_value_heads", None), head_dim=("head_dim", None),
    d_ff=("intermediate_size", REQUIRED), norm_epsilon=("rms_norm_eps", 1e-6),
    tie_embeddings=("tie_word_embeddings", False), activation=("hidden_act", "silu"))
_BIASES = dict(qkv_bias=("attention_bias", False), output_bias=("attention_bias", False))
_GEMMA = dict(_COMMON, **_BIASES, head_dim=("head_dim", 256),
              tie_embeddings=("tie_word_embeddings", True))
_CAPPED = dict(_GEMMA, activation=("hidden_activation", "gelu_pytorch_tanh"),
               query_scale=("query_pre_attn_scalar", 256))
_NORMS = dict(norm_offset=True, scale_embeddings=True)


@dataclasses.dataclass(frozen=True)
class Family:
  """How the configs and tensors of one architecture are read and written.

  Attributes:
    model_type, causal, classifier: as `config.json` names the family, the model with logits and the
      one with a score.
    fields: field of `DecoderConfig` -> its name there, and what it is where the config lacks it.
    flags: fields that are the same for the whole family.
    windows: `(config, layers) -> (layer_types, sliding_window)`.
    write_windows: the inverse, to entries of a config.
    theta, local_theta: RoPE bases where the config lacks them; a local one is of sliding layers.
    fused: queries, keys and values are one tensor, and gate and up another.
  """

  model_type: str
  causal: str
  classifier: str
  fields: Mapping[str, tuple[str, Any]]
  flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  windows: Callable = lambda hf, layers: (FULL, 0)
  write_windows: Callable = lambda decoder: {}
  theta: float = 10_000.0
  local_theta: float = 0.0
  fused: bool = False


@dataclasses.dataclass(frozen=True)
class Piece:
  """One parameter here, or one layer of it, as rows of a published tensor.

  Attributes:
    path: of the parameter, below `params`; with `scan_layers` several pieces share one.
    layer: which layer of the model, None outside of them.
    shape: here, without an axis for layers.
    name: of the published tensor.
    rows: first and last of its rows, the last excluded.
    transpose: whether it lies there as `[outputs, inputs]`.
  """

  path: tuple[str, ...]
  layer: int | None
  shape: tuple[int, ...]
  name: str
  rows: tuple[int, int]
  columns: int | None  # None: the tensor has one axis
  transpose: bool


# ---------------------------------------------------------------------------------------- windows


def _one_window(default):
  """Of models whose layers are all windowed, if there is a window."""
  def read(hf, layers):
    window = hf.get("sliding_window", default)
    kinds = set(hf.get("layer_types") or ())
    expected = "sliding_attention" if window else "full_attention"
    if kinds - {expected}:
      raise ValueError(f"layer_types={sorted(kinds)} with sliding_window={window}: all layers of this "
                       f"architecture are {expected}")
    return (SLIDING, int(window)) if window else (FULL, 0)
  return read


def _late_windows(hf, layers):
  """Of Qwen: layers from `max_window_layers` on are windowed, if `use_sliding_window`."""
  window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
  first = hf.get("max_window_layers", 28)
  default = [i >= first and window is not None for i in range(layers)]
  return _listed(hf, layers, window, default)


def _periodic_windows(key, period):
  """Of Gemma: every layer but each `period`-th is windowed."""
  def read(hf, layers):
    every = hf.get(key, hf.get("_" + key, period)) if key else period
    return _listed(hf, layers, hf.get("sliding_window", 4096),
                   [bool((i + 1) % every) for i in range(layers)])
  return read


def _listed(hf, layers, window, default):
  """What `layer_types` says, else the default of the family: per layer whether it is windowed."""
  kinds = hf.get("layer_types")
  if kinds is None:
    sliding = default
  else:
    unknown = sorted(set(kinds) - LAYERS.keys())
    if unknown or len(kinds) != layers:
      raise ValueError(f"layer_types={kinds} must name {' or '.join(LAYERS)} for each of {layers} layers")
    sliding = [LAYERS[kind] == "sliding" for kind in kinds]
  if not any(sliding):
    return FULL, 0
  if not window:
    raise ValueError(f"layer_types={kinds} has sliding layers, but there is no window: sliding_window="
                     f"{hf.get('sliding_window')}, use_sliding_window={hf.get('use_sliding_window')}")
  return SLIDING if all(sliding) else tuple("sliding" if s else "full" for s in sliding), int(window)


def _write_one_window(decoder):
  return dict(sliding_window=decoder.sliding_window if all(decoder.is_sliding) else None)


def _write_late_windows(decoder):
  used = any(decoder.is_sliding)
  return dict(use_sliding_window=used, sliding_window=decoder.sliding_window if used else None,
              max_window_layers=decoder.is_sliding.index(True) if used else decoder.layers,
              layer_types=_names_of_layers(decoder))


def _write_listed(decoder):
  return dict(sliding_window=decoder.sliding_window or 4096, layer_types=_names_of_layers(decoder))


def _names_of_layers(decoder):
  return [f"{'sliding' if sliding else 'full'}_attention" for sliding in decoder.is_sliding]


# --------------------------------------------------------------------------------------- families

FAMILIES = (
    Family("llama", "LlamaForCausalLM", "LlamaForSequenceClassification",
           dict(_COMMON, **_BIASES, mlp_bias=("mlp_bias", False))),
    Family("mistral", "MistralForCausalLM", "MistralForSequenceClassification",
           dict(_COMMON, kv_heads=("num_key_value_heads", 8)), windows=_one_window(4096),
           write_windows=_write_one_window),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen2ForSequenceClassification",
           dict(_COMMON, kv_heads=("num_key_value_heads", 32)), dict(qkv_bias=True),
           windows=_late_windows, write_windows=_write_late_windows),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification",
           dict(_COMMON, **_BIASES, kv_heads=("num_key_value_heads", 32),
                head_dim=("head_dim", 128)), dict(qk_norm=True),
           windows=_late_windows, write_windows=_write_late_windows),
    Family("gemma", "GemmaForCausalLM", "GemmaForSequenceClassification",
           dict(_GEMMA, kv_heads=("num_key_value_heads", 16),
                activation=("hidden_act", "gelu_pytorch_tanh")), _NORMS),
    Family("gemma2", "Gemma2ForCausalLM", "Gemma2ForSequenceClassification",
           dict(_CAPPED, kv_heads=("num_key_value_heads", 4),
                attention_soft_cap=("attn_logit_softcapping", 50.0),
                logit_soft_cap=("final_logit_softcapping", 30.0)),
           dict(_NORMS, post_norms=True), windows=_periodic_windows("", 2),
           write_windows=_write_listed),
    Family("gemma3_text", "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification",
           dict(_CAPPED, kv_heads=("num_key_value_heads", 4),
                attention_soft_cap=("attn_logit_softcapping", None),
                logit_soft_cap=("final_logit_softcapping", None)),
           dict(_NORMS, post_norms=True, qk_norm=True),
           windows=_periodic_windows("sliding_window_pattern", 6), write_windows=_write_listed,
           theta=1_000_000.0, local_theta=10_000.0),
    Family("phi3", "Phi3ForCausalLM", "Phi3ForSequenceClassification",
           dict(_COMMON, norm_epsilon=("rms_norm_eps", 1e-5)), windows=_one_window(None),
           write_windows=_write_one_window, fused=True),
)
_BY_ARCHITECTURE = {name: f for f in FAMILIES for name in (f.causal, f.classifier)}


# ----------------------------------------------------------------------------------------- configs


def settings(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `DecoderConfig` that a parsed `config.json` sets: shape and dialect.

  Raises:
    ValueError: an architecture that is not in `FAMILIES`, a field that is missing, or one whose
      value no decoder here computes; all with what is supported.
  """
  architecture = architecture_of(hf)
  family = _BY_ARCHITECTURE[architecture]
  try:
    return _settings(hf, family, architecture == family.classifier)
  except ValueError as error:
    raise ValueError(f"config.json of {architecture}: {error}") from error


def architecture_of(hf: Mapping[str, Any]) -> str:
  """The one architecture that a parsed `config.json` names.

  Raises:
    ValueError: it is not supported.
  """
  named = hf.get("architectures") or []
  if len(named) != 1 or named[0] not in _BY_ARCHITECTURE:
    raise ValueError(f"config.json has architectures={named} (model_type={hf.get('model_type')!r}), but "
                     f"supported is one of {', '.join(_BY_ARCHITECTURE)}")
  return named[0]


def _settings(hf, family, classifies):
  """Every field of shape and dialect; those of no family are as `DecoderConfig` has them."""
  for key, values in FIXED.items():
    if hf.get(key) not in values:
      raise ValueError(f"{key}={hf[key]!r} is not supported: {key} must be {values[-1]} or absent")
  defaults = {f.name: f.default for f in dataclasses.fields(DecoderConfig) if f.name in SAME}
  found = {**defaults, **family.flags}
  for ours, (theirs, default) in family.fields.items():
    found[ours] = hf.get(theirs, default)
    if found[ours] is REQUIRED:
      raise ValueError(f"{theirs} is missing")
  found["kv_heads"] = found["kv_heads"] or found["heads"]
  found["head_dim"] = found["head_dim"] or found["d_model"] // found["heads"]
  found["activation"] = _activation(family, found["activation"])
  found["query_scale"] = found["query_scale"] ** -0.5 if "query_scale" in found else 0.0
  for name in ("attention_soft_cap", "logit_soft_cap"):
    found[name] = float(found.get(name) or 0.0)
  found["layer_types"], found["sliding_window"] = family.windows(hf, found["layers"])
  found |= _rope(hf, family)
  if classifies:
    _check_labels(hf)
    # There is no matrix of logits, and no use for one.
    found |= dict(tie_embeddings=True, heads_on_top=((SCORE, 1),))
  return found


def _activation(family, name):
  key = family.fields["activation"][0]
  if family.model_type == "gemma" and name == "gelu":
    return "gelu_tanh"  # as transformers reads the first configs of Gemma
  if name not in ACTIVATIONS:
    raise ValueError(f"{key}={name!r} is not supported: it must be one of {', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[name]


def _check_labels(hf):
  count = hf.get("num_labels") or len(hf.get("id2label") or (0, 1))  # that is what absence means
  if count != 1:
    raise ValueError(f"it has {count} labels; a reward model with num_labels=1 is supported")


def _rope(hf, family):
  """Base and scaling, as transformers 4 spells them (`rope_theta`, `rope_scaling`) or 5
  (`rope_parameters`)."""
  given = hf.get("rope_parameters") or {}
  by_layer = given.keys() & LAYERS.keys()
  full = dict(given.get("full_attention") or {} if by_layer else given)
  old = dict(hf.get("rope_scaling") or {})
  theta = full.pop("rope_theta", None) or hf.get("rope_theta") or family.theta
  if old and full and _scaling(old) != _scaling(full):
    raise ValueError(f"rope_scaling={old} and rope_parameters={full} contradict each other")
  if hf.get("rope_theta", theta) != theta or old.pop("rope_theta", theta) != theta:
    raise ValueError(f"rope_theta={hf.get('rope_theta')} and rope_parameters={given} contradict each other")
  found = dict(rope_theta=float(theta), rope_scaling=_scaling(full or old), rope_local_theta=0.0)
  if family.local_theta:
    local = dict(given.get("sliding_attention") or {})
    base = local.pop("rope_theta", None) or hf.get("rope_local_base_freq") or family.local_theta
    if _scaling(local):
      raise ValueError(f"rope_parameters of sliding_attention={local}: only rope_type 'default' is "
                       "supported there")
    found["rope_local_theta"] = float(base)
  elif by_layer:
    raise ValueError(f"rope_parameters={given} differ by layer, which this architecture does not")
  return found


def _scaling(parameters) -> tuple[tuple[str, Any], ...]:
  parameters = dict(parameters)
  old, kind = parameters.pop("type", "default"), parameters.pop("rope_type", None)
  kind = kind or old
  if kind not in ROPE_TYPES:
    raise ValueError(f"RoPE scaling of type {kind!r} is not supported: it must be one of "
                     f"{', '.join(ROPE_TYPES)}")
  parameters.pop("rope_theta", None)
  if parameters.get("partial_rotary_factor") in FIXED["partial_rotary_factor"]:
    parameters.pop("partial_rotary_factor", None)
  missing = [key for key in ROPE_TYPES[kind] if key not in parameters]
  more = sorted(k for k, v in parameters.items() if k not in ROPE_TYPES[kind] and v is not None)
  if missing or more:
    raise ValueError(f"RoPE scaling of type {kind!r} " + (
        f"lacks {', '.join(missing)}" if missing else
        f"with {', '.join(f'{k}={parameters[k]!r}' for k in more)} is not supported"))
  if kind == "default":
    return ()
  return (("rope_type", kind), *((key, parameters[key]) for key in ROPE_TYPES[kind]))


def hf_config(decoder: DecoderConfig, *, imported: Mapping[str, Any] | None = None,
              max_positions: int = 0) -> dict[str, Any]:
  """A `config.json` whose model computes what the decoder does; the inverse of `settings`.

  RoPE is spelled in both ways, for transformers 4 and 5. Ids of special tokens and the type of
  numbers are left to whoever writes it.

  Args:
    imported: the parsed config that the decoder was made from; it is kept, all but the architecture
      between logits and score, if it still describes the decoder.
    max_positions: tokens that the model is for, where no imported config says so; 0 is 2048.

  Raises:
    ValueError: heads that no published architecture has, or a combination of settings that none
      has, with what the nearest has instead.
  """
  score = has_score(decoder)
  labels = dict(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}) if score else {}
  if imported is not None:
    family = _BY_ARCHITECTURE[architecture_of(imported)]
    kept, name = dict(imported), family.classifier if score else family.causal
    if imported["architectures"] != [name]:
      kept = {k: v for k, v in kept.items() if k not in ("id2label", "label2id", "num_labels")}
      kept |= {"architectures": [name], **labels}
    if not _differences(kept, decoder):
      return kept
  differences = {}
  for family in FAMILIES:
    found = {"architectures": [family.classifier if score else family.causal],
             "model_type": family.model_type, **_entries(decoder, family), **labels,
             "max_position_embeddings": max_positions or 2048}
    differing = _differences(found, decoder)
    if not differing:
      return found
    differences[family.model_type] = differing
  nearest = min(differences, key=lambda name: len(differences[name]))
  raise ValueError(f"no published architecture has this combination of settings; {nearest} is nearest, but "
                   + ", ".join(differences[nearest]))


def has_score(decoder: DecoderConfig) -> bool:
  """Whether the decoder is a reward model as those that are published: with one number, `score`.

  Raises:
    ValueError: it has another head, beside the value.
  """
  heads = tuple(head for head in decoder.heads_on_top if head[0] != VALUE)
  if heads not in ((), ((SCORE, 1),)):
    raise ValueError(f"config.model.heads_on_top={heads} cannot be exported: published reward models have "
                     f"one head with one number, ({SCORE!r}, 1)")
  return bool(heads)


def _entries(decoder, family):
  """What a config of the family would say of a decoder; what it cannot say is lost."""
  found = {}
  for ours, (theirs, _) in family.fields.items():
    found[theirs] = getattr(decoder, ours)
  names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
  found[family.fields["activation"][0]] = names[decoder.activation]
  found["head_dim"] = decoder.width
  for ours in ("attention_soft_cap", "logit_soft_cap"):
    if ours in family.fields:
      found[family.fields[ours][0]] = getattr(decoder, ours) or None
  if "query_scale" in family.fields:
    scalar = decoder.query_scale ** -2 if decoder.query_scale else decoder.width
    found["query_pre_attn_scalar"] = round(scalar) if math.isclose(scalar, round(scalar)) else scalar
  return {**found, **family.write_windows(decoder), **_write_rope(decoder, family)}


def _write_rope(decoder, family):
  scaling = dict(decoder.rope_scaling)
  full = dict(scaling or {"rope_type": "default"}, rope_theta=decoder.rope_theta)
  old = dict(rope_theta=decoder.rope_theta, rope_scaling=scaling or None)
  if not family.local_theta:
    return dict(old, rope_parameters=full)
  local = decoder.rope_local_theta or decoder.rope_theta
  return dict(old, rope_local_base_freq=local, rope_parameters=dict(
      full_attention=full, sliding_attention=dict(rope_type="default", rope_theta=local)))


def _differences(hf, decoder):
  """In what the decoder of a config differs from another, as text per field."""
  try:
    own = _normal(DecoderConfig(**{**_plain(decoder), **settings(hf)}))
  except ValueError as error:
    return [str(error)]
  wanted = _normal(decoder)
  if has_score(decoder):  # its logits are not published
    wanted["tie_embeddings"] = True
  return [f"{name}={own[name]} and not {wanted[name]}" for name in own
          if not _same(own[name], wanted[name])]


def _plain(decoder):
  return {f.name: f.default for f in dataclasses.fields(decoder) if f.name != "vocab_size"}


def _normal(decoder):
  """The function that a decoder computes, without settings that say the same in two ways."""
  d, sliding = decoder, decoder.is_sliding
  local = d.rope_local_theta if any(sliding) else 0.0
  scaling = tuple(dict(d.rope_scaling).get(k) for k in ("rope_type", *ROPE_TYPES["llama3"]))
  if local and local == d.rope_theta and not d.rope_scaling:
    local = 0.0
  if all(sliding) and local:
    scaling, theta, local = (None,) * len(scaling), local, 0.0
  else:
    theta = d.rope_theta
  return {**{name: getattr(d, name) for name in SAME}, "head_dim": d.width, "rope_theta": theta,
          "rope_local_theta": local, "rope_scaling": scaling,
          "query_scale": d.query_scale or d.width ** -0.5, "layer_types": sliding,
          "sliding_window": d.sliding_window if any(sliding) else 0}


def _same(a, b):
  return math.isclose(a, b) if isinstance(a, float) and isinstance(b, float) else a == b


# ----------------------------------------------------------------------------------------- tensors


def tensors(decoder: DecoderConfig, architecture: str) -> dict[str, tuple[Piece, ...]]:
  """Published tensors of a decoder, in their order, each with the pieces that it is made of, in the
  order of its rows.

  The bias of the score, which published ones lack, the value head and a critic have no part in it.
  """
  family = _BY_ARCHITECTURE[architecture]
  pieces = [_piece(("embedding",), None, "model.embed_tokens.weight", (decoder.vocab_size,),
                   (decoder.d_model,))]
  for layer in range(decoder.layers):
    pieces += _layer(decoder, family, layer)
  pieces.append(_piece(("final_norm", "scale"), None, "model.norm.weight", (decoder.d_model,)))
  if architecture == family.classifier:
    pieces.append(_piece((f"{SCORE}_head", "kernel"), None, "score.weight", (1,), (decoder.d_model,), True))
  elif not decoder.tie_embeddings:
    pieces.append(_piece(("unembedding",), None, "lm_head.weight", (decoder.vocab_size,), (decoder.d_model,)))
  found: dict[str, tuple[Piece, ...]] = {}
  for piece in pieces:
    before = found.get(piece.name, ())
    start = before[-1].rows[1] if before else 0
    rows = (start, start + piece.rows[1])
    found[piece.name] = (*before, dataclasses.replace(piece, rows=rows))
  return found


def shape_of(pieces: tuple[Piece, ...]) -> tuple[int, ...]:
  """Shape of the published tensor that is made of these pieces."""
  rows, columns = pieces[-1].rows[1], pieces[0].columns
  return (rows,) if columns is None else (rows, columns)


def _layer(c, family, layer):
  """The pieces of one layer."""
  at, own = f"model.layers.{layer}.", ("blocks",) if c.scan_layers else (f"blocks_{layer}",)
  d, f, heads, kv = (c.d_model,), (c.d_ff,), (c.heads, c.width), (c.kv_heads, c.width)
  names = dict(query="q_proj", key="k_proj", value="v_proj", gate="gate_proj", up="up_proj")
  if family.fused:
    names = dict(query="qkv_proj", key="qkv_proj", value="qkv_proj", gate="gate_up_proj", up="gate_up_proj")
  found = []

  def projection(part, ours, theirs, outputs, inputs, bias):
    name = f"{at}{'self_attn' if part == 'attention' else part}.{theirs}"
    found.append(_piece((*own, part, ours, "kernel"), layer, name + ".weight", outputs, inputs, True))
    if bias:
      found.append(_piece((*own, part, ours, "bias"), layer, name + ".bias", outputs))
  for ours, outputs in (("query", heads), ("key", kv), ("value", kv)):
    projection("attention", ours, names[ours], outputs, d, c.qkv_bias)
  projection("attention", "output", "o_proj", d, heads, c.output_bias)
  for ours in ("gate", "up"):
    projection("mlp", ours, names[ours], f, d, c.mlp_bias)
  projection("mlp", "down", "down_proj", d, f, c.mlp_bias)
  norms = [("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")]
  if c.post_norms:
    norms = [("attention_norm", "input_layernorm"), ("attention_post_norm", "post_attention_layernorm"),
             ("mlp_norm", "pre_feedforward_layernorm"), ("mlp_post_norm", "post_feedforward_layernorm")]
  found += [_piece((*own, ours, "scale"), layer, f"{at}{theirs}.weight", d) for ours, theirs in norms]
  if c.qk_norm:
    found += [_piece((*own, "attention", f"{ours}_norm", "scale"), layer,
                     f"{at}self_attn.{theirs}_norm.weight", (c.width,))
              for ours, theirs in (("query", "q"), ("key", "k"))]
  return found


def _piece(path, layer, name, outputs, inputs=(), transpose=False):
  shape = (*inputs, *outputs) if transpose else (*outputs, *inputs)
  return Piece(path, layer, shape, name, (0, math.prod(outputs)), math.prod(inputs) if inputs else None,
               transpose)
