"""jaxrl's own side of the comparison: the parts, the loop and the reports of a real run.

Called as `common.py` says. What a user's run would do is done: rows are read from a JSONL file and
tokenised, prompts sampled, responses decoded and rewarded, batches packed, updates made, metrics
brought to the host and written. Nothing is evaluated or saved on the way, as nowhere here.
"""

import copy
import dataclasses
import importlib
import json
import os
import pathlib
import tempfile

import common

FIRST_CHARACTER = 0x20000  # from here on, a million code points are neither spaces nor surrogates
ROWS = 512  # of data, but for pairs: these are all in every update
UPDATES = 1000  # of reinforcement learning, as in a real run; it ends when enough were measured
SETTLED = 10  # steps that sample and are not measured: until then there are lengths that nothing was compiled for,
# and another layout may be after 1, 2, 4 or 8 updates (and after 16)
SFT_PROMPT = 2  # tokens: a BOS and one more; all others carry loss, EOS among them
PAIRED = {"dpo": "dpo", "reward": "reward_model"}  # sections whose examples are pairs, and their phases


def even_tokens(task, completion):
  """The comparison's reward, as a criterion of jaxrl."""
  del task
  return common.share_of_even(completion.tokens[completion.prompt_length:].tolist())


def text(ids) -> str:
  """Token ids as the character tokenizer of `make_config` writes them, specials left out."""
  return "".join(chr(FIRST_CHARACTER + i - common.SPECIALS) for i in ids if i >= common.SPECIALS)


def write_data(work: common.Work, path: pathlib.Path) -> None:
  """Rows with a question, in supervised tuning a solution that makes up the whole length, or pairs."""
  if work.section in PAIRED:
    rows = [dict(question=text(prompt), answer="-", chosen=text(chosen), rejected=text(rejected))
            for prompt, chosen, rejected in common.pairs(work)]
  elif work.section != "sft":
    rows = [dict(question=text(ids), answer="-") for ids in common.prompts(work, ROWS)]
  else:
    whole = dataclasses.replace(work, prompt_len=work.sft_len - 1)
    rows = [dict(question=text(ids[:SFT_PROMPT]), answer=text(ids[SFT_PROMPT:]))
            for ids in common.prompts(whole, ROWS)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_config(work: common.Work, data: pathlib.Path):
  """The config of a run of one phase."""
  from configs import base
  from jaxrl import config as configs
  config = base.get_config()
  config.seed = work.seed
  lengths, row, examples = (work.prompt_len, work.new_tokens), 0, work.sft_batch
  if work.section == "sft":
    lengths = SFT_PROMPT, work.sft_len - SFT_PROMPT
  elif work.section in PAIRED:
    lengths = work.prompt_len, int(common.pair_lengths(work).max()) - work.prompt_len
    # Two sequences of a pair in a row; ragged ones pack better in twice that.
    row, examples = (2 if work.spread == 1 else 4) * work.pair_len, work.pairs
  config.data.update(train=str(data), solution="answer", max_prompt_tokens=lengths[0],
                     max_completion_tokens=lengths[1])
  config.tokenizer.alphabet = text(range(common.SPECIALS, work.vocab))
  config.model.update(layers=work.layers, d_model=work.d_model, heads=work.heads,
                      kv_heads=work.kv_heads, d_ff=work.d_ff, tie_embeddings=work.tied)
  config.optimizer.update(learning_rate=work.learning_rate)
  config.batch.update(examples=examples, row_length=work.row_length or row or sum(lengths))
  if work.micro_batch_rows:
    config.batch.micro_batch_rows = work.micro_batch_rows
  config.rollout.update(prompts=work.prompts, max_tokens=work.new_tokens,
                        episode=dict(name="group", samples=work.samples),
                        max_rows=max(1024, work.rows))
  config.reward.criteria = [dict(name="on_jaxrl:even_tokens")]
  config.evaluate.problems = 0
  config.checkpoint.every = config.log.samples_every = config.log.curves_every = 0
  config.phases = (PAIRED.get(work.section, "sft" if work.section == "sft" else "rl"),)
  config.model.heads_on_top = (("score", 1),) if work.section == "reward" else ()
  steps = work.warmup + work.iters
  config.sft = dict(kind="sft", steps=steps, objective=[dict(name="cross_entropy")])
  of_pairs = dict(steps=steps, aggregation=dict(kind="sequence_mean"))
  config.dpo = dict(of_pairs, kind="preference", objective=[dict(name="dpo", beta=0.1)])
  config.reward_model = dict(of_pairs, kind="reward", objective=[dict(name="bradley_terry")])
  surrogate = [dict(name="clipped_surrogate", low=0.2, high=0.2)]
  penalty = [dict(name="kl", beta=work.beta)] if work.beta else []
  config.rl = dict(kind="rl", steps=max(steps, UPDATES), objective=surrogate + penalty)
  configs.override(config, dict(work.overrides))
  return config


def sampler(work, config, clock, workdir):
  """Times prompts as text -> responses as text; returns the tokens of each call, and parameters."""
  import jax
  from jaxrl import sharding
  from jaxrl.sampling import Request
  from jaxrl.sampling import SamplingParams
  from jaxrl.training import builders
  from jaxrl.training import compilation
  from jaxrl.training import state as states
  sharding.start_distributed()
  compilation.use_cache(config.compilation_cache, print)
  parts = builders.build_parts(config, workdir, print)
  parts = never_ending(parts) if full_length(work) else parts
  params = states.initial_parameters(parts.decoder, jax.random.key_data(parts.base_key), parts.mesh)
  params = set_countdown(params, work) if work.median_len else params
  how = SamplingParams(max_tokens=work.new_tokens, stop_ids=(parts.tokenizer.eos_id,))
  questions = [text(ids) for ids in common.prompts(work, work.prompts)]
  counts, enough = [], False
  while not enough:
    prompts = [[common.BOS, *parts.tokenizer.encode(question)] for question in questions]
    found = parts.sampler.sample(
        params["params"], [Request(prompt, work.samples, (len(counts), i), how)
                           for i, prompt in enumerate(prompts)], parts.base_key)
    for sample in (s for samples in found for s in samples):
      parts.tokenizer.decode(sample.tokens.tolist())
    counts.append(sum(len(s.tokens) for samples in found for s in samples))
    enough = clock.tick()
  parts.scorer.close()
  if full_length(work) and set(counts) != {work.rows * work.new_tokens}:
    raise RuntimeError(f"calls gave {sorted(set(counts))} tokens, not "
                       f"{work.rows * work.new_tokens}")
  return counts, sum(x.size for x in jax.tree.leaves(params))


class Enough(Exception):
  """Enough steps were measured."""


def trainer(work, config, clock, workdir):
  """Times steps of a whole run; returns the tokens of each that carry loss, and parameters."""
  import jax
  from jaxrl.training import run
  build_parts, start_state = run.builders.build_parts, run.builders.start_state
  counts, sizes = [], []

  class Ticking(run.Reporter):
    """Ends the run once enough was measured, before it evaluates and saves."""

    def step(self, step, phase, metrics):
      super().step(step, phase, metrics)
      check_size(work, metrics)
      counts.append(int(metrics["loss_tokens"]))
      if clock.tick():
        raise Enough

  def build(*args, **kwargs):
    parts = build_parts(*args, **kwargs)
    return never_ending(parts) if full_length(work) else parts

  def start(parts, phase, params, rng):
    sizes.append(sum(x.size for x in jax.tree.leaves(params)))
    return start_state(parts, phase, set_countdown(params, work) if work.median_len else params,
                       rng)

  run.Reporter, run.builders.build_parts, run.builders.start_state = Ticking, build, start
  try:
    run.run(config, workdir, quiet=True, keep_traced=True)  # as the command line does
  except Enough:
    return counts, sizes[0]
  raise RuntimeError(f"the run ended after {len(counts)} steps")


def full_length(work) -> bool:
  """Whether every response shall have its full length."""
  return not work.median_len and work.section in ("sampling", "grpo")


def never_ending(parts):
  """The same parts with an EOS that no sampler draws."""
  tokenizer = copy.copy(parts.tokenizer)
  tokenizer.eos_id = common.NEVER
  builder = dataclasses.replace(parts.builder, tokenizer=tokenizer)  # says where samples end
  return dataclasses.replace(parts, tokenizer=tokenizer, builder=builder)


def check_size(work, metrics):
  """The comparison is one of equal work: refuses a step of another size than was asked for."""
  found = int(metrics["sequences"]), int(metrics["loss_tokens"])
  expected = work.rows, work.rows * work.new_tokens
  if work.section == "sft":
    expected = work.sft_batch, work.sft_batch * (work.sft_len - SFT_PROMPT)
  elif work.section in PAIRED:
    expected = 2 * work.pairs, common.pair_tokens(work)
  if work.median_len:  # lengths are drawn
    expected = work.rows, found[1]
  if found != expected:
    raise RuntimeError(f"a step had {found} sequences and tokens, not {expected}")


def set_countdown(params, work):
  """Parameters whose responses have log-normal lengths, see `common.countdown`."""
  import jax
  import jax.numpy as jnp
  inputs, outputs = common.countdown(work)

  def change(path, x):
    names = [str(getattr(key, "key", key)) for key in path]
    if names[-1] in ("embedding", "unembedding"):
      return jax.device_put(inputs if names[-1] == "embedding" else outputs, x.sharding)
    return jnp.zeros_like(x) if names[-2] in ("output", "down") else x
  return jax.tree_util.tree_map_with_path(change, params)


def main():
  work = common.from_command_line()
  if work.devices > 1:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={work.devices}"
  from jaxrl import cli
  with cli.loading():  # as `jaxrl run` does
    meter = common.CompileMeter()
    importlib.import_module("jaxrl.training.run")
  if work.section in ("sampling", "grpo") and work.iters:
    work = dataclasses.replace(work, warmup=max(work.warmup, SETTLED))
  clock = common.Clock(work, meter.read)
  with tempfile.TemporaryDirectory(prefix="jaxrl_bench_") as directory:
    workdir = pathlib.Path(directory)
    write_data(work, workdir / "data.jsonl")
    config = make_config(work, workdir / "data.jsonl")
    section = sampler if work.section == "sampling" else trainer
    counts, size = section(work, config, clock, workdir / "run")
  clock.result(["jaxrl", "jax", "jaxlib", "flax", "optax"], tokens=counts[work.warmup:],
               parameters=size)


if __name__ == "__main__":
  main()
