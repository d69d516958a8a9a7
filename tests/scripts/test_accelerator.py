"""The accelerator script on a toy model and one CPU: its figures agree with one another."""

import json
import types

import numpy as np
import pytest

from jaxrl import chips
import accelerator
import accelerator_report

PROMPT, RESPONSE, SAMPLES, LENGTH, SEQUENCE, TRAIN_ROWS = 16, 5, 4, 64, 32, 4
FLAGS = ["--models=toy", "--sections=decode,train,grpo", "--rows=8", f"--prompt={PROMPT}",
         f"--response={RESPONSE}", f"--samples={SAMPLES}", f"--row-length={LENGTH}",
         f"--sequence={SEQUENCE}", f"--train-rows={TRAIN_ROWS}", "--micro-batch-rows=2",
         "--chunk=128", "--grpo-prompts=2", "--repeats=1", "--warmup=1", "--matmul=128",
         "--copy-mb=1"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  out = tmp_path_factory.mktemp("bench")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles faster, runs slower
    accelerator.main([*FLAGS, f"--out={out}"])
  found, = out.glob("accelerator_*.json")
  result = json.loads(found.read_text())
  errors = [part["error"] for part in result["models"]["toy"].values() if "error" in part]
  assert not errors, errors[0]
  return types.SimpleNamespace(**result["models"]["toy"], limits=result["limits"],
                               device=result["device"], text=found.with_suffix(".md").read_text())


def test_one_device_is_measured_and_named(measured):
  assert measured.device["count"] == 1
  assert measured.limits["machine"] is None  # no data sheet of a CPU
  assert measured.limits["matmul_flops"] > 0 and measured.limits["copy_bytes_per_s"] > 0
  assert measured.device["kind"] in measured.text


def test_decoding_counts_every_token_once_and_reads_weights_and_caches(measured):
  assert [row["rows"] for row in measured.decode["rows"]] == [8]
  for row in measured.decode["rows"]:
    assert row["tokens"] == row["rows"] * RESPONSE
    assert row["decode_tokens_per_s"] * row["decode_s"] == pytest.approx(
        row["rows"] * (RESPONSE - 1))
    # All but the table of input embeddings, which is only looked up; keys and values of 8 heads.
    products = measured.decode["parameters"] - 512 * 64 - 5 * 64
    seen = sum(row["rows"] * written for written in range(1, RESPONSE))
    cache = 2 * 2 * 8 * 8 * 2 * (row["rows"] / SAMPLES * PROMPT + seen / (RESPONSE - 1))
    assert row["bytes_per_step"] == pytest.approx(2 * products + cache)
    share = row["bytes_per_step"] * (RESPONSE - 1) / row["decode_s"]
    assert row["roofline"]["of_measured"] == pytest.approx(
        share / measured.limits["copy_bytes_per_s"])
    assert row["roofline"]["of_sheet"] is None


def test_mfu_is_of_the_products_of_forward_and_backward_pass(measured):
  train = measured.train
  assert train["tokens"] == TRAIN_ROWS * LENGTH and train["rows"] == TRAIN_ROWS
  assert np.isfinite(train["loss"])
  matrices = 2 * (2 * 64 * 64 + 2 * 64 * 64 + 3 * 64 * 128) + 512 * 64
  pairs = SEQUENCE * SEQUENCE / 2 * (train["tokens"] / SEQUENCE)  # causal, within sequences
  forward = 2 * matrices * train["tokens"] + 2 * 2 * 2 * 64 * pairs
  assert train["useful_flops"] == pytest.approx(3 * forward)
  assert train["mfu"]["of_measured"] == pytest.approx(
      3 * forward / train["step_s"] / measured.limits["matmul_flops"])


def test_parts_of_a_grpo_step_add_up(measured):
  grpo = measured.grpo
  assert grpo["sequences"] == 2 * SAMPLES and grpo["tokens"] == 2 * SAMPLES * RESPONSE
  parts = [grpo[k] for k in ("sampling_s", "reference_s", "update_s", "rest_s")]
  assert min(parts) > 0
  assert sum(parts) == pytest.approx(grpo["step_s"], rel=0.05)
  assert grpo["logprob_gap"] < 0.1


def test_an_absent_peer_and_a_failed_section_are_reported_not_raised(tmp_path):
  result = {
      "device": {"kind": "NVIDIA H100 80GB HBM3", "platform": "gpu"}, "versions": {"jax": "0"},
      "settings": {"repeats": 1, "prompt": 1, "samples": 1, "response": 1},
      "limits": {"matmul_flops": 5e14, "copy_bytes_per_s": 3e12, "machine": "H100",
                 "sheet_flops": 989e12, "sheet_bytes_per_s": 3350e9},
      "models": {"toy": {
          "decode": {"rows": [{"rows": 256, "decode_tokens_per_s": 10.0, "tokens_per_s": 9.0,
                               "bytes_per_s": 2.01e12, "compilations": 1}]},
          "train": {"error": "out of memory"}, "torch": {"absent": "torch not installed"}}}}
  accelerator_report.write(result, tmp_path)
  text = (tmp_path / "accelerator_nvidia-h100-80gb-hbm3.md").read_text()
  assert "60.0% / 67.0%" in text and "compiled 1 programs" in text
  assert "out of memory" in text and "No comparison: torch not installed" in text


@pytest.mark.parametrize("kind, name", [
    ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"),
    ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"),
    ("cpu", None)])
def test_devices_are_found_in_the_table_by_what_jax_calls_them(kind, name):
  machine = chips.of_device(types.SimpleNamespace(device_kind=kind))
  assert (machine and machine.name) == name


@pytest.mark.parametrize("flags", [["--models=9b"], ["--sections=dpo"]])
def test_an_unknown_name_is_refused_before_anything_is_measured(flags):
  with pytest.raises(SystemExit, match="there are"):
    accelerator.main(flags)
