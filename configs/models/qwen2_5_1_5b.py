"""Qwen2.5-1.5B-Instruct with GRPO on GSM8K (arXiv:2412.15115), one variant for each machine.

Largest use of a device, `jaxrl run --plan`; not measured, not trained:

  v5e-8    9.8 of 16.9 GB   an update, 8.9e15 FLOPs a step; by the TPU compiler
  v5p-64  10.0 of 102.8 GB  an update; likewise
  h100-1  60.4 of 76 GB     an update; by XLA for CPUs, with XLA_PYTHON_CLIENT_MEM_FRACTION=.95
  h200-1  88.1 of 134 GB    sampling; likewise
"""

from configs.models import gsm8k

MODEL = dict(
    source="Qwen/Qwen2.5-1.5B-Instruct", vocab_size=151_936, layers=28, d_model=1536, heads=12, kv_heads=2,
    head_dim=128, d_ff=8960, rope_theta=1_000_000.0, norm_epsilon=1e-6, qkv_bias=True, tie_embeddings=True)
MACHINES = {
    "v5e-8": dict(mesh=dict(fsdp=8)),
    "v5p-64": dict(mesh=dict(fsdp=8)),
    "h100-1": dict(rollout=dict(max_rows=256)),
    "h200-1": dict(),
}


def get_config(variant: str = ""):
  return gsm8k.get_config(MODEL, MACHINES, variant)
