"""GSM8K from nothing: a byte-level BPE tokenizer, supervised tuning, then GRPO on the final number.

Any JSONL, Parquet or TFDS data with a question and a worked answer fits: name it and its fields.

  jaxrl run --config=configs/gsm8k.py --workdir=runs/gsm8k \\
      --config.data.train=train.jsonl --config.data.test=test.jsonl

`gsm8k.py:smoke` goes through every stage in 3 minutes on 2 CPU cores; the full one is sized for one
GPU. Trained from scratch on 7,473 problems, such a model learns how answers look, not how to solve
them: measured figures in README, "GSM8K".
"""

from configs import base


def get_config(variant: str = ""):
  config = base.get_config()
  config.data.update(
      train="gsm8k/train.jsonl", test="gsm8k/test.jsonl",
      question="question", answer="answer", solution="answer",
      prompt_template="Question: {question}\nAnswer:", solution_template=" {solution}",
      answer_pattern=r"####\s*(.+)", remove_pattern=r"<<[^>]*>>",  # calculator marks
      max_prompt_tokens=320, max_completion_tokens=384, on_bad_row="skip")
  config.tokenizer.update(kind="bpe", vocab_size=4096)

  config.model.update(layers=8, d_model=512, heads=8, kv_heads=4, d_ff=1536, dtype="bfloat16",
                      scan_layers=True, remat="dots")
  config.batch.update(examples=128, row_length=1024)
  config.optimizer.update(learning_rate=2e-4, b2=0.99, warmup_steps=20, clip_norm=1.0)
  config.rollout.update(prompts=64, episode=dict(name="group", samples=16), max_tokens=320,
                        max_rows=1024, max_logprob_gap=1.0)
  config.reward.update(
      criteria=[dict(name="numeric_answer", pattern=r"####\s*(.+)"),
                dict(name="matches_format", pattern=r".*\n#### -?[\d,]+(\.\d+)?\s*")],
      aggregate=dict(name="weighted_sum", weights=dict(numeric_answer=1.0, matches_format=0.2)),
      workers=2, timeout=5.0)
  config.evaluate.update(problems=1319, samples=8, k=8, correct="numeric_answer")

  config.phases = ("sft", "rl")
  config.sft = dict(kind="sft", steps=600, objective=[dict(name="cross_entropy")],
                    optimizer=dict(learning_rate=1e-3, schedule="cosine"))
  config.rl = dict(kind="rl", steps=300)
  if variant == "smoke":
    _smoke(config)
  elif variant:
    raise ValueError(f"configs/gsm8k.py has no variant {variant!r}; it has 'smoke'")
  return config


def _smoke(config):
  """The same way at a size that 2 CPU cores go in 3 minutes."""
  config.data.update(max_prompt_tokens=128, max_completion_tokens=160)
  config.tokenizer.vocab_size = 1024
  config.model.update(layers=4, d_model=128, heads=4, kv_heads=2, d_ff=384, dtype="float32",
                      scan_layers=False, remat="none")
  config.batch.update(examples=32, row_length=288)
  config.rollout.update(prompts=8, episode=dict(name="group", samples=8), max_tokens=160,
                        max_logprob_gap=0.05)
  config.evaluate.update(problems=32, samples=4, k=4)
  config.sft.update(steps=80)
  config.sft.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 10
  config.rl.update(steps=20, optimizer=dict(warmup_steps=2))
  config.checkpoint.every = 50
