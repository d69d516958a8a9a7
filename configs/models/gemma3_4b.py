"""The text model of Gemma-3-4B-it with GRPO on GSM8K (arXiv:2503.19786), one variant for each machine.

Largest use of a device, `jaxrl run --plan`; not measured, not trained. The last two by XLA for CPUs, with
XLA_PYTHON_CLIENT_MEM_FRACTION=.95:

  v5e-8   14.6 of 16.9 GB   an update, AdamW's first moment in bfloat16; by the TPU compiler
  v5p-64  21.9 of 102.8 GB  an update, 2.3e16 FLOPs a step; likewise
  h100-1  69.2 of 76 GB     an update, with Adafactor; tight
  h200-1  91.9 of 134 GB    an update

With float32 moments and fsdp=4, tensor=2, a v5e-8 takes 16.8 GB.
"""

from configs.models import gsm8k

LAYERS = 34
MODEL = dict(
    source="google/gemma-3-4b-it", vocab_size=262_208, layers=LAYERS, d_model=2560, heads=8, kv_heads=4,
    head_dim=256, d_ff=10_240, activation="gelu_tanh", norm_epsilon=1e-6, norm_offset=True, post_norms=True,
    qk_norm=True, query_scale=256 ** -0.5, scale_embeddings=True, tie_embeddings=True,
    rope_theta=1_000_000.0, rope_local_theta=10_000.0, rope_scaling=(("rope_type", "linear"), ("factor", 8.0)),
    layer_types=tuple("sliding" if (i + 1) % 6 else "full" for i in range(LAYERS)), sliding_window=1024)
MACHINES = {
    "v5e-8": dict(mesh=dict(fsdp=2, tensor=4), batch=dict(micro_batch_rows=8),
              optimizer=dict(moments_dtype="bfloat16"), rollout=dict(max_rows=128)),
    "v5p-64": dict(mesh=dict(fsdp=8)),
    "h100-1": dict(optimizer=dict(name="adafactor"), rollout=dict(max_rows=64)),
    "h200-1": dict(rollout=dict(max_rows=64), batch=dict(micro_batch_rows=16)),
}


def get_config(variant: str = ""):
  return gsm8k.get_config(MODEL, MACHINES, variant)
