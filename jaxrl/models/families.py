"""Families of published models: what their `config.json` says in the words of `DecoderConfig`.

A family is a row of `FAMILIES`, never a model file: which fields of `DecoderConfig` its config sets
(`fields`, `flags`), how its attention is windowed, and what its tensors are called (`names`, which
`tensor_names` reads). What a config says beside these is not read by the model of `transformers` that
has this architecture, except for what is refused by name.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

from jaxrl.models import rope_configs
from jaxrl.models import window_configs
from jaxrl.models.decoder_config import VALUE, DecoderConfig

SCORE = "score"  # the head of a published reward model; that of a value is never published
REQUIRED = object()
ACTIVATIONS = {"gelu_new": "gelu_tanh", "silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
RENAMED = {"num_experts": "num_local_experts"}  # by transformers 5
SAME = ("vocab_size", "layers", "d_model", "heads", "kv_heads", "d_ff", "norm_epsilon", "norm_offset",
        "norm", "pre_norms", "post_norms", "parallel_residual", "qkv_bias", "output_bias", "mlp_bias",
        "qk_norm", "qk_norm_across_heads", "activation", "gated_mlp", "tie_embeddings", "scale_embeddings",
        "attention_soft_cap", "logit_soft_cap")  # fields that say it in one way only
OF_ALL_PARTS = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype",
                "transformers_version", "tie_word_embeddings")  # of a model that reads images too
EXPERTS = ("experts", "experts_per_token", "expert_d_ff", "normalise_experts")
# What a config may say only in one way, in any family.
FIXED = {"use_bidirectional_attention": (None, False), "quantization_config": (None,)}

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

LLAMA_NAMES = dict(
    embedding="model.embed_tokens", layers="model.layers", final_norm="model.norm", unembedding="lm_head",
    query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", output="self_attn.o_proj",
    query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", gate="mlp.gate_proj", up="mlp.up_proj",
    down="mlp.down_proj", attention_norm="input_layernorm", mlp_norm="post_attention_layernorm",
    router="mlp.gate", experts="mlp.experts", expert_gate="gate_proj", expert_up="up_proj",
    expert_down="down_proj")
POST_NORM_NAMES = dict(
    LLAMA_NAMES, attention_post_norm="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm")
FUSED_NAMES = dict(
    LLAMA_NAMES, **dict.fromkeys(("query", "key", "value"), "self_attn.qkv_proj"),
    **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"))
NEOX_NAMES = dict(
    embedding="gpt_neox.embed_in", layers="gpt_neox.layers", final_norm="gpt_neox.final_layer_norm",
    unembedding="embed_out", **dict.fromkeys(("query", "key", "value"), "attention.query_key_value"),
    output="attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
    attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")


@dataclasses.dataclass(frozen=True)
class Family:
  """How the configs and tensors of one architecture are read and written.

  Attributes:
    model_type, causal, classifier: as `config.json` names the family, the model with logits and the
      one with a score.
    fields: field of `DecoderConfig` -> its name there, and what it is where the config lacks it.
    flags: fields that are the same for the whole family.
    names: of tensors, without `.weight` and `.bias`; parts with one name are rows of one tensor.
    by_head: such rows are of queries, keys and values of one head after the other, not of all heads.
    windows: `(config, layers) -> (layer_types, sliding_window)`.
    write_windows: the inverse, to entries of a config.
    rope: how RoPE is spelled.
    multimodal: the architecture that has a model of this family as its text part, if there is one.
  """

  model_type: str
  causal: str
  classifier: str
  fields: Mapping[str, tuple[str, Any]]
  flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  names: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_NAMES)
  by_head: bool = False
  windows: Callable = lambda hf, layers: (window_configs.FULL, 0)
  write_windows: Callable = lambda decoder: {}
  rope: rope_configs.Spelling = rope_configs.Spelling()
  multimodal: str = ""


# --------------------------------------------------------------------------------------- families

FAMILIES = (
    Family("llama", "LlamaForCausalLM", "LlamaForSequenceClassification",
           dict(_COMMON, **_BIASES, mlp_bias=("mlp_bias", False))),
    Family("mistral", "MistralForCausalLM", "MistralForSequenceClassification",
           dict(_COMMON, kv_heads=("num_key_value_heads", 8)), windows=window_configs.one_window(4096),
           write_windows=window_configs.write_one_window),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen2ForSequenceClassification",
           dict(_COMMON, kv_heads=("num_key_value_heads", 32)), dict(qkv_bias=True),
           windows=window_configs.late_windows, write_windows=window_configs.write_late_windows),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification",
           dict(_COMMON, **_BIASES, kv_heads=("num_key_value_heads", 32),
                head_dim=("head_dim", 128)), dict(qk_norm=True),
           windows=window_configs.late_windows, write_windows=window_configs.write_late_windows),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeForSequenceClassification",
           dict(_COMMON, **_BIASES, kv_heads=("num_key_value_heads", 4), experts=("num_experts", 128),
                experts_per_token=("num_experts_per_tok", 8), expert_d_ff=("moe_intermediate_size", 768),
                normalise_experts=("norm_topk_prob", False)), dict(qk_norm=True),
           windows=window_configs.used_window, write_windows=window_configs.write_used_window),
    Family("gemma", "GemmaForCausalLM", "GemmaForSequenceClassification",
           dict(_GEMMA, kv_heads=("num_key_value_heads", 16),
                activation=("hidden_act", "gelu_pytorch_tanh")), _NORMS),
    Family("gemma2", "Gemma2ForCausalLM", "Gemma2ForSequenceClassification",
           dict(_CAPPED, kv_heads=("num_key_value_heads", 4),
                attention_soft_cap=("attn_logit_softcapping", 50.0),
                logit_soft_cap=("final_logit_softcapping", 30.0)),
           dict(_NORMS, post_norms=True), POST_NORM_NAMES, windows=window_configs.periodic_windows("", 2),
           write_windows=window_configs.write_listed),
    Family("gemma3_text", "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification",
           dict(_CAPPED, vocab_size=("vocab_size", 262_208), heads=("num_attention_heads", 8),
                kv_heads=("num_key_value_heads", 4),
                logit_soft_cap=("final_logit_softcapping", None)),  # no model reads that of attention
           dict(_NORMS, post_norms=True, qk_norm=True), POST_NORM_NAMES,
           windows=window_configs.periodic_windows("sliding_window_pattern", 6),
           write_windows=window_configs.write_listed,
           rope=rope_configs.Spelling(default=1_000_000.0, local=10_000.0),
           multimodal="Gemma3ForConditionalGeneration"),
    Family("phi3", "Phi3ForCausalLM", "Phi3ForSequenceClassification",
           dict(_COMMON, norm_epsilon=("rms_norm_eps", 1e-5)), names=FUSED_NAMES,
           windows=window_configs.one_window(None), write_windows=window_configs.write_one_window,
           rope=rope_configs.PHI3),
    Family("olmo2", "Olmo2ForCausalLM", "Olmo2ForSequenceClassification",
           dict(_COMMON, **_BIASES, norm_epsilon=("rms_norm_eps", 1e-5)),
           dict(pre_norms=False, post_norms=True, qk_norm=True, qk_norm_across_heads=True),
           POST_NORM_NAMES),
    Family("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification",
           dict({k: v for k, v in _COMMON.items() if k not in ("kv_heads", "head_dim")},
                qkv_bias=("attention_bias", True), output_bias=("attention_bias", True),
                norm_epsilon=("layer_norm_eps", 1e-5), activation=("hidden_act", "gelu"),
                parallel_residual=("use_parallel_residual", True)),
           dict(norm="layer", gated_mlp=False, mlp_bias=True), NEOX_NAMES, by_head=True,
           rope=rope_configs.Spelling(base="rotary_emb_base", share="rotary_pct", all_heads=0.25)),
)
BY_ARCHITECTURE = {name: f for f in FAMILIES for name in (f.causal, f.classifier, f.multimodal) if name}


# ----------------------------------------------------------------------------------------- configs


def settings(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `DecoderConfig` that a parsed `config.json` sets: shape and dialect.

  Raises:
    ValueError: an architecture that is not in `FAMILIES`, a field that is missing, or one whose
      value no decoder here computes; all with what is supported.
  """
  hf = text_of(hf)
  architecture = architecture_of(hf)
  family = BY_ARCHITECTURE[architecture]
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
  if len(named) != 1 or named[0] not in BY_ARCHITECTURE:
    raise ValueError(f"config.json has architectures={named} (model_type={hf.get('model_type')!r}), but "
                     f"supported is one of {', '.join(BY_ARCHITECTURE)}")
  return named[0]


def text_of(hf: Mapping[str, Any]) -> Mapping[str, Any]:
  """The config of the text part of a model that reads images too; other configs are returned as they
  are.

  Raises:
    ValueError: the architecture is not supported, or there is no text part.
  """
  architecture = architecture_of(hf)
  family = BY_ARCHITECTURE[architecture]
  if architecture != family.multimodal:
    return hf
  if not isinstance(hf.get("text_config"), Mapping):
    raise ValueError(f"config.json of {architecture} has no text_config")
  shared = {key: hf[key] for key in OF_ALL_PARTS if key in hf}
  return {**shared, **hf["text_config"], "architectures": [family.causal], "model_type": family.model_type}


def _settings(hf, family, classifies):
  """Every field of shape and dialect; those of no family are as `DecoderConfig` has them."""
  for key, values in FIXED.items():
    if hf.get(key) not in values:
      raise ValueError(f"{key}={hf[key]!r} is not supported: {key} must be {values[-1]} or absent")
  defaults = {f.name: f.default for f in dataclasses.fields(DecoderConfig) if f.name in (*SAME, *EXPERTS)}
  found = {**defaults, **family.flags}
  for ours, (theirs, default) in family.fields.items():
    found[ours] = hf.get(theirs, hf.get(RENAMED.get(theirs), default))
    if found[ours] is REQUIRED:
      raise ValueError(f"{theirs} is missing")
  for name, default in (("kv_heads", found["heads"]), ("head_dim", found["d_model"] // found["heads"])):
    found[name] = (name in family.fields and found[name]) or default
  if "experts" in family.fields:
    found["mlp_types"] = _mlp_types(hf, found["layers"], found["experts"])
  found["activation"] = _activation(family, found["activation"])
  found["query_scale"] = found["query_scale"] ** -0.5 if "query_scale" in found else 0.0
  for name in ("attention_soft_cap", "logit_soft_cap"):
    found[name] = float(found.get(name) or 0.0)
  found["layer_types"], found["sliding_window"] = family.windows(hf, found["layers"])
  found |= rope_configs.read(hf, family.rope)
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


def _mlp_types(hf, layers, experts):
  """Of Qwen 3 MoE: each `decoder_sparse_step`-th layer has experts, if `mlp_only_layers` lacks it."""
  step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
  kinds = tuple("experts" if experts and (i + 1) % step == 0 and i not in dense else "dense"
                for i in range(layers))
  return kinds[:1] if len(set(kinds)) == 1 else kinds


def _check_labels(hf):
  count = hf.get("num_labels") or len(hf.get("id2label") or (0, 1))  # that is what absence means
  if count != 1:
    raise ValueError(f"it has {count} labels; a reward model with num_labels=1 is supported")


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
    imported = text_of(imported)
    family = BY_ARCHITECTURE[architecture_of(imported)]
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
  if "head_dim" in family.fields:
    found["head_dim"] = decoder.width
  if "experts" in family.fields:
    found |= dict(decoder_sparse_step=1,
                  mlp_only_layers=[i for i, sparse in enumerate(decoder.is_sparse) if not sparse])
  for ours in ("attention_soft_cap", "logit_soft_cap"):
    if ours in family.fields:
      found[family.fields[ours][0]] = getattr(decoder, ours) or None
  if "query_scale" in family.fields:
    scalar = decoder.query_scale ** -2 if decoder.query_scale else decoder.width
    found["query_pre_attn_scalar"] = round(scalar) if math.isclose(scalar, round(scalar)) else scalar
  return {**found, **family.write_windows(decoder), **rope_configs.write(decoder, family.rope)}


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
  d, sliding, sparse = decoder, decoder.is_sliding, decoder.is_sparse
  local = d.rope_local_theta if any(sliding) else 0.0
  scaling, theta = tuple(sorted(d.rope_scaling)), d.rope_theta
  if local and local == theta and not scaling:
    local = 0.0
  if all(sliding) and local:
    scaling, theta, local = (), local, 0.0
  return {**{name: getattr(d, name) for name in SAME}, "head_dim": d.width, "rope_theta": theta,
          "rope_local_theta": local, "rope_scaling": scaling, "rope_fraction": d.rotated / d.width,
          "query_scale": d.query_scale or d.width ** -0.5, "layer_types": sliding,
          "sliding_window": d.sliding_window if any(sliding) else 0, "mlp_types": sparse,
          "d_ff": 0 if all(sparse) else d.d_ff,
          **{name: getattr(d, name) if any(sparse) else 0 for name in EXPERTS}}


def _same(a, b):
  return math.isclose(a, b) if isinstance(a, float) and isinstance(b, float) else a == b
