"""The measurements of `accelerator.py` that run `transformers` on torch, on the same shapes.

Decoding is `generate` with a dynamic cache and SDPA attention, all samples of a prompt in one
batch. Training is forward, backward and fused AdamW under bfloat16 autocast with float32
parameters, on the same number of sequences; checkpointed where jaxrl rematerialises fully.
"""

import argparse
import importlib.util
import statistics
import time

import scaling_model as model

TORCH_ROWS = 2  # at a time, where jaxrl chooses its own number; the logits of all are in memory


def measure(args: argparse.Namespace, name: str) -> dict:
  """Decoding and training figures, or why there are none."""
  missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
  if missing:
    return {"absent": f"{' and '.join(missing)} not installed"}
  import torch
  if args.platform != "cpu" and not torch.cuda.is_available():
    return {"absent": f"torch {torch.__version__} has no device of platform {args.platform}"}
  import transformers
  device = "cpu" if args.platform == "cpu" else "cuda"
  shape = model.SHAPES[name]
  return {"versions": {"torch": torch.__version__, "transformers": transformers.__version__},
          "decode": _decode(args, shape, device), "train": _train(args, shape, device)}


def _model(shape, device, dtype, length):
  import torch
  import transformers
  torch.manual_seed(0)
  config = transformers.Qwen2Config(
      vocab_size=shape.vocab_size, hidden_size=shape.d_model, intermediate_size=shape.d_ff,
      num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
      num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tie_embeddings,
      max_position_embeddings=length, bos_token_id=None, eos_token_id=None, pad_token_id=0)
  with torch.device(device):
    return transformers.Qwen2ForCausalLM(config).to(getattr(torch, dtype))


def _decode(args, shape, device):
  import torch
  network = _model(shape, device, "bfloat16", args.prompt + args.response).eval()
  found = []
  for rows in map(int, args.rows.split(",")):
    samples = min(args.samples, rows)
    ids = torch.randint(shape.vocab_size, (rows // samples, args.prompt), device=device)

    def call(tokens):
      with torch.no_grad():
        out = network.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
            num_return_sequences=samples, min_new_tokens=tokens, max_new_tokens=tokens,
            pad_token_id=0)
      if out.shape != (len(ids) * samples, args.prompt + tokens):
        raise RuntimeError(f"generate returned {tuple(out.shape)}")

    try:
      first, whole = (_timed(lambda: call(n), args, device) for n in (1, args.response))
    except torch.OutOfMemoryError as error:
      found.append({"rows": rows, "error": str(error)[:200]})
      continue
    count = len(ids) * samples
    found.append({"rows": count, "call_s": whole, "decode_s": whole - first,
                  "tokens_per_s": count * args.response / whole,
                  "decode_tokens_per_s": count * (args.response - 1) / (whole - first)})
  return found


def _train(args, shape, device):
  import torch
  network = _model(shape, device, "float32", args.sequence)
  if args.remat == "full":
    network.gradient_checkpointing_enable()
  network.train()
  optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, betas=(0.9, 0.95), fused=True)
  per_row = args.row_length // args.sequence
  at_once = args.micro_batch_rows or TORCH_ROWS
  batches = [torch.randint(shape.vocab_size, (at_once * per_row, args.sequence), device=device)
             for _ in range(args.train_rows // at_once)]

  def step():
    for ids in batches:
      with torch.autocast(device, dtype=torch.bfloat16):
        loss = network(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)
      loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  try:
    seconds = _timed(step, args, device)
  except torch.OutOfMemoryError as error:
    return {"error": str(error)[:200]}
  tokens = sum(ids.numel() for ids in batches)
  useful = model.useful_flops(shape, args.sequence, tokens)
  return {"tokens": tokens, "step_s": seconds, "tokens_per_s": tokens / seconds,
          "flops_per_s": useful / seconds}


def _timed(call, args, device):
  import torch
  seconds = []
  for i in range(args.warmup + args.repeats):
    began = time.perf_counter()
    call()
    if device == "cuda":
      torch.cuda.synchronize()
    if i >= args.warmup:
      seconds.append(time.perf_counter() - began)
  return statistics.median(seconds)
