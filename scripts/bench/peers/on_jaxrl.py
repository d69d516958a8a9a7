"""jaxrl's own side of the comparison: the parts, the loop and the reports of a real run.

Called as `common.py` says. What a user's run would do is done: rows are read from a JSONL file and
tokenised, prompts sampled, responses decoded and rewarded, batches packed, updates made, metrics
brought to the host and written. Nothing is evaluated or saved on the way, as nowhere here.
"""

import copy
import dataclasses
import json
import os
import pathlib
import tempfile

import common

FIRST_CHARACTER = 0x20000  # from here on, a million code points are neither spaces nor surrogates
ROWS = 512  # of data


def even_tokens(task, completion):
  """The comparison's reward, as a criterion of jaxrl."""
  del task
  return common.share_of_even(completion.tokens[completion.prompt_length:].tolist())


def text(ids) -> str:
  """Token ids as the character tokenizer of `make_config` writes them, specials left out."""
  return "".join(chr(FIRST_CHARACTER + i - common.SPECIALS) for i in ids if i >= common.SPECIALS)


def write_data(work: common.Work, path: pathlib.Path) -> None:
  """Rows with a question, and in supervised tuning a solution that makes up the whole length."""
  if work.section != "sft":
    rows = [dict(question=text(ids), answer="-") for ids in common.prompts(work, ROWS)]
  else:  # BOS, one character of prompt, a solution and EOS: nearly all tokens carry loss
    whole = dataclasses.replace(work, prompt_len=work.sft_len - 1)
    rows = [dict(question=text(ids[:2]), answer=text(ids[2:]))
            for ids in common.prompts(whole, ROWS)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_config(work: common.Work, data: pathlib.Path):
  """The config of a run of one phase."""
  from configs import base
  config = base.get_config()
  config.seed = work.seed
  config.data.update(train=str(data), solution="answer", max_prompt_tokens=0,
                     max_completion_tokens=0)
  config.tokenizer.alphabet = text(range(common.SPECIALS, work.vocab))
  config.model.update(layers=work.layers, d_model=work.d_model, heads=work.heads,
                      kv_heads=work.kv_heads, d_ff=work.d_ff, tie_embeddings=work.tied)
  config.optimizer.update(learning_rate=1e-5)
  longest = work.sft_len if work.section == "sft" else work.prompt_len + work.new_tokens
  config.batch.update(examples=work.sft_batch, row_length=work.row_length or longest,
                      micro_batch_rows=work.micro_batch_rows)
  config.rollout.update(prompts=work.prompts, max_tokens=work.new_tokens,
                        episode=dict(name="group", samples=work.samples),
                        max_rows=max(1024, work.rows))
  config.reward.criteria = [dict(name="on_jaxrl:even_tokens")]
  config.evaluate.problems = 0
  config.checkpoint.every = config.log.samples_every = config.log.curves_every = 0
  config.phases = ("sft",) if work.section == "sft" else ("rl",)
  steps = work.warmup + work.iters
  config.sft = dict(kind="sft", steps=steps, objective=[dict(name="cross_entropy")])
  surrogate = [dict(name="clipped_surrogate", low=0.2, high=0.2)]
  penalty = [dict(name="kl", beta=work.beta)] if work.beta else []
  config.rl = dict(kind="rl", steps=steps, objective=surrogate + penalty)
  return config


def sampler(work, parts, params, clock):
  """Times prompts as text -> responses as text; returns the tokens of each call."""
  from jaxrl.sampling import Request
  from jaxrl.sampling import SamplingParams
  how = SamplingParams(max_tokens=work.new_tokens, stop_ids=(parts.tokenizer.eos_id,))
  questions = [text(ids) for ids in common.prompts(work, work.prompts)]
  counts, enough = [], False
  while not enough:
    prompts = [[common.BOS, *parts.tokenizer.encode(question)] for question in questions]
    found = parts.sampler.sample(
        params["params"], [Request(prompt, work.samples, (len(counts), i), how)
                           for i, prompt in enumerate(prompts)], parts.base_key)
    texts = [parts.tokenizer.decode(s.tokens.tolist()) for samples in found for s in samples]
    assert len(texts) == work.rows
    counts.append(sum(len(s.tokens) for samples in found for s in samples))
    enough = clock.tick()
  return counts


def trainer(work, parts, params, clock, workdir):
  """Times steps of the training loop; returns the tokens of each that carry loss."""
  import jax
  from jaxrl.training import builders
  from jaxrl.training import loop
  from jaxrl.training.checkpoints import Checkpoints
  from jaxrl.training.reporting import Reporter
  progress, counts, shapes = loop.Progress(), [], []

  class Ticking(Reporter):
    """Ends the phase once enough was measured."""

    def step(self, step, phase, metrics):
      super().step(step, phase, metrics)
      counts.append(int(metrics["loss_tokens"]))
      shapes.append((int(metrics["sequences"]), int(metrics["tokens"])))
      progress.ended = clock.tick() or progress.ended

  phase = parts.phases[0]
  run = builders.phase_run(parts, phase)
  state = builders.start_state(parts, phase, params, jax.random.key_data(parts.base_key))
  checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
  with open(os.devnull, "w") as nowhere, Ticking(workdir, quiet=True, stream=nowhere) as reporter:
    reporter.start_phase(phase.name, phase.kind, phase.steps)
    loop.train(run, state, progress, None, reporter=reporter, checkpoints=checkpoints)
  checkpoints.close()
  check_shapes(work, shapes)
  return counts


def check_shapes(work, shapes):
  """The comparison is one of equal work: refuses steps of other sizes than were asked for."""
  if work.section == "sft":
    expected = work.sft_batch, work.sft_batch * work.sft_len
  else:
    expected = work.rows, work.rows * (work.prompt_len + work.new_tokens)
  if work.median_len:  # lengths are drawn
    shapes, expected = [(sequences, None) for sequences, _ in shapes], (expected[0], None)
  assert all(shape == expected for shape in shapes), (shapes, expected)


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
  import jax
  from jaxrl import sharding
  from jaxrl.training import builders
  from jaxrl.training import state as states
  sharding.start_distributed()
  meter = common.CompileMeter()
  with tempfile.TemporaryDirectory(prefix="jaxrl_bench_") as directory:
    workdir = pathlib.Path(directory)
    write_data(work, workdir / "data.jsonl")
    parts = builders.build_parts(make_config(work, workdir / "data.jsonl"), workdir, print)
    if not work.median_len and work.section != "sft":
      tokenizer = copy.copy(parts.tokenizer)
      tokenizer.eos_id = common.NEVER
      parts = dataclasses.replace(parts, tokenizer=tokenizer)
    params = states.initial_parameters(parts.decoder, jax.random.key_data(parts.base_key),
                                       parts.mesh)
    if work.median_len:
      params = set_countdown(params, work)
    clock = common.Clock(work, meter.read)
    if work.section == "sampling":
      counts = sampler(work, parts, params, clock)
    else:
      counts = trainer(work, parts, params, clock, workdir)
    parts.scorer.close()
  clock.result(["jaxrl", "jax", "jaxlib", "flax", "optax"], tokens=counts[work.warmup:],
               parameters=sum(x.size for x in jax.tree.leaves(params)))


if __name__ == "__main__":
  main()
