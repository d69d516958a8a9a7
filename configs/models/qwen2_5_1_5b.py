"""Qwen2.5-1.5B-Instruct"""

from configs.models import gsm8k

MODEL = dict(
    source="Qwen/Qwen2.5-1.5B-Instruct", vocab_size=151_936, layers=28, d_model=1536, heads=12, kv_heads=2,
    head_dim=128, d_ff=8960, rope_theta=1_000_000.0, norm_epsilon=1e-6, qkv_bias=True, tie_embeddings=True)
MACHINES = {
    "v5e-8": dict(mesh=dict(fsdp=8)),
    "v5p-64": dict(mesh=dict(fsdp=8)),
    "h100-1": dict(),
    "h200-1": dict(),
}


def get_config(variant: str = ""):
  return gsm8k.get_config(MODEL, MACHINES, variant)
