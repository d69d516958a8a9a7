"""TRL's side of the comparison: transformers' `generate` and TRL's trainers, called as users would.

Called as `common.py` says, in an environment of its own. float32 and without gradient
checkpointing, which is faster for it here than its defaults; every response has its full length. A
step ends where the trainer says so, so data, generation, reward, update and callbacks are in it.
"""

import os
import tempfile

os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error", HF_DATASETS_DISABLE_PROGRESS_BARS="1", WANDB_DISABLED="true",
    ACCELERATE_USE_CPU="true")

import common  # noqa: E402  the switches above are read on import

PAD_TEXT, BOS_TEXT, EOS_TEXT = "<pad>", "<bos>", "<eos>"


def make_tokenizer(work):
  """One word is one token: 'w17' <-> 17."""
  from tokenizers import Tokenizer
  from tokenizers import models
  from tokenizers import pre_tokenizers
  from transformers import PreTrainedTokenizerFast
  words = {PAD_TEXT: common.PAD, BOS_TEXT: common.BOS, EOS_TEXT: common.EOS}
  words |= {f"w{i}": i for i in range(common.SPECIALS, work.vocab)}
  tokenizer = Tokenizer(models.WordLevel(words, unk_token=PAD_TEXT))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, pad_token=PAD_TEXT, eos_token=EOS_TEXT, unk_token=PAD_TEXT,
      padding_side="left", model_max_length=1 << 20)


def text(ids):
  """Token ids as words."""
  return " ".join(BOS_TEXT if i == common.BOS else f"w{i}" for i in ids)


def save_model(work, directory, scores=False):
  """Random parameters on disk, where trainers find policy and reference, or with `scores` those of a
  reward model. Returns their number."""
  import torch
  from transformers import Qwen2Config
  from transformers import Qwen2ForCausalLM
  from transformers import Qwen2ForSequenceClassification
  torch.manual_seed(work.seed)
  longest = max(work.prompt_len + work.new_tokens, work.sft_len, 2 * work.pair_len)
  kind, more = (Qwen2ForSequenceClassification, {"num_labels": 1}) if scores else (Qwen2ForCausalLM, {})
  model = kind(Qwen2Config(
      vocab_size=work.vocab, hidden_size=work.d_model, intermediate_size=work.d_ff,
      num_hidden_layers=work.layers, num_attention_heads=work.heads,
      num_key_value_heads=work.kv_heads, tie_word_embeddings=work.tied,
      max_position_embeddings=longest + 8, bos_token_id=None, eos_token_id=common.EOS,
      pad_token_id=common.PAD, attn_implementation="sdpa", dtype="float32", **more))
  if work.median_len:
    inputs, outputs = map(torch.from_numpy, common.countdown(work))
    with torch.no_grad():
      model.model.embed_tokens.weight.copy_(inputs)
      model.lm_head.weight.copy_(outputs)
      for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
  model.save_pretrained(directory)
  make_tokenizer(work).save_pretrained(directory)
  return sum(p.numel() for p in model.parameters())


def sampling(work, clock, directory):
  import torch
  from transformers import AutoModelForCausalLM
  size = save_model(work, directory)
  model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32,
                                               attn_implementation="sdpa").eval()
  prompts = torch.from_numpy(common.prompts(work, work.prompts))
  counts, enough = [], False
  while not enough:
    with torch.no_grad():
      found = model.generate(
          input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
          temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=work.samples,
          max_new_tokens=work.new_tokens, min_new_tokens=0 if work.median_len else work.new_tokens,
          pad_token_id=common.PAD, eos_token_id=common.EOS, disable_compile=True)
    counts.append(int((found[:, work.prompt_len:] != common.PAD).sum()) if work.median_len else
                  found[:, work.prompt_len:].numel())
    enough = clock.tick()
  return counts, size


def arguments(work, directory, sequences):
  """What all trainers are told."""
  return dict(
      output_dir=os.path.join(directory, "trainer"), per_device_train_batch_size=sequences,
      gradient_accumulation_steps=1, max_steps=work.warmup + work.iters, learning_rate=work.learning_rate,
      logging_steps=10 ** 6, logging_first_step=False, save_strategy="no", report_to="none",
      disable_tqdm=True, use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
      seed=work.seed, dataloader_pin_memory=False, lr_scheduler_type="constant",
      model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"})


def train(trainer, clock):
  from transformers import TrainerCallback

  class Ticking(TrainerCallback):
    """Ends the training once enough was measured."""

    def on_step_end(self, args, state, control, **_):
      control.should_training_stop = clock.tick() or control.should_training_stop

  trainer.add_callback(Ticking())
  trainer.train()


def grpo(work, clock, directory):
  from datasets import Dataset
  from trl import GRPOConfig
  from trl import GRPOTrainer
  size = save_model(work, directory)
  questions = common.prompts(work, work.prompts * (work.warmup + work.iters))
  counts = []

  def reward(completion_ids, **_):
    counts.append(sum(map(len, completion_ids)))
    return [common.share_of_even(ids) for ids in completion_ids]

  # The dataset is read through as a whole: what no longer fits the time is never sampled from.
  full = {} if work.median_len else {"min_new_tokens": work.new_tokens}
  trainer = GRPOTrainer(
      model=directory, reward_funcs=reward, processing_class=make_tokenizer(work),
      train_dataset=Dataset.from_list([{"prompt": text(ids)} for ids in questions]),
      args=GRPOConfig(
          **arguments(work, directory, work.rows), num_generations=work.samples,
          max_completion_length=work.new_tokens, temperature=1.0, beta=work.beta,
          generation_kwargs=full))
  train(trainer, clock)
  return counts, size


def sft(work, clock, directory):
  from datasets import Dataset
  from trl import SFTConfig
  from trl import SFTTrainer
  import dataclasses
  size = save_model(work, directory)
  whole = dataclasses.replace(work, prompt_len=work.sft_len - 1)  # the trainer appends EOS
  texts = [{"text": text(ids)} for ids in common.prompts(whole, work.sft_batch)]
  trainer = SFTTrainer(
      model=directory, train_dataset=Dataset.from_list(texts),
      processing_class=make_tokenizer(work),
      args=SFTConfig(**arguments(work, directory, work.sft_batch), max_length=work.sft_len))
  counts, inner = [], trainer.compute_loss

  def compute_loss(model, inputs, *args, **kwargs):
    counts.append(inputs["input_ids"].numel())
    return inner(model, inputs, *args, **kwargs)
  trainer.compute_loss = compute_loss
  train(trainer, clock)
  assert set(counts) == {work.sft_batch * work.sft_len}, counts
  return counts, size


def dpo(work, clock, directory):
  from trl import DPOConfig
  from trl import DPOTrainer
  return of_pairs(work, clock, directory, DPOTrainer, DPOConfig)


def reward(work, clock, directory):
  from trl import RewardConfig
  from trl import RewardTrainer
  return of_pairs(work, clock, directory, RewardTrainer, RewardConfig)


def of_pairs(work, clock, directory, trainer_of, config_of):
  """Times a trainer of pairs; the reward trainer reads whole texts."""
  from datasets import Dataset
  size = save_model(work, directory, scores=work.section == "reward")
  longest, real = int(common.pair_lengths(work).max()), int(common.pair_lengths(work).sum())
  rows = []
  for prompt, *answers in common.pairs(work):
    start = text(prompt) + " "
    chosen, rejected = map(text, answers)
    rows.append({"prompt": start, "chosen": chosen, "rejected": rejected} if work.section == "dpo" else
                {"chosen": start + chosen, "rejected": start + rejected})
  trainer = trainer_of(
      model=directory, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer(work),
      args=config_of(**arguments(work, directory, work.pairs), max_length=longest))
  counts, inner = [], trainer.compute_loss

  def compute_loss(model, inputs, *args, **kwargs):
    found = tuple(inputs["input_ids"].shape), int(inputs["attention_mask"].sum())
    assert found == ((2 * work.pairs, longest), real), found
    counts.append(common.pair_tokens(work))
    return inner(model, inputs, *args, **kwargs)
  trainer.compute_loss = compute_loss
  train(trainer, clock)
  return counts, size


def main():
  work = common.from_command_line()
  import torch
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  clock = common.Clock(work)
  sections = {"sampling": sampling, "grpo": grpo, "sft": sft, "dpo": dpo, "reward": reward}
  with tempfile.TemporaryDirectory(prefix="trl_bench_") as directory:
    counts, size = sections[work.section](work, clock, directory)
  if not work.median_len and work.section in ("sampling", "grpo"):
    assert set(counts) == {work.rows * work.new_tokens}, counts
  clock.result(["trl", "torch", "transformers", "accelerate"], tokens=counts[work.warmup:],
               parameters=size)


if __name__ == "__main__":
  main()
