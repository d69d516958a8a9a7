"""The dialects against transformers: random tiny models, weights copied, logits compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxrl.batch import Trajectory, pack
from jaxrl.models import Decoder, DecoderConfig, model_outputs, token_logits

SHAPE = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             tie_word_embeddings=False, pad_token_id=None, bos_token_id=1, eos_token_id=2)
OURS = dict(vocab_size=61, layers=2, d_model=32, heads=4, kv_heads=2, d_ff=48, tie_embeddings=False)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", rope_theta=100.0, factor=2.5)
GEMMA = dict(norm_offset=True, post_norms=True, scale_embeddings=True, tie_embeddings=True,
             activation="gelu_tanh", head_dim=16, norm_epsilon=1e-6)


def llama(**kwargs):
  return transformers.LlamaConfig(**SHAPE, rms_norm_eps=1e-5, **kwargs)


DIALECTS = {
    "llama": (
        llama(rope_parameters=dict(rope_type="default", rope_theta=500.0)),
        dict(rope_theta=500.0, norm_epsilon=1e-5)),
    "llama3_scaling_tied": (
        transformers.LlamaConfig(**{**SHAPE, "tie_word_embeddings": True}, rms_norm_eps=1e-5,
                                 rope_parameters=LLAMA3),
        dict(rope_theta=500.0, rope_scaling=tuple(LLAMA3.items()), norm_epsilon=1e-5,
             tie_embeddings=True)),
    "linear_scaling_all_biases": (
        llama(rope_parameters=LINEAR, attention_bias=True, mlp_bias=True),
        dict(rope_theta=100.0, rope_scaling=tuple(LINEAR.items()), norm_epsilon=1e-5,
             qkv_bias=True, output_bias=True, mlp_bias=True)),
    "qwen2": (
        transformers.Qwen2Config(**SHAPE, rms_norm_eps=1e-6),
        dict(qkv_bias=True)),
    "qwen3": (
        transformers.Qwen3Config(**SHAPE, rms_norm_eps=1e-6, head_dim=12),
        dict(qk_norm=True, head_dim=12)),
    "gemma2": (
        transformers.Gemma2Config(
            **{**SHAPE, "tie_word_embeddings": True}, head_dim=16, query_pre_attn_scalar=20,
            sliding_window=5, attn_logit_softcapping=4.0, final_logit_softcapping=3.0,
            layer_types=["sliding_attention", "full_attention"]),
        dict(GEMMA, query_scale=20 ** -0.5, sliding_window=5, attention_soft_cap=4.0,
             logit_soft_cap=3.0, layer_types=("sliding", "full"))),
    "gemma3": (
        transformers.Gemma3TextConfig(
            **{**SHAPE, "tie_word_embeddings": True, "num_hidden_layers": 6}, head_dim=16,
            query_pre_attn_scalar=24, sliding_window=5,
            layer_types=["sliding_attention"] * 5 + ["full_attention"],
            rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=50.0),
                                 full_attention=LINEAR)),
        dict(GEMMA, layers=6, query_scale=24 ** -0.5, qk_norm=True, sliding_window=5,
             layer_types=("sliding",) * 5 + ("full",), rope_theta=100.0, rope_local_theta=50.0,
             rope_scaling=tuple(LINEAR.items()))),
}


def parameters_of(state, config):
  """A transformers state dict in our layout: kernels are [inputs, outputs], heads are an axis."""
  state = {k.removeprefix("model."): v.numpy() for k, v in state.items()}

  def projection(name, inputs, outputs):
    p = {"kernel": state[name + ".weight"].T.reshape(*inputs, *outputs)}
    if name + ".bias" in state:
      p["bias"] = state[name + ".bias"].reshape(outputs)
    return p

  def layer(i):
    at = f"layers.{i}."
    d, f, width = (config.d_model,), (config.d_ff,), config.width
    attention = {
        ours: projection(f"{at}self_attn.{theirs}_proj", d, (heads, width))
        for ours, theirs, heads in (("query", "q", config.heads), ("key", "k", config.kv_heads),
                                    ("value", "v", config.kv_heads))}
    attention["output"] = projection(at + "self_attn.o_proj", (config.heads, width), d)
    for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
      if config.qk_norm:
        attention[ours] = {"scale": state[f"{at}self_attn.{theirs}.weight"]}
    mlp = {ours: projection(f"{at}mlp.{ours}_proj", inputs, outputs)
           for ours, inputs, outputs in (("gate", d, f), ("up", d, f), ("down", f, d))}
    norms = dict(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
    if config.post_norms:
      norms.update(attention_post_norm="post_attention_layernorm",
                   mlp_norm="pre_feedforward_layernorm", mlp_post_norm="post_feedforward_layernorm")
    return dict(attention=attention, mlp=mlp,
                **{k: {"scale": state[f"{at}{v}.weight"]} for k, v in norms.items()})

  params = {f"blocks_{i}": layer(i) for i in range(config.layers)}
  params |= dict(embedding=state["embed_tokens.weight"], final_norm={"scale": state["norm.weight"]})
  if not config.tie_embeddings:
    params["unembedding"] = state["lm_head.weight"]
  return {"params": params}


def random_model(theirs):
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="eager").eval()
  with torch.no_grad():
    for parameter in model.parameters():  # norms and biases too: their defaults would hide errors
      parameter.normal_(std=0.3)
  return model


@pytest.mark.parametrize("name", DIALECTS)
def test_logits_equal_those_of_transformers(name):
  theirs, ours = DIALECTS[name]
  model = random_model(theirs)
  tokens = np.random.default_rng(0).integers(0, 61, size=(2, 24))
  with torch.no_grad():
    expected = model(torch.tensor(tokens)).logits.numpy()

  config = DecoderConfig(**{**OURS, **ours})
  params = parameters_of(model.state_dict(), config)

  @jax.jit
  def logits(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)
    hidden, _ = Decoder(config).apply(params, tokens, positions, jnp.ones_like(tokens))
    vocabulary = Decoder(config).apply(params, method="vocabulary")
    return token_logits(hidden, vocabulary, soft_cap=config.logit_soft_cap)

  assert np.std(expected) > 0.3
  np.testing.assert_allclose(logits(params, tokens), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("how", [dict(), dict(remat="full"), dict(scan_layers=True),
                                 dict(scan_layers=True, remat="full")], ids=str)
def test_states_of_every_layer_equal_those_of_transformers(how):
  """From either end, of sequences that share a row."""
  theirs, ours = DIALECTS["gemma3"]
  model, rng = random_model(theirs), np.random.default_rng(0)
  config = DecoderConfig(**{**OURS, **ours}, **how)
  params = parameters_of(model.state_dict(), config)
  if config.scan_layers:
    blocks = [params["params"].pop(f"blocks_{i}") for i in range(config.layers)]
    params["params"]["blocks"] = jax.tree.map(lambda *x: np.stack(x), *blocks)
  sequences = [rng.integers(0, 61, size=n) for n in (9, 13)]
  batch = pack([Trajectory(s, np.zeros(len(s))) for s in sequences], row_length=32)
  names = tuple(f"hidden@{layer}" for layer in range(-7, 7))
  outputs = jax.jit(lambda p, b: model_outputs(config, p, b, signals=("hidden", *names), logprobs=False))(
      params, batch)
  for item, sequence in enumerate(sequences):
    with torch.no_grad():
      theirs = model(torch.tensor(sequence[None]), output_hidden_states=True).hidden_states
    for name in names:
      found = np.asarray(outputs.get(name))[batch.sequence_ids == item]
      expected = theirs[int(name.split("@")[1])][0]
      np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4, err_msg=name)
  np.testing.assert_array_equal(outputs.get("hidden@-1"), outputs.hidden)
