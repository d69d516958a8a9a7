"""Llama-3.1-8B-Instruct with GRPO on GSM8K (arXiv:2407.21783), one variant for each machine.

Largest use of a device, `jaxrl run --plan`; not measured, not trained:

  v5e-8    15.0 of 16.9 GB   an update, with bfloat16 parameters and Adafactor; by the TPU compiler
  v5p-64   24.7 of 102.8 GB  an update, 4.2e16 FLOPs a step; likewise
  h200-1  128.6 of 134 GB    an update, with Adafactor; tight, as the gradients of float32 alone are 64 GB; by XLA
                             for CPUs, with XLA_PYTHON_CLIENT_MEM_FRACTION=.95

One H100 is too small for all parameters.
"""

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
    "h200-1": dict(optimizer=dict(name="adafactor"), rollout=dict(max_rows=64), batch=dict(micro_batch_rows=8)),
}


def get_config(variant: str = ""):
  return gsm8k.get_config(MODEL, MACHINES, variant)
