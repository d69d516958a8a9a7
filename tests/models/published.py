"""Tiny random models of transformers, one or more of every family, with settings that are odd."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxrl.models import Decoder, DecoderConfig, families, init_parameters, token_logits, unbox

LENGTH = 24
SHAPE = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TIED = dict(SHAPE, tie_word_embeddings=True)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", rope_theta=100.0, factor=2.5)
GEMMA3_ROPE = dict(sliding_attention=dict(rope_type="default", rope_theta=50.0), full_attention=LINEAR)

NEOX = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
YARN = dict(rope_type="yarn", rope_theta=300.0, factor=4.0, original_max_position_embeddings=32)
LONG = dict(rope_type="longrope", rope_theta=100.0, short_factor=[1.0, 1.3, 1.7], long_factor=[1.5, 2.0, 4.0])
MOE = dict(SHAPE, head_dim=12, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=20)

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, rms_norm_eps=1e-5, head_dim=12),
    "llama3_scaled_tied": lambda: transformers.LlamaConfig(**TIED, rope_parameters=LLAMA3),
    "llama_linear_biases": lambda: transformers.LlamaConfig(
        **SHAPE, rope_parameters=LINEAR, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "mistral_window": lambda: transformers.MistralConfig(**SHAPE, sliding_window=5, head_dim=12),
    "mistral_no_window": lambda: transformers.MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, rope_parameters=dict(
        rope_type="default", rope_theta=300.0)),
    "qwen2_for_300_tokens": lambda: transformers.Qwen2Config(**dict(TIED, vocab_size=300)),
    "qwen2_late_windows": lambda: transformers.Qwen2Config(
        **TIED, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=12, attention_bias=True),
    "gemma": lambda: transformers.GemmaConfig(**dict(TIED, num_key_value_heads=1), head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(
        **TIED, head_dim=16, query_pre_attn_scalar=20, sliding_window=5, attn_logit_softcapping=4.0,
        final_logit_softcapping=3.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **dict(TIED, num_hidden_layers=6), head_dim=16, query_pre_attn_scalar=24, sliding_window=5,
        rope_parameters=GEMMA3_ROPE),
    "gemma3_capped": lambda: transformers.Gemma3TextConfig(
        **SHAPE, head_dim=16, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "phi3_fused": lambda: transformers.Phi3Config(**SHAPE, sliding_window=6),
    "phi3_short": lambda: transformers.Phi3Config(
        **SHAPE, rope_parameters=dict(LONG, partial_rotary_factor=0.75),
        original_max_position_embeddings=LENGTH),
    "phi3_long": lambda: transformers.Phi3Config(
        **SHAPE, rope_parameters=dict(LONG, partial_rotary_factor=0.75),
        original_max_position_embeddings=LENGTH - 1),
    "qwen2_yarn": lambda: transformers.Qwen2Config(**SHAPE, rope_parameters=YARN),
    "llama_yarn_mscale": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=dict(
        YARN, mscale=1.2, mscale_all_dim=0.7, beta_fast=8.0, beta_slow=2.0, truncate=False)),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE, rope_parameters=dict(
        rope_type="default", rope_theta=300.0)),
    "olmo2_yarn_biases": lambda: transformers.Olmo2Config(
        **TIED, attention_bias=True, rope_parameters=dict(YARN, attention_factor=1.3)),
    "neox": lambda: transformers.GPTNeoXConfig(**NEOX, rope_parameters=dict(
        rope_type="default", rope_theta=300.0, partial_rotary_factor=0.5)),
    "neox_sequential_tied": lambda: transformers.GPTNeoXConfig(
        **dict(NEOX, tie_word_embeddings=True), use_parallel_residual=False, attention_bias=False,
        hidden_act="gelu_new"),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**MOE, norm_topk_prob=True),
    "qwen3_moe_mixed": lambda: transformers.Qwen3MoeConfig(
        **dict(MOE, num_hidden_layers=4), decoder_sparse_step=2, mlp_only_layers=[3], attention_bias=True,
        use_sliding_window=True, sliding_window=5),
}
SCORES = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, num_labels=1),
    "qwen2": lambda: transformers.Qwen2Config(**TIED, num_labels=1),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=12, num_labels=1),
    "gemma2": lambda: transformers.Gemma2Config(**TIED, head_dim=16, sliding_window=5, num_labels=1),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE, num_labels=1),
    "neox": lambda: transformers.GPTNeoXConfig(**NEOX, num_labels=1),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**MOE, num_labels=1),
}


def model(config, scores=False):
  """A model with random parameters, norms and biases too: their defaults would hide errors."""
  torch.manual_seed(0)
  kind = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
  made = kind.from_config(config, attn_implementation="eager").eval()
  with torch.no_grad():
    for parameter in made.parameters():
      parameter.normal_(std=0.3)
  return made


def model_of_images(**changes):
  """A model whose text part is Gemma 3."""
  torch.manual_seed(0)
  text = {**CONFIGS["gemma3"]().to_dict(), **changes}
  vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                patch_size=14)
  config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
  made = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
  with torch.no_grad():
    for parameter in made.parameters():
      parameter.normal_(std=0.3)
  return made


def saved(name, directory, scores=False):
  """Such a model, saved by transformers."""
  made = model((SCORES if scores else CONFIGS)[name](), scores)
  made.save_pretrained(directory)
  return made


def tokens():
  return np.random.default_rng(0).integers(3, 61, size=(2, LENGTH))


def logits_of(made):
  with torch.no_grad():
    return made(torch.tensor(tokens())).logits.float().numpy()


def config_of(directory):
  return json.loads((directory / "config.json").read_text())


def decoder_of(directory, **choices):
  return DecoderConfig(**{**families.settings(config_of(directory)), "rope_length": LENGTH, **choices})


def abstract(decoder):
  return jax.eval_shape(lambda: unbox(init_parameters(decoder, jax.random.key(0))))


def hidden_of(decoder, params):
  positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
  return jax.jit(lambda p, t: Decoder(decoder).apply(p, t, positions, jnp.ones_like(t))[0])(
      params, tokens())


def our_logits(decoder, params):
  vocabulary = Decoder(decoder).apply(params, method="vocabulary")
  return np.asarray(token_logits(hidden_of(decoder, params), vocabulary, soft_cap=decoder.logit_soft_cap))


class NoTokenizer:
  """Ids, and no files."""
  pad_id, bos_id, eos_id = 0, 1, 2

  def export(self, directory):
    pass
