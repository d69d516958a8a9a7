"""The comparison's own arithmetic and its jaxrl side; peers and timings are run by hand."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models import Decoder
from jaxrl.models import DecoderConfig
from jaxrl.models import token_logits

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import compare  # noqa: E402
import costs  # noqa: E402
import machine  # noqa: E402
import ragged  # noqa: E402
from peers import common  # noqa: E402
import report  # noqa: E402

TOY = dict(prompts=2, samples=4, prompt_len=6, new_tokens=10, vocab=40, layers=1, d_model=16,
           heads=2, kv_heads=1, d_ff=32, sft_batch=4, sft_len=12, micro_batch_rows=4, warmup=1,
           iters=2, pairs=4, pair_len=12)


def test_counted_flops_are_those_that_xla_counts_in_the_real_forward_pass():
  work = common.Work("sft", vocab=256, layers=2, d_model=128, heads=2, kv_heads=1, d_ff=384)
  rows, length = 4, 64
  config = DecoderConfig(vocab_size=work.vocab, layers=work.layers, d_model=work.d_model,
                         heads=work.heads, kv_heads=work.kv_heads, d_ff=work.d_ff)
  decoder = Decoder(config)
  tokens = jnp.zeros((rows, length), jnp.int32)
  params = jax.eval_shape(decoder.init, jax.random.key(0), tokens, tokens, tokens)

  def forward(params, tokens):
    hidden, _ = decoder.apply(params, tokens, tokens, tokens)
    return token_logits(hidden, decoder.apply(params, method="vocabulary"))
  analysis = jax.jit(forward).lower(meta.unbox(params), tokens).compile().cost_analysis()
  analysis = analysis[0] if isinstance(analysis, list) else analysis
  everything = rows * length ** 2  # the real pass computes what the causal mask hides, too
  counted = costs.forward_flops(work, rows * length, everything, rows * length)
  assert counted == pytest.approx(analysis["flops"], rel=0.1)


def test_counted_parameters_are_those_of_the_model():
  work = common.Work("sft")
  config = DecoderConfig(vocab_size=work.vocab)
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens, tokens, tokens)
  norms = (2 * work.layers + 1) * work.d_model
  assert costs.parameters(work) == sum(x.size for x in jax.tree.leaves(params)) - norms


def test_a_limit_is_that_of_arithmetic_or_of_memory_whichever_is_longer():
  work = common.Work("sft")
  (update,) = costs.phases(work)
  fast_memory = {8: 1e9, 512: 1e9}
  assert costs.limit_seconds(work, 2.0, fast_memory) == pytest.approx(update.flops / 2e9)
  # 24 MB of parameters and their like do not fit into 8 MB, so the second rate is theirs.
  slow_memory = {8: 1e9, 512: 0.5}
  assert costs.limit_seconds(work, 1e9, slow_memory) == pytest.approx(update.moved / 0.5e9)


def test_sampling_work_of_lengths_that_are_all_equal_is_a_sum_over_the_tokens():
  work = common.Work("sampling", prompts=3, samples=5, prompt_len=7, new_tokens=11)
  pairs = 3 * sum(range(1, 8)) + 15 * sum(range(8, 19))
  expected = costs.forward_flops(work, 3 * 7 + 15 * 11, pairs, 3 + 15 * 11)
  assert sum(phase.flops for phase in costs.phases(work)) == pytest.approx(expected, rel=1e-9)


def stat(user, idle, wait=0):
  """/proc/stat of a machine with these ticks on its first line, and a line per CPU."""
  return f"cpu  {user} 10 20 {idle} {wait} 1 2 3 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\nintr 5\n"


def test_other_processes_are_what_the_machine_did_beyond_our_own_time():
  hz = os.sysconf("SC_CLK_TCK")
  before, after = common.parse_stat(stat(1000, 5000)), common.parse_stat(stat(1000 + 6 * hz,
                                                                              5000 + 4 * hz))
  assert common.other_share(before, after, own=5.0) == pytest.approx(0.1)
  assert common.other_share(before, after, own=6.5) == 0.0  # ticks are coarse


def test_waiting_for_a_disk_is_not_being_busy():
  hz = os.sysconf("SC_CLK_TCK")
  before, after = common.parse_stat(stat(0, 0)), common.parse_stat(stat(0, 3 * hz, wait=2 * hz))
  assert common.other_share(before, after, own=0.0) == 0.0
  assert after[1] - before[1] == pytest.approx(5.0)


def test_spans_that_overlap_or_hold_one_another_count_once():
  assert common.covered([(5, 6), (0, 3), (2, 4), (1, 2)]) == 5.0
  assert common.covered([]) == 0.0


def test_waiting_for_quiet_ends_at_its_limit(monkeypatch):
  busy = iter((float(i), float(i)) for i in range(100))  # all CPUs, all the time, by others
  monkeypatch.setattr(common, "cpu_times", lambda: next(busy))
  assert not machine.wait_until_quiet(0.0, 0.05, look=0.0)
  idle = iter((0.0, float(i)) for i in range(100))
  monkeypatch.setattr(common, "cpu_times", lambda: next(idle))
  assert machine.wait_until_quiet(0.0, 0.05, look=0.0)


def test_a_disturbed_round_is_made_again_and_then_marked(monkeypatch):
  arguments = compare.parse_arguments(["--rows", "sft", "--rounds", "1", "--repeats", "2",
                                       "--systems", "jaxrl", "--wait-quiet", "0"])
  shares = iter([0.5, 0.02, 0.4, 0.3, 0.2])

  def measure(*_):
    return {"steps_s": [1.0], "other_cpu": next(shares), "peak_rss_mb": 1.0}
  monkeypatch.setattr(compare, "measure", measure)
  session = compare.Session(arguments)
  assert session.rounds(arguments.rows[0])[1:] == (0.02, False)
  assert session.rounds(arguments.rows[0])[1:] == (0.2, True)


def test_an_invocation_leaves_rows_of_all_systems_behind(monkeypatch, tmp_path):
  calls = []

  def measure(system, python, work, cache):
    calls.append((system, work.section, bool(cache)))
    again = calls.count(calls[-1]) == 2  # reads programs from disk
    return {"steps_s": [1.0] * work.iters, "other_cpu": 0.0, "start_other_cpu": 0.0, "tokens": [8],
            "first_step_s": {"jaxrl": 6.0, "tunix": 9.0, "trl": 12.0}[system] / (1 + again),
            **({} if system == "trl" else {"compile_s": 2.0}), "peak_rss_mb": 500.0,
            "versions": {"jaxrl": "1", "google-tunix": "2", "trl": "3"}}
  monkeypatch.setattr(compare, "measure", measure)
  monkeypatch.setattr(compare.environments, "interpreter", lambda name, directory: name)
  monkeypatch.setattr(compare.Session, "limits", lambda session: {
      "gflops": {"numpy": 400.0}, "bandwidth_gb_s": {"2": 50.0, "512": 20.0}})
  assert compare.main(["--rows", "sft", "start", "--rounds", "1", "--wait-quiet", "0",
                       "--out", str(tmp_path / "out"), "--picture", str(tmp_path / "out.png")]) == 0
  rows = {row["row"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
  assert list(rows) == ["sft", "cold_start", "cold_compile", "second_start"]
  assert rows["cold_start"]["peers"] == {"tunix": 9.0, "trl": 12.0}
  assert rows["cold_compile"]["peers"] == {"tunix": 2.0}
  assert rows["second_start"]["jaxrl_s"] == 3.0 and rows["second_start"]["ratio"] == 1.5
  assert (tmp_path / "out.png").stat().st_size > 0
  # Whoever keeps programs from run to run finds none at first.
  assert calls[:3] == [("jaxrl", "sft", True), ("tunix", "sft", False), ("trl", "sft", False)]


def result(**changes):
  return {"row": "grpo", "shape": {}, "jaxrl_s": 0.5, "peers": {"tunix": 1.2, "trl": 1.0},
          "ratio": 2.0, "limit_s": 0.25, "times_limit": 2.0, "disturbed": False,
          "peak_rss_mb": {"jaxrl": 700.0, "tunix": 2000.0, "trl": 1300.0}, **changes}


def content(*rows):
  versions = {"jaxrl": {"jaxrl": "0.1"}, "tunix": {"google-tunix": "0.2"}, "trl": {"trl": "1"}}
  return {"machine": "a machine", "date": "2020-01-01", "limits": {"gflops": {"numpy": 490.0}},
          "versions": versions, "rows": list(rows)}


def test_table_and_json_hold_the_row(tmp_path):
  text = report.write(content(result()), tmp_path / "out")
  assert "| grpo | 0.500 | 1.200 | 1.000 | 2.00 | 0.250 | 2.0 | 700 | 2000 | 1300 |" in text
  assert (tmp_path / "out.md").read_text() == text
  assert json.loads((tmp_path / "out.json").read_text())["rows"] == [result()]


def test_figures_of_a_disturbed_row_are_withheld_unless_asked_for(tmp_path):
  rows = content(result(disturbed=True))
  assert "| grpo (disturbed) |  |  |  |  |" in report.write(rows, tmp_path / "out")
  assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["jaxrl_s"] is None
  assert "| grpo (disturbed) | 0.500 |" in report.write(rows, tmp_path / "out",
                                                        quote_disturbed=True)
  assert json.loads((tmp_path / "out.json").read_text())["quoted_disturbed"] is True


def test_ratio_is_the_faster_peer_over_jaxrl():
  row = compare.parse_arguments(["--rows", "sft"]).rows[0]
  kept = {name: [[{"steps_s": steps, "peak_rss_mb": 1.0, "tokens": [1]}]]
          for name, steps in (("jaxrl", [1.0, 2.0, 9.0]), ("tunix", [5.0]), ("trl", [3.0]))}
  limits = {"gflops": {"numpy": 1.0}, "bandwidth_gb_s": {"8": 1.0}}
  (found,) = compare.rows_of(row, kept, limits)
  assert found["jaxrl_s"] == 2.0 and found["ratio"] == 1.5


def test_rows_take_shapes_and_refuse_unknown_ones(capsys):
  (row,) = compare.parse_arguments(["--rows", "grpo:vocab=1024:samples=3", "--samples", "5"]).rows
  assert (row.work.vocab, row.work.samples, row.work.prompts) == (1024, 3, 16)
  with pytest.raises(SystemExit):
    compare.parse_arguments(["--rows", "grpo:vocabulary=3"])
  assert "'vocabulary' is none of" in capsys.readouterr().err


def test_countdown_embeddings_draw_lengths_from_the_distribution_and_then_count_down_to_eos():
  work = common.Work("sampling", vocab=70, d_model=64, new_tokens=60, median_len=8)
  inputs, outputs = common.countdown(work)
  states = inputs / np.sqrt((inputs ** 2).mean(axis=1, keepdims=True))  # RMSNorm of scale 1
  logits = states @ outputs.T
  chances = np.exp(logits[-1] - logits[-1].max())
  chances /= chances.sum()
  wanted = common.length_probabilities(work)
  np.testing.assert_allclose(chances[common.EOS], wanted[0], rtol=1e-3)
  np.testing.assert_allclose(chances[common.SPECIALS:common.SPECIALS + 59], wanted[1:], rtol=1e-3)
  token, steps = common.SPECIALS + 40, 0
  while token != common.EOS:
    assert np.sort(logits[token])[-1] - np.sort(logits[token])[-2] > 10
    token, steps = int(logits[token].argmax()), steps + 1
  assert steps == 41


@pytest.mark.parametrize("section, tokens", [("grpo", 80), ("sft", 40), ("dpo", 72), ("reward", 48)])
def test_jaxrl_side_does_the_work_it_is_asked_for(section, tokens):
  work = common.Work(section, **TOY)
  if section == "dpo":  # 8 sequences of 12 tokens in the mean
    work = dataclasses.replace(work, prompt_len=3, spread=2.0)
  found = toy_run(work)
  assert found["tokens"] == [tokens, tokens]
  assert len(found["steps_s"]) == 2 and found["first_step_s"] > max(found["steps_s"])
  assert found["peak_rss_mb"] > 50 and found["compile_s"] > 0


def test_ragged_pairs_have_as_many_tokens_as_equal_ones_and_the_spread_that_is_asked_for():
  for count, spread in ((64, 4.0), (7, 3.0), (32, 1.0)):
    work = common.Work("dpo", pairs=count, spread=spread)
    lengths = common.pair_lengths(work)
    assert lengths.shape == (count, 2) and lengths.sum() == 2 * count * work.pair_len
    assert lengths.max() / lengths.min() == pytest.approx(spread, rel=0.03)
    for (prompt, *answers), both in zip(common.pairs(work), lengths):
      assert [len(prompt) + len(answer) + 1 for answer in answers] == both.tolist()
  with pytest.raises(ValueError, match="makes sequences of 9 tokens"):
    common.pair_lengths(common.Work("dpo", pair_len=48, spread=10.0))


def test_least_work_of_pairs_is_a_sum_over_their_tokens():
  work = common.Work("dpo", pairs=3, prompt_len=5, pair_len=12, spread=2.0)
  answers = [n - 5 for n in common.pair_lengths(work).ravel()]
  pairs = 3 * sum(range(1, 6)) + sum(sum(range(6, 6 + n)) for n in answers)
  forward = costs.forward_flops(work, 15 + sum(answers), pairs, sum(answers))
  assert sum(phase.flops for phase in costs.phases(work)) == pytest.approx(4 * forward, rel=1e-9)
  scored = costs.forward_flops(work, 15 + sum(answers), pairs, 0)
  (update,) = costs.phases(dataclasses.replace(work, section="reward"))
  assert update.flops == pytest.approx(3 * scored, rel=1e-9)


def test_a_system_that_lacks_what_a_row_measures_is_left_out(monkeypatch):
  monkeypatch.setattr(compare.environments, "interpreter", lambda name, directory: name)
  arguments = compare.parse_arguments(["--rows", "dpo", "reward", "--rounds", "1", "--wait-quiet", "0"])
  monkeypatch.setattr(compare, "measure", lambda *_: {"steps_s": [1.0], "other_cpu": 0.0, "peak_rss_mb": 1.0})
  session = compare.Session(arguments)
  assert [list(session.rounds(row)[0]) for row in arguments.rows] == [
      ["jaxrl", "tunix", "trl"], ["jaxrl", "trl"]]


def test_raggedness_is_measured_against_as_many_tokens_of_equal_lengths(monkeypatch, tmp_path):
  def measure(system, python, work, cache):
    seconds = 1.2 if work.spread > 1 else 1.1 if work.row_length else 1.0 if work.overrides else 0.8
    return {"steps_s": [seconds], "other_cpu": 0.0,
            "tokens": [common.pair_tokens(work)]}
  monkeypatch.setattr(compare, "measure", measure)
  assert ragged.main(["--rounds", "2", "--wait-quiet", "0", "--out", str(tmp_path / "out")]) == 1
  found = json.loads((tmp_path / "out.json").read_text())
  assert found["ragged_over"] == {"equal lengths": 1.2, "equal lengths, long rows": 1.091,
                                  "equal lengths, prompts shared": 1.5, "ragged lengths": 1.0}
  assert len(set(found["loss_tokens"].values())) == 1


def test_jaxrl_side_samples_responses_of_different_lengths_where_asked():
  work = dataclasses.replace(common.Work("sampling", **TOY), median_len=3, samples=16)
  counts = toy_run(work)["tokens"]
  assert all(work.rows < count < work.rows * work.new_tokens for count in counts)


def toy_run(work):
  """What jaxrl's side of the comparison reports of a toy-sized run."""
  return compare.measure("jaxrl", sys.executable, work, "")
