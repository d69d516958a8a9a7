"""What jaxrl gets out of one GPU or TPU, against the limits of that chip and against PyTorch.

  python scripts/bench/accelerator.py

Needs no network: models of the shapes of Qwen2.5-0.5B and -1.5B with random weights. Four sections,
each in a process of its own, so that none is short of another's memory:

  decode   tokens/s of `Sampler` at 8 to 512 rows with bfloat16 weights, and the share of the memory
           bandwidth's roofline: all weights, each prompt's cache once for its samples, and each
           sample's own cache, per step (goal: 60% at 256 rows).
  train    tokens/s and MFU of `Learner.update` on packed rows, float32 parameters and Adam,
           bfloat16 activations (goal: 45% at 1.5B and 4096 tokens). MFU counts 6 FLOPs per
           parameter and token and causal attention within sequences; nothing twice.
  grpo     seconds of a GRPO step with a reference: sampling, reference, update, and the rest
           (rewards, packing, moving the batch).
  torch    the same decoding and training by `transformers` and torch on the same chip, where they
           are installed; the report says if they are not.

Shares are of the data sheet's figures where `chips.py` has the chip, and of a product and a copy
measured on the spot. Times are medians of `--repeats` calls after `--warmup`; a figure whose timed
calls compiled something is marked. Writes results/bench/accelerator_<device>.json and .md.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys

import accelerator_report
import scaling_model

ROOT = pathlib.Path(__file__).parents[2]
SECTIONS = ("limits", "decode", "train", "grpo", "torch")
ONE_CHIP = {"CUDA_VISIBLE_DEVICES": "0", "TPU_VISIBLE_CHIPS": "0", "TPU_PROCESS_BOUNDS": "1,1,1",
            "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1"}


def arguments() -> argparse.ArgumentParser:
  """Flags of this script."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--models", default="qwen2.5-0.5b,qwen2.5-1.5b")
  parser.add_argument("--sections", default="decode,train,grpo,torch", help="which to measure")
  parser.add_argument("--rows", default="8,32,128,256,512", help="samples at a time, decoding")
  parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
  parser.add_argument("--response", type=int, default=256, help="tokens of a sample")
  parser.add_argument("--samples", type=int, default=8, help="per prompt")
  parser.add_argument("--row-length", type=int, default=4096, help="tokens of a packed row")
  parser.add_argument("--train-rows", type=int, default=16, help="packed rows of an update")
  parser.add_argument("--micro-batch-rows", type=int, default=0, help="at a time; 0: chosen")
  parser.add_argument("--sequence", type=int, default=1024, help="tokens of a sequence in a row")
  parser.add_argument("--remat", default="full", help="none, dots or full")
  parser.add_argument("--chunk", type=int, default=16384, help="of the vocabulary")
  parser.add_argument("--grpo-prompts", type=int, default=32)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--warmup", type=int, default=2)
  parser.add_argument("--matmul", type=int, default=8192, help="size of the measured product")
  parser.add_argument("--copy-mb", type=int, default=1024, help="size of the measured copy")
  parser.add_argument("--timeout", type=float, default=1200, help="seconds for each measurement")
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "bench")
  parser.add_argument("--scan", default="train", help="sections whose layers are scanned")
  parser.add_argument("--child", help=argparse.SUPPRESS)
  parser.add_argument("--platform", default="cpu", help=argparse.SUPPRESS)
  return parser


def run_child(argv: list[str], section: str, name: str, timeout: float) -> dict:
  """One measurement in a process; `{"error": ...}` where it failed."""
  environment = {**ONE_CHIP, **os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  environment["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "",
                                    os.environ.get("XLA_FLAGS", ""))
  command = [sys.executable, __file__, *argv, f"--child={section}:{name}"]
  try:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
  except subprocess.TimeoutExpired:
    return {"error": f"took more than --timeout={timeout:.0f} seconds"}
  if done.returncode:
    lines = done.stderr.strip().splitlines()
    return {"error": "\n".join(lines[-8:])[-1500:]}
  return json.loads(done.stdout.splitlines()[-1])


def child(args: argparse.Namespace, section: str, name: str) -> dict:
  """Runs one section; in the process that `run_child` starts."""
  if section == "torch":
    import accelerator_torch
    return accelerator_torch.measure(args, name)
  import accelerator_sections
  return accelerator_sections.MEASURE[section](args, name)


def main(argv: list[str] | None = None) -> dict:
  """Measures, writes the report; returns what the JSON file holds."""
  argv = sys.argv[1:] if argv is None else argv
  args = arguments().parse_args(argv)
  if args.child:
    print(json.dumps(child(args, *args.child.split(":", 1))))
    return {}
  sections, names = args.sections.split(","), args.models.split(",")
  if unknown := set(names) - set(scaling_model.SHAPES):
    raise SystemExit(f"--models: no {', '.join(sorted(unknown))}; there are "
                     f"{', '.join(scaling_model.SHAPES)}")
  if unknown := set(sections) - set(SECTIONS):
    raise SystemExit(f"--sections: no {', '.join(sorted(unknown))}; there are "
                     f"{', '.join(SECTIONS)}")
  limits = run_child(argv, "limits", "", args.timeout)
  if "error" in limits:
    raise SystemExit(f"measuring the device failed:\n{limits['error']}")
  result = {
      "device": limits["device"], "versions": limits["versions"], "limits": limits["limits"],
      "settings": {k: v for k, v in vars(args).items() if k not in ("child", "out", "platform")},
      "models": {name: {} for name in names}}
  for name in names:
    for section in sections:
      if section != "limits":
        print(f"{name} {section} ...", flush=True)
        platform = f"--platform={limits['device']['platform']}"
        result["models"][name][section] = run_child([*argv, platform], section, name, args.timeout)
  accelerator_report.write(result, args.out)
  return result


if __name__ == "__main__":
  main()
