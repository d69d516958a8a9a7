"""Llama-3.1-8B-Instruct"""

from configs.models import gsm8k

MODEL = dict(
    source="meta-llama/Llama-3.1-8B-Instruct", vocab_size=128_256, layers=32, d_model=4096, heads=32,
    kv_heads=8, head_dim=128, d_ff=14_336, rope_theta=500_000.0, norm_epsilon=1e-5, tie_embeddings=False,
    rope_scaling=(("rope_type", "llama3"), ("factor", 8.0), ("low_freq_factor", 1.0),
                  ("high_freq_factor", 4.0), ("original_max_position_embeddings", 8192)))
MACHINES = {
    "v5e-8": dict(mesh=dict(fsdp=4, tensor=2), optimizer=dict(name="adafactor"),
                  model=dict(param_dtype="bfloat16"), rollout=dict(max_rows=128)),
    "v5p-64": dict(mesh=dict(fsdp=16)),
    "h200-1": dict(optimizer=dict(name="adafactor"), rollout=dict(max_rows=128)),
}


def get_config(variant: str = ""):
  return gsm8k.get_config(MODEL, MACHINES, variant)
