"""Plans: what they say a run would need, against arithmetic and against what a run builds."""

import dataclasses
import math
import pathlib
import re

import jax
import pytest

from configs import base
from jaxrl import chips
from jaxrl import cli
from jaxrl import config as configs
from jaxrl import planning
from jaxrl.planning import flops
from jaxrl.planning import programs
from jaxrl.planning import target as targets
from jaxrl.training import builders

LAYERS, WIDTH, HEADS, KV_HEADS, D_FF, VOCAB = 2, 64, 8, 4, 128, 256
PROMPTS, SAMPLES, TOKENS, PROMPT = 4, 4, 24, 16
LAYER = WIDTH * WIDTH * (2 + 2 * KV_HEADS // HEADS) + 3 * WIDTH * D_FF  # parameters in matrix products
PARAMETERS = LAYERS * (LAYER + 2 * WIDTH) + WIDTH + VOCAB * WIDTH


def config_of(**changes):
  config = base.get_config()
  config.data.update(train="task:addition", validation="task:addition", max_prompt_tokens=PROMPT,
                     task=dict(digits=3))
  config.model.update(layers=LAYERS, d_model=WIDTH, heads=HEADS, kv_heads=KV_HEADS, d_ff=D_FF, vocab_size=VOCAB,
                      scan_layers=True, remat="full")
  config.mesh.update(data=2, fsdp=2, tensor=2)
  config.batch.update(row_length=64, examples=16, micro_batch_rows=4, vocabulary_chunk=64)
  config.rollout.update(prompts=PROMPTS, episode=dict(name="group", samples=SAMPLES), max_tokens=TOKENS,
                        updates=2)
  config.evaluate.update(problems=2, samples=0)
  config.objective = [dict(name="clipped_surrogate", low=0.2, high=0.2), dict(name="kl", beta=0.1)]
  config.phases = ("rl",)
  config.rl = dict(kind="rl", steps=3)
  for section, settings in changes.items():
    config[section].update(settings)
  return config


@pytest.fixture(scope="module")
def plan():
  return planning.plan(config_of(), planning.find(devices=8))


@pytest.fixture(scope="module")
def rl(plan):
  phase, = plan.phases
  return phase


def test_a_plan_has_the_batches_and_the_state_of_the_run(rl, tmp_path):
  parts = builders.build_parts(config_of(), tmp_path, lambda text: None)
  phase, = parts.phases
  assert rl.shape == parts.shapes["rl"]
  params = parts.initializing.first(builders.states.initial_parameters)(
      parts.decoder, jax.random.key_data(jax.random.key(0)), parts.mesh)
  state = builders.start_state(parts, phase, params, jax.random.key_data(jax.random.key(0)))

  def on_first(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
  assert rl.held["parameters"] == on_first(state.params)
  assert rl.held["optimiser"] == on_first(state.opt_state)
  assert rl.held["frozen models"] == on_first(state.frozen)


def test_parameters_are_divided_over_fsdp_and_tensor(plan, rl):
  assert plan.parameters == PARAMETERS
  norms = 4 * (2 * LAYERS + 1) * WIDTH  # which may be whole on every device
  share = 4 * PARAMETERS / 4
  assert share <= rl.held["parameters"] <= share + norms
  assert rl.held["optimiser"] == pytest.approx(2 * rl.held["parameters"], abs=64)
  assert rl.held["frozen models"] == rl.held["parameters"]
  assert rl.micro_batches > 1 and rl.gradients == 2 * rl.held["parameters"]  # the sum, and the next


def test_the_cache_is_that_of_all_samples_at_their_longest(rl):
  s = rl.sampling
  assert (s.what, s.rows, s.tokens) == ("rollouts", PROMPTS * SAMPLES, TOKENS)
  token = 2 * LAYERS * KV_HEADS * (WIDTH // HEADS) * 4  # keys and values, float32
  prefix, suffix = (1 << math.ceil(math.log2(n)) for n in (max(s.prompt, 16), TOKENS))
  assert s.cache == token * (PROMPTS * prefix + PROMPTS * SAMPLES * suffix) / 8  # by rows and heads


def test_flops_are_those_of_every_product_as_often_as_it_runs(rl):
  layout, s = rl.shape.layout, rl.sampling
  rows = rl.micro_batches * rl.shape.micro_batch_rows
  units = rows // layout.rows_per_trunk
  trunk = layout.trunk_length
  tokens = rows * layout.row_length + units * trunk
  # A trunk sees itself, and every row itself and its trunk.
  pairs = rows * layout.row_length * (trunk + layout.row_length) + units * trunk ** 2
  forward = 2 * LAYERS * LAYER * tokens + 4 * LAYERS * WIDTH * pairs
  logits = 2 * VOCAB * WIDTH * rows * layout.row_length  # of no prompt
  last = 2 * LAYERS * WIDTH * D_FF * tokens  # of a layer is not computed again
  assert rl.update.flops == pytest.approx(4 * forward - last + 4 * logits, rel=0.02)
  assert rl.signals.flops == pytest.approx(forward + logits, rel=0.02)  # the reference
  prompts = PROMPTS * max(16, s.prompt)
  steps = PROMPTS * SAMPLES * (TOKENS - 1)
  products = 2 * LAYERS * LAYER * (prompts + steps) + 2 * VOCAB * WIDTH * (PROMPTS + steps)
  seen = prompts * 16 + steps * (16 + 32)
  assert rl.rollout_flops == pytest.approx(products + 4 * LAYERS * WIDTH * seen, rel=0.05)
  assert rl.flops == rl.rollout_flops + rl.signals.flops + 2 * rl.update.flops


def test_peaks_add_up(rl):
  assert rl.update_peak == rl.kept + rl.update.added >= rl.kept + rl.gradients + rl.activations
  assert rl.activations > 0 and rl.peak == max(rl.update_peak, rl.sampling_peak)
  assert rl.sampling_peak > rl.held["parameters"] + rl.held["optimiser"] + rl.sampling.cache


def on(plan, limit):
  return dataclasses.replace(plan, target=dataclasses.replace(plan.target, memory_bytes=limit))


def test_a_plan_fits_or_says_what_to_change(plan):
  assert plan.fits is None and "--plan=NAME" in planning.text(plan)
  assert on(plan, 2 * plan.worst.peak).fits and "\nfits: " in planning.text(on(plan, 2 * plan.worst.peak))
  assert "tight" in planning.text(on(plan, plan.worst.peak * 1.01))
  small = on(plan, plan.worst.peak / 2)
  text = planning.text(small)
  assert small.fits is False and "does not fit: " in text
  flags = re.findall(r"--config\.([\w.]+)=(\w+)", text)
  assert "mesh.fsdp" in dict(flags)
  for flag in flags:  # what it says can be done, and changes something
    config = config_of()
    before = configs.to_dict(config)
    configs.override(config, dict([flag]))
    assert configs.to_dict(config) != before


def test_the_command_line_prints_a_plan_and_fails_if_it_does_not_fit(plan, monkeypatch, capsys, tmp_path):
  asked = []

  def planned(config, target, workdir):
    asked.append((config.seed, target.name, len(target.devices), workdir))
    return on(plan, (0.5 + config.seed) * plan.worst.peak)
  monkeypatch.setattr(planning, "plan", planned)
  monkeypatch.chdir(tmp_path)
  arguments = ["run", "--config=configs/quickstart.py", "--plan=h100-8"]
  cli.main([*arguments, "--config.seed=2"])
  assert "\nfits: " in capsys.readouterr().out
  with pytest.raises(SystemExit) as end:
    cli.main([*arguments, "--config.seed=0", "--workdir=out"])
  assert end.value.code == 1 and "does not fit" in capsys.readouterr().out
  assert asked == [(2, "h100-8", 8, None), (0, "h100-8", 8, pathlib.Path("out"))]
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--plan=h100"], "--plan='h100' is no machine: name one as v5e-8"),
    (["--plan=x9-8"], "no machine is called 'x9'"),
    (["--plan=v5p-3"], "v5p counts 2 cores for each chip"),
    (["--plan=h100-8", "--devices=4"], "--plan=h100-8 has 8 devices, but --devices=4"),
    (["--plan=h100-64"], "64 virtual devices are wanted and this process has 8"),
    (["--plan=h100-8", "--config.mesh.tensor=3"], "does not divide 8 devices"),
    (["--plan=h100-8", "--config.model.source=nobody/nothing"], "nobody/nothing")])
def test_what_cannot_be_planned_is_refused_with_its_remedy(arguments, message, capsys):
  with pytest.raises(SystemExit) as end:
    cli.main(["run", "--config=configs/quickstart.py", *arguments])
  assert end.value.code == 1 and message in capsys.readouterr().err


def test_names_of_machines_count_as_their_makers_do():
  counts = {name: (machine.name, count) for name in ("v5e-8", "v5p-64", "V6e-4", "h200-1", "a100-16")
            for machine, count in [targets.parse(name)]}
  assert counts == {"v5e-8": ("v5e", 8), "v5p-64": ("v5p", 32), "V6e-4": ("v6e", 4), "h200-1": ("H200", 1),
                    "a100-16": ("A100", 16)}
  assert [targets.sides_of(n, 2) for n in (1, 4, 8, 16, 32)] == [[1, 1], [2, 2], [2, 4], [4, 4], [4, 8]]
  assert [targets.sides_of(n, 3) for n in (4, 8, 16, 32, 64)] == [
      [2, 2, 1], [2, 2, 2], [2, 2, 4], [2, 4, 4], [4, 4, 4]]


def test_gpus_have_the_share_of_memory_that_jax_takes(monkeypatch):
  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
  assert chips.by_name("h100").usable_bytes == 60e9
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
  assert chips.by_name("h100").usable_bytes == 72e9
  assert chips.by_name("v5e").usable_bytes == 15.75 * 2 ** 30


def test_choices_of_an_assumed_machine_are_its_own():
  assert chips.platform() == "cpu"
  with chips.assume(chips.Target("a TPU", "tpu", tuple(jax.devices()[:2]), 5e9)):
    assert (chips.platform(), len(chips.devices()), chips.memory_bytes(jax.devices()[0])) == ("tpu", 2, 5e9)
  assert chips.platform() == "cpu" and len(chips.devices()) == 8


def test_what_a_compiler_refuses_is_part_of_the_plan(plan, monkeypatch):
  class Refused:  # as the TPU compiler says it

    def lower(self):
      return self

    def compile(self, compiler_options):
      raise jax.errors.JaxRuntimeError(self.message)
  program = Refused()
  monkeypatch.setattr(flops, "count", lambda *_, **__: 7.0)
  program.message = ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
                     "(20.50G) exceeds available HBM (15.75G).")
  with jax.set_mesh(jax.make_mesh((8,), ("data",))):
    found = programs.measure([program], trips=1)
    assert found == programs.Program(20.5 * 2 ** 30, 7.0, refused=True)
    program.message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
      programs.measure([program], trips=1)
  phase, = plan.phases
  refused = dataclasses.replace(plan, phases=[dataclasses.replace(phase, update=found)])
  assert on(refused, 1e12).fits is False and "more than there is" in planning.text(on(refused, 1e12))
