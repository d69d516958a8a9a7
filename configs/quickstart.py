"""A small decoder learns 3-digit addition from nothing: supervised warm start, then GRPO.

Phase 1 imitates worked examples until it gets some problems right; phase 2 learns from a verifier
alone. Problems for evaluation are never trained on. Measured figures: README, "Quickstart".
"""

from configs import base


def get_config():
  config = base.get_config()
  config.data.train = config.data.validation = config.data.test = "task:addition"
  config.data.task = dict(digits=3, answer_format="reversed")
  config.data.max_prompt_tokens = config.data.max_completion_tokens = 16
  config.tokenizer.alphabet = "0123456789+="

  config.model.update(layers=4, d_model=128, heads=4, kv_heads=2, d_ff=384)
  config.batch.row_length = 64
  config.optimizer.update(learning_rate=1e-3, b2=0.99, warmup_steps=20)
  config.rollout.update(prompts=32, episode=dict(name="group", samples=8), max_tokens=8,
                        filter_zero_variance=True)
  config.evaluate.update(problems=500, samples=8, k=8)

  # Both phases end when problems of the validation split, which neither trains on, go well enough.
  config.phases = ("sft", "rl")
  config.sft = dict(
      kind="sft", steps=1000, until=dict(metric="greedy_accuracy", at_least=0.4, every=15),
      batch=dict(examples=128), objective=[dict(name="cross_entropy")])
  config.rl = dict(
      kind="rl", steps=400, until=dict(metric="greedy_accuracy", at_least=0.92, every=20),
      optimizer=dict(learning_rate=2e-4))
  return config
