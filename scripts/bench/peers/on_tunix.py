"""google-tunix's side of the comparison: its own model, sampler and trainers, used as users would.

Called as `common.py` says, in an environment of its own. Model, prompts, reward and number of
tokens are those of the other systems; every response has its full length, the KV cache exactly the
size needed. Tunix begins with MLP kernels of zero, so these are filled. `micro_prompts=4` is
what was fastest for it, and smallest, at the default shapes.
"""

import common

NO_EVALUATION = 10 ** 9
UNENDING = 10 ** 6


class Tokenizer:
  """'12 7 9' <-> [12, 7, 9]: the five methods that Tunix asks for."""

  def encode(self, text, **_):
    return [int(t) for t in text.split()]

  def decode(self, ids, **_):
    return " ".join(map(str, ids))

  def bos_id(self):
    return 0  # none is put in front: prompts bring their own

  def eos_id(self):
    return common.EOS

  def pad_id(self):
    return common.PAD


def build_model(work):
  """A Qwen2 decoder with random parameters, in float32. Returns the model and their number."""
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from tunix.models.qwen2 import model as qwen2
  model = qwen2.Qwen2(qwen2.ModelConfig(
      num_layers=work.layers, vocab_size=work.vocab, embed_dim=work.d_model, hidden_dim=work.d_ff,
      num_heads=work.heads, head_dim=work.d_model // work.heads, num_kv_heads=work.kv_heads,
      rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=work.tied), rngs=nnx.Rngs(work.seed))
  flat = nnx.state(model, nnx.Param).flat_state()
  key = jax.random.key(work.seed)
  inputs, outputs = common.countdown(work) if work.median_len else (None, None)
  changed = []
  for i, (path, parameter) in enumerate(flat):
    x, name = parameter.get_value(), ".".join(map(str, path))
    if x.ndim >= 2:
      x = 0.02 * jax.random.normal(jax.random.fold_in(key, i), x.shape, jnp.float32)
    if work.median_len and name.endswith("input_embedding"):
      x = jnp.asarray(inputs)
    elif work.median_len and "lm_head" in name:
      x = jnp.asarray(outputs.T)
    elif work.median_len and ("o_proj" in name or "down_proj" in name):
      x = jnp.zeros_like(x)
    changed.append((path, parameter.replace(x.astype(jnp.float32))))
  nnx.update(model, nnx.State.from_flat_path(dict(changed)))
  return model, sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def prompt_texts(work):
  """Prompts as texts of the toy tokenizer."""
  return [" ".join(map(str, ids)) for ids in common.prompts(work, work.prompts)]


def sampling(work, clock):
  from tunix.generate import sampler as sampler_lib
  model, size = build_model(work)
  cache = sampler_lib.CacheConfig(
      cache_size=work.prompt_len + work.new_tokens, num_layers=work.layers,
      num_kv_heads=work.kv_heads, head_dim=work.d_model // work.heads)
  sampler = sampler_lib.Sampler(model, Tokenizer(), cache)
  texts = [text for text in prompt_texts(work) for _ in range(work.samples)]
  counts, enough = [], False
  while not enough:
    found = sampler(texts, max_generation_steps=work.new_tokens, max_prompt_length=work.prompt_len,
                    temperature=1.0, top_p=1.0, seed=len(counts), eos_tokens=[work.eos])
    counts.append(sum(map(len, found.tokens)))
    enough = clock.tick()
  return counts, size


def grpo(work, clock):
  import jax
  import numpy as np
  import optax
  from flax import nnx
  from tunix.rl import rl_cluster
  from tunix.rl.grpo import grpo_learner
  from tunix.rl.rollout import base_rollout
  actor, size = build_model(work)
  reference = build_model(work)[0] if work.beta else None
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
  micro = work.micro_prompts
  training = rl_cluster.RLTrainingConfig(
      actor_optimizer=optax.adamw(work.learning_rate), eval_every_n_steps=NO_EVALUATION, max_steps=UNENDING,
      mini_batch_size=work.prompts if micro else None, train_micro_batch_size=micro or None,
      rollout_micro_batch_size=work.prompts if micro else None,
      compute_logps_micro_batch_size=work.prompts if micro else None, pbar_description=None)
  rollout = base_rollout.RolloutConfig(
      max_tokens_to_generate=work.new_tokens, max_prompt_length=work.prompt_len,
      kv_cache_size=work.prompt_len + work.new_tokens, temperature=1.0, top_p=1.0,
      eos_tokens=[work.eos], seed=work.seed)
  roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
  cluster = rl_cluster.RLCluster(
      actor=actor, reference=reference, tokenizer=Tokenizer(),
      cluster_config=rl_cluster.ClusterConfig(
          role_to_mesh={role: mesh for role in roles}, rollout_engine="vanilla",
          offload_to_cpu=False, training_config=training, rollout_config=rollout))
  counts = [0]

  def reward(prompts, completions, **_):
    del prompts
    ids = [[int(t) for t in completion.split()] for completion in completions]
    counts[-1] += sum(map(len, ids))
    return [common.share_of_even(i) for i in ids]

  learner = grpo_learner.GRPOLearner(
      rl_cluster=cluster, reward_fns=reward, algo_config=grpo_learner.GRPOConfig(
          num_generations=work.samples, num_iterations=1, beta=work.beta, epsilon=0.2))

  def batches():
    texts = prompt_texts(work)
    yield {"prompts": np.array(texts)}
    # To be asked for the next prompts is the end of a step, but for what the device still computes.
    jax.block_until_ready(jax.tree.leaves(nnx.state(cluster.actor_trainer.model)))
    while not clock.tick():
      counts.append(0)
      yield {"prompts": np.array(texts)}

  learner.train(batches())
  return counts, size


def sft(work, clock):
  import numpy as np
  import optax
  from tunix.sft import peft_trainer
  from tunix.sft import utils
  model, size = build_model(work)
  trainer = peft_trainer.PeftTrainer(
      model=model, optimizer=optax.adamw(work.learning_rate), training_config=peft_trainer.TrainingConfig(
          eval_every_n_steps=NO_EVALUATION, max_steps=None))

  def model_input(batch):
    mask = batch.input_tokens != common.PAD
    return {"input_tokens": batch.input_tokens, "input_mask": batch.input_mask,
            "positions": utils.build_positions_from_mask(mask),
            "attention_mask": utils.make_causal_attn_mask(mask)}

  rng, counts = np.random.default_rng(work.seed), []

  def batches():
    shape = work.sft_batch, work.sft_len
    while not counts or not clock.tick():
      counts.append(work.sft_batch * work.sft_len)
      tokens = rng.integers(common.SPECIALS, work.vocab, shape).astype(np.int32)
      yield peft_trainer.TrainingInput(input_tokens=tokens,
                                       input_mask=np.ones(shape, np.int32))

  trainer.with_gen_model_input_fn(model_input).train(batches())
  return counts, size


def dpo(work, clock):
  import numpy as np
  import optax
  from tunix.sft.dpo import dpo_trainer
  model, size = build_model(work)
  trainer = dpo_trainer.DPOTrainer(
      model=model, ref_model=build_model(work)[0], optimizer=optax.adamw(work.learning_rate),
      training_config=dpo_trainer.DPOTrainingConfig(
          eval_every_n_steps=NO_EVALUATION, max_steps=None, beta=0.1))
  longest = int(common.pair_lengths(work).max()) - work.prompt_len

  def padded(answers):
    ids = np.full((work.pairs, longest), common.PAD, np.int32)
    for row, answer in zip(ids, answers):
      row[:len(answer) + 1] = [*answer, common.EOS]
    return ids, (ids != common.PAD).astype(np.int32)
  counts = []

  def batches():
    while not counts or not clock.tick():
      prompts, *answers = zip(*common.pairs(work))
      (chosen, chosen_mask), (rejected, rejected_mask) = map(padded, answers)
      counts.append(int(chosen_mask.sum() + rejected_mask.sum()))
      prompts = np.array(prompts, np.int32)
      yield dpo_trainer.TrainingInput(
          prompt_ids=prompts, prompt_mask=np.ones_like(prompts), chosen_ids=chosen,
          chosen_mask=chosen_mask, rejected_ids=rejected, rejected_mask=rejected_mask)

  trainer.train(batches())
  return counts, size


def main():
  work = common.from_command_line()
  import tunix  # noqa: F401  whatever it costs is part of a start
  meter = common.CompileMeter()
  clock = common.Clock(work, meter.read)
  sections = {"sampling": sampling, "grpo": grpo, "sft": sft, "dpo": dpo}
  counts, size = sections[work.section](work, clock)
  if not work.median_len and work.section in ("sampling", "grpo"):
    assert set(counts) == {work.rows * work.new_tokens}, counts
  clock.result(["google-tunix", "jax", "jaxlib", "flax", "optax"], tokens=counts[work.warmup:],
               parameters=size)


if __name__ == "__main__":
  main()
