"""Qwen3-4B with GRPO on GSM8K (arXiv:2505.09388), one variant for each machine.

Largest use of a device, `jaxrl run --plan`; not measured, not trained. The last two by XLA for CPUs, with
XLA_PYTHON_CLIENT_MEM_FRACTION=.95:

  v5e-8    14.5 of 16.9 GB   an update, AdamW's first moment in bfloat16; by the TPU compiler
  v5p-64   23.6 of 102.8 GB  an update, 2.4e16 FLOPs a step; likewise
  h100-1   67.9 of 76 GB     an update, with Adafactor
  h200-1  115.6 of 134 GB    an update

With float32 moments, a v5e-8 takes 16.7 GB as fsdp=4, tensor=2 and 18.9 as fsdp=8.
"""

from configs.models import gsm8k

MODEL = dict(
    source="Qwen/Qwen3-4B", vocab_size=151_936, layers=36, d_model=2560, heads=32, kv_heads=8, head_dim=128,
    d_ff=9728, rope_theta=1_000_000.0, norm_epsilon=1e-6, qk_norm=True, tie_embeddings=True)
MACHINES = {
    "v5e-8": dict(mesh=dict(fsdp=2, tensor=4), batch=dict(micro_batch_rows=8),
              optimizer=dict(moments_dtype="bfloat16"), rollout=dict(max_rows=128)),
    "v5p-64": dict(mesh=dict(fsdp=8)),
    "h100-1": dict(optimizer=dict(name="adafactor"), rollout=dict(max_rows=64)),
    "h200-1": dict(rollout=dict(max_rows=64)),
}


def get_config(variant: str = ""):
  return gsm8k.get_config(MODEL, MACHINES, variant)
