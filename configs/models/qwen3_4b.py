"""Qwen3-4B"""

from configs.models import gsm8k

MODEL = dict(
    source="Qwen/Qwen3-4B", vocab_size=151_936, layers=36, d_model=2560, heads=32, kv_heads=8, head_dim=128,
    d_ff=9728, rope_theta=1_000_000.0, norm_epsilon=1e-6, qk_norm=True, tie_embeddings=True)
MACHINES = {
    "v5e-8": dict(mesh=dict(fsdp=8), rollout=dict(max_rows=128)),
    "v5p-64": dict(mesh=dict(fsdp=8)),
    "h100-1": dict(optimizer=dict(name="adafactor"), rollout=dict(max_rows=64)),
    "h200-1": dict(rollout=dict(max_rows=128)),
}


def get_config(variant: str = ""):
  return gsm8k.get_config(MODEL, MACHINES, variant)
