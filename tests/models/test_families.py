"""config.json in and out: what transformers writes is understood, and what is not is refused by name."""

import dataclasses

import pytest
import transformers

from jaxrl.models import DecoderConfig, families
from tests.models import published

LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=61, hidden_size=32,
             intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def written(name, scores=False):
  """What transformers writes of a config."""
  table = published.SCORES if scores else published.CONFIGS
  config = table[name]()
  found = config.to_dict()
  causal = next(f for f in families.FAMILIES if f.model_type == config.model_type)
  return {**found, "architectures": [causal.classifier if scores else causal.causal]}


def test_llama_2_as_it_was_first_published_has_the_defaults_of_its_class():
  found = families.settings(LLAMA)
  assert found["kv_heads"] == 4 and found["head_dim"] == 8 and found["rope_theta"] == 10_000.0
  assert not found["tie_embeddings"] and found["rope_scaling"] == () and found["activation"] == "silu"


@pytest.mark.parametrize("scaling", [published.LLAMA3, published.LINEAR])
def test_both_spellings_of_rope_mean_the_same(scaling):
  theta = scaling["rope_theta"]
  old = {k: v for k, v in scaling.items() if k != "rope_theta"}
  new = families.settings({**LLAMA, "rope_parameters": scaling})
  assert families.settings({**LLAMA, "rope_theta": theta, "rope_scaling": old}) == new
  oldest = {"type": old["rope_type"], **{k: v for k, v in old.items() if k != "rope_type"}}
  assert families.settings({**LLAMA, "rope_theta": theta, "rope_scaling": oldest}) == new
  assert new["rope_theta"] == theta and dict(new["rope_scaling"])["factor"] == scaling["factor"]


def test_gemma_3_of_transformers_4_has_two_bases_and_a_pattern():
  hf = {**written("gemma3"), "rope_theta": 100.0, "rope_local_base_freq": 50.0,
        "rope_scaling": dict(rope_type="linear", factor=2.5), "sliding_window_pattern": 3}
  del hf["rope_parameters"], hf["layer_types"]
  hf.pop("_sliding_window_pattern", None)
  found = families.settings(hf)
  assert (found["rope_theta"], found["rope_local_theta"]) == (100.0, 50.0)
  assert found["layer_types"] == ("sliding", "sliding", "full") * 2
  assert dict(found["rope_scaling"]) == dict(rope_type="linear", factor=2.5)


def test_qwen_ignores_its_window_unless_it_is_used():
  hf = {**written("qwen2"), "use_sliding_window": False, "sliding_window": 5, "max_window_layers": 1}
  del hf["layer_types"]
  assert families.settings(hf)["layer_types"] == ("full",)
  found = families.settings({**hf, "use_sliding_window": True})
  assert found["layer_types"] == ("full", "sliding") and found["sliding_window"] == 5


@pytest.mark.parametrize("change, says", [
    (dict(architectures=["MixtralForCausalLM"]), r"MixtralForCausalLM.*LlamaForCausalLM, "),
    (dict(architectures=None), r"architectures=\[\]"),
    (dict(hidden_act="relu2"), r"hidden_act='relu2'.*silu, gelu"),
    (dict(rope_scaling=dict(rope_type="dynamic", factor=4.0)), r"'dynamic'.*default, linear, llama3, yarn"),
    (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "'yarn' lacks original_max_position_embeddings"),
    (dict(rope_scaling=dict(rope_type="longrope", short_factor=[1.0]), max_position_embeddings=64),
     "'longrope' lacks long_factor"),
    (dict(architectures=["Phi3ForCausalLM"], rope_scaling=dict(rope_type="linear", factor=2.0)),
     "'linear'.*default, longrope"),
    (dict(architectures=["Phi3ForCausalLM"], partial_rotary_factor=0.5,
          rope_parameters=dict(rope_type="default", partial_rotary_factor=0.75)), "0.75 and 0.5.*contradict"),
    (dict(architectures=["Gemma3ForConditionalGeneration"]), "has no text_config"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), r"lacks low_freq_factor"),
    (dict(rope_parameters=dict(rope_type="linear", factor=2.0, attention_factor=1.5)),
     "attention_factor=1.5"),
    (dict(rope_theta=5.0, rope_parameters=dict(rope_type="default", rope_theta=6.0)), "contradict"),
    (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "partial_rotary_factor=0.5"),
    (dict(partial_rotary_factor=0.4), "partial_rotary_factor=0.4"),
    (dict(quantization_config=dict(bits=4)), "quantization_config"),
    (dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    (dict(num_attention_heads=families.REQUIRED), "num_attention_heads is missing"),
    (dict(architectures=["LlamaForSequenceClassification"], id2label={"0": "A", "1": "B"}), "2 labels"),
    (dict(architectures=["LlamaForSequenceClassification"]), "2 labels"),
    (dict(architectures=["MistralForCausalLM"], sliding_window=4,
          layer_types=["full_attention", "sliding_attention"]), "all layers"),
    (dict(architectures=["Qwen2ForCausalLM"], layer_types=["full_attention", "chunked_attention"]),
     "chunked"),
    (dict(architectures=["Qwen2ForCausalLM"], sliding_window=4, use_sliding_window=False,
          layer_types=["sliding_attention", "full_attention"]), "there is no window"),
])
def test_what_no_decoder_computes_is_refused_by_name(change, says):
  hf = {k: v for k, v in {**LLAMA, **change}.items() if v is not families.REQUIRED}
  with pytest.raises(ValueError, match=says):
    families.settings(hf)


@pytest.mark.parametrize("name", published.CONFIGS)
def test_config_written_from_the_settings_alone_means_the_same_to_transformers(name):
  hf = written(name)
  decoder = DecoderConfig(**families.settings(hf))
  found = families.hf_config(decoder, max_positions=128)
  theirs = transformers.AutoConfig.for_model(**found)
  ours = published.CONFIGS[name]()
  for field in ("rope_parameters", "head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
                "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping", "layer_types",
                "sliding_window"):
    unread = name == "gemma3_capped" and field == "attn_logit_softcapping"
    if not name.startswith("phi3") and name != "mistral_no_window" and not unread and hasattr(ours, field):
      assert getattr(theirs, field) == getattr(ours, field), field
  assert families.settings(found) == families.settings(hf)


@pytest.mark.parametrize("name", published.CONFIGS)
def test_config_that_was_imported_is_kept(name):
  hf = {**written(name), "some_note": "kept"}
  decoder = DecoderConfig(**families.settings(hf), dtype="bfloat16", scan_layers="mixed" not in name, critic=True,
                          heads_on_top=(("value", 1),))
  assert families.hf_config(decoder, imported=hf) == hf


def test_a_policy_that_became_a_reward_model_changes_its_architecture():
  hf = written("qwen3")
  decoder = DecoderConfig(**families.settings(hf), heads_on_top=(("score", 1),))
  found = families.hf_config(decoder, imported=hf)
  assert found["architectures"] == ["Qwen3ForSequenceClassification"] and len(found["id2label"]) == 1
  assert families.settings(found)["heads_on_top"] == (("score", 1),)


def test_combinations_that_nobody_published_say_what_the_nearest_has():
  with pytest.raises(ValueError, match="llama is nearest, but logit_soft_cap=0.0 and not 3.0"):
    families.hf_config(DecoderConfig(vocab_size=61, logit_soft_cap=3.0))
  with pytest.raises(ValueError, match=r"heads_on_top=.*'score', 1"):
    families.hf_config(DecoderConfig(vocab_size=61, heads_on_top=(("score", 2),)))


@pytest.mark.parametrize("change", [
    dict(), dict(qkv_bias=True), dict(qk_norm=True), dict(sliding_window=4, layer_types=("sliding",)),
    dict(mlp_bias=True), dict(rope_scaling=(("rope_type", "linear"), ("factor", 2.0)))])
def test_decoders_of_ones_own_find_an_architecture_that_means_the_same(change):
  decoder = DecoderConfig(vocab_size=61, **change)
  again = DecoderConfig(**families.settings(families.hf_config(decoder)))
  same = {f.name for f in dataclasses.fields(decoder)} - {"head_dim"}
  assert {k: getattr(again, k) for k in same} == {k: getattr(decoder, k) for k in same}
  assert again.width == decoder.width
