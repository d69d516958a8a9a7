"""The measurements of `accelerator.py` that run jaxrl."""

import argparse
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import chips
from jaxrl import sharding
from jaxrl.batch import Task, Trajectory
from jaxrl.sampling import Request, Sampler, SamplingParams
from jaxrl.training import builders
from jaxrl.training import learner as learners
from jaxrl.training import machine as this_machine
from jaxrl.training import state as states
from jaxrl.training.shapes import shape_of
import phases
import scaling_model as model

SEED = 0


def limits(args: argparse.Namespace, _: str) -> dict:
  """The device, what its data sheet says, and what it does."""
  devices = jax.devices()
  if len(devices) != 1:
    raise SystemExit(f"{len(devices)} devices are visible, but this measures one: set "
                     "CUDA_VISIBLE_DEVICES=0, or TPU_VISIBLE_CHIPS=0 with TPU_PROCESS_BOUNDS=1,1,1 "
                     "and TPU_CHIPS_PER_PROCESS_BOUNDS=1,1,1")
  sheet = chips.of_device(devices[0])
  measured = measure(args.matmul, args.copy_mb, args.repeats)
  return {"device": this_machine.devices(), "versions": this_machine.versions(),
          "limits": {**measured, "machine": sheet and sheet.name,
                     "sheet_flops": sheet and sheet.flops,
                     "sheet_bytes_per_s": sheet and sheet.hbm_rate}}


def decode(args: argparse.Namespace, name: str) -> dict:
  """Decoding speed at each number of rows."""
  shape = model.SHAPES[name]
  parts, _ = phases.build(shape, "sft", {"model": dict(
      dtype="bfloat16", param_dtype="bfloat16", scan_layers="decode" in args.scan.split(","))})
  params = states.initial_parameters(parts.decoder, _seed_data(), parts.mesh)
  found = {"parameters": _count(params), "rows": []}
  for rows in map(int, args.rows.split(",")):
    found["rows"].append(_decode_rows(args, shape, parts, params["params"], rows))
  return found | _memory()


def _decode_rows(args, shape, parts, params, rows):
  samples = min(args.samples, rows)
  sampler = Sampler(parts.decoder, mesh=parts.mesh, max_rows=rows)

  def call(tokens):
    sampler.sample(params, _requests(shape, rows // samples, samples, args.prompt, tokens),
                   jax.random.key(SEED))

  first, _ = timed(lambda: call(1), args)
  whole, compilations = timed(lambda: call(args.response), args)
  steps = args.response - 1
  prompts = rows // samples
  # Each step reads all weights, every prompt's cache and what each sample has written so far.
  step_bytes = 2 * shape.products + shape.cache_bytes * (
      prompts * args.prompt + prompts * samples * args.response / 2)
  seconds = max(whole - first, whole * 1e-3)  # noise, where decoding is nothing beside prefill
  return {"rows": prompts * samples, "prompts": prompts, "tokens": sampler.statistics.tokens,
          "slots": sampler.statistics.slots, "call_s": whole, "prefill_s": first,
          "decode_s": seconds, "decode_steps": steps,
          "tokens_per_s": sampler.statistics.tokens / whole,
          "decode_tokens_per_s": prompts * samples * steps / seconds,
          "bytes_per_step": step_bytes, "bytes_per_s": step_bytes * steps / seconds,
          "compilations": compilations}


def train(args: argparse.Namespace, name: str) -> dict:
  """Speed of a supervised update on full rows."""
  shape = model.SHAPES[name]
  count = args.train_rows * (args.row_length // args.sequence)
  run = Run(args, shape, "sft", "train", prompt=1, examples=count)
  rng = np.random.default_rng(SEED)
  batch = run.put([Trajectory(tokens=rng.integers(0, shape.vocab_size, args.sequence),
                              loss_mask=np.arange(args.sequence) > 0) for _ in range(count)])
  rows = int(np.any(np.asarray(batch.segment_ids) != 0, axis=1).sum())
  tokens = int((np.asarray(batch.segment_ids) != 0).sum())
  losses = []

  def step():
    losses.append(float(run.update(run.prepare(batch))["loss"]))

  seconds, compilations = timed(step, args)
  useful = model.useful_flops(shape, args.sequence, tokens)
  return {"parameters": _count(run.state.params), "rows": rows, "tokens": tokens,
          "micro_batch_rows": run.shape.micro_batch_rows, "step_s": seconds,
          "tokens_per_s": tokens / seconds, "useful_flops": useful,
          "flops_per_s": useful / seconds, "loss": losses[-1],
          "compilations": compilations} | _memory()


def grpo(args: argparse.Namespace, name: str) -> dict:
  """Where a GRPO step spends its time."""
  shape = model.SHAPES[name]
  run = Run(args, shape, "grpo", "grpo", prompt=args.prompt, examples=1)
  requests = _requests(shape, args.grpo_prompts, args.samples, args.prompt, args.response)
  sampler = Sampler(run.parts.decoder, mesh=run.parts.mesh,
                    max_rows=args.grpo_prompts * args.samples)
  split, gaps, sampled = [], [], []

  def step():
    marks = [time.perf_counter()]
    groups = sampler.sample(run.state.params["params"], requests, jax.random.key(len(split)))
    marks.append(time.perf_counter())
    batch = jax.block_until_ready(run.put(_scored(requests, groups)))
    marks.append(time.perf_counter())
    prepared = jax.block_until_ready(run.prepare(batch))
    marks.append(time.perf_counter())
    gaps.append(float(run.update(prepared)["logprob_gap"]))
    marks.append(time.perf_counter())
    sampled.append(sampler.statistics.tokens)
    split.append(np.diff(marks))

  seconds, compilations = timed(step, args)
  parts_s = np.median(split[-args.repeats:], axis=0)
  names = ("sampling_s", "rest_s", "reference_s", "update_s")
  return {"sequences": args.grpo_prompts * args.samples, "tokens": sampled[-1],
          "step_s": seconds, **dict(zip(names, parts_s.tolist())),
          "tokens_per_s": sampled[-1] / seconds, "logprob_gap": gaps[0],
          "compilations": compilations} | _memory()


MEASURE = {"limits": limits, "decode": decode, "train": train, "grpo": grpo}


def timed(step, args: argparse.Namespace) -> tuple[float, int]:
  """Median seconds of a call after some to warm up, and programs compiled while timing."""
  for _ in range(args.warmup):
    step()
  counter = this_machine.CompileCounter()
  seconds = []
  for _ in range(args.repeats):
    began = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - began)
  counter.close()
  return statistics.median(seconds), counter.count


class Run:
  """A learner with its state, and batches of the shape that `jaxrl run` would give them.

  Attributes:
    parts, shape: of the phase.
    state: trained by `update`.
  """

  def __init__(self, args, shape, kind, section, *, prompt, examples):
    batch = dict(row_length=args.row_length, micro_batch_rows=args.micro_batch_rows,
                 vocabulary_chunk=args.chunk, examples=examples)
    rollout = dict(prompts=args.grpo_prompts, max_tokens=args.response,
                   episode=dict(name="group", samples=args.samples))
    decoder = dict(dtype="bfloat16", remat=args.remat, scan_layers=section in args.scan.split(","))
    self.parts, phase = phases.build(
        shape, kind, {"batch": batch, "rollout": rollout, "model": decoder})
    abstract = builders.abstract_state(self.parts, phase)
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    tasks = [Task(id=str(i), prompt=[0] * prompt) for i in range(args.grpo_prompts)]
    self.shape = shape_of(phase.settings, self.parts.decoder, self.parts.mesh,
                          [len(task.prompt) for task in tasks],
                          kept_bytes=kept)
    self._functions = learners.make_learner(
        phase.learning, jax.tree.map(lambda x: x.sharding, abstract))
    params = states.initial_parameters(self.parts.decoder, _seed_data(), self.parts.mesh)
    self.state = builders.start_state(self.parts, phase, params, _seed_data())

  def put(self, trajectories):
    """A batch on the device."""
    host = learners.to_micro_batches(self.shape.pack(trajectories), self.shape.micro_batch_rows)
    return sharding.put_batch(host, self.parts.mesh)

  def prepare(self, batch):
    """The batch with what the update reads."""
    with jax.set_mesh(self.parts.mesh):
      self.state, prepared, _ = self._functions.prepare(self.state, batch)
      return prepared

  def update(self, batch):
    """Metrics of an update on a prepared batch."""
    with jax.set_mesh(self.parts.mesh):
      self.state, metrics = self._functions.update(self.state, batch)
    return metrics


def _requests(shape, prompts, samples, length, tokens):
  rng = np.random.default_rng(SEED)
  how = SamplingParams(max_tokens=tokens)  # nothing stops a sample earlier
  return [Request(prompt=rng.integers(0, shape.vocab_size, length).tolist(), n=samples, key=(i,),
                  params=how) for i in range(prompts)]


def _scored(requests, groups):
  """Trajectories whose reward is the share of even tokens."""
  found = []
  for index, (request, group) in enumerate(zip(requests, groups)):
    prompt = len(request.prompt)
    for sample in group:
      found.append(Trajectory(
          tokens=[*request.prompt, *sample.tokens], group=index,
          loss_mask=np.arange(prompt + len(sample.tokens)) >= prompt,
          behaviour_logprobs=np.concatenate([np.zeros(prompt), sample.logprobs]),
          reward=float(np.mean(np.asarray(sample.tokens) % 2 == 0)), prompt_length=prompt))
  return found


def _seed_data():
  return jax.random.key_data(jax.random.key(SEED))


def _count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def _memory():
  return {"peak_device_mb": this_machine.peak_memory()["device_mb"]}


def measure(size: int, megabytes: int, repeats: int = 5) -> dict[str, float]:
  """What the default device does now: products of square bfloat16 matrices, and copies.

  Args:
    size: of the matrices.
    megabytes: of the array that is read and written.
    repeats: the fastest counts.

  Returns:
    `matmul_flops` and `copy_bytes_per_s` (read and written bytes both counted).
  """
  chain = 8
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16) / math.sqrt(size)

  @jax.jit
  def products(a):
    return jax.lax.fori_loop(0, chain, lambda _, x: x @ a, a)

  x = jnp.zeros((megabytes * 10 ** 6 // 4,), jnp.float32)

  @jax.jit
  def copies(x):
    # One more in every pass, so that no pass can be left out.
    return jax.lax.fori_loop(0, chain, lambda i, y: y + i.astype(jnp.float32), x)

  return {"matmul_flops": chain * 2 * size ** 3 / fastest(lambda: products(a), repeats),
          "copy_bytes_per_s": chain * 2 * x.nbytes / fastest(lambda: copies(x), repeats)}


def fastest(call, repeats: int) -> float:
  """Seconds of the fastest of some calls, after one that compiles."""
  jax.block_until_ready(call())
  seconds = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - began)
  return min(seconds)
