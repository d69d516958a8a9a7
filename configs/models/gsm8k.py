"""GRPO on GSM8K with a published chat model: what the configs beside this one have in common.

  jaxrl run --config=configs/models/qwen2_5_1_5b.py:v5e-8 --workdir=runs/qwen \\
      --config.data.train=train.jsonl --config.data.test=test.jsonl

The model answers in the words of its own chat template and is rewarded for the right number in \\boxed{}.
An update is 64 prompts with 8 samples each, in one step (on-policy), at most 1024 new tokens.
"""

from configs import base

ASK = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def get_config(model, machines, variant):
  """The config of a model on a machine.

  Args:
    model: fields of `config.model`: `source`, and its shape, so that a plan needs no download; a run checks
      the shape against the model's own config.json.
    machines: settings by name of machine, laid over the config: `{"v5e-8": {"mesh": {...}}}`.
    variant: one of these names; "" is the first.
  """
  config = base.get_config()
  config.data.update(
      train="gsm8k/train.jsonl", test="gsm8k/test.jsonl", question="question", answer="answer",
      solution="answer", prompt_template=ASK, chat=True, answer_pattern=r"####\s*(.+)",
      max_prompt_tokens=384, max_completion_tokens=512, on_bad_row="skip")
  config.tokenizer.kind = "pretrained"
  config.model.update(scan_layers=True, remat="full", dtype="bfloat16", **model)
  config.optimizer.update(learning_rate=1e-6, b2=0.99, warmup_steps=10, clip_norm=1.0)
  config.rollout.update(prompts=64, episode=dict(name="group", samples=8), max_tokens=1024,
                        max_logprob_gap=2.0, max_rows=512)
  config.reward.update(criteria=[dict(name="numeric_answer", pattern=r"\\boxed\{([^}]*)\}")],
                       workers=4, timeout=5.0)
  config.objective = [dict(name="clipped_surrogate", low=0.2, high=0.28)]
  config.aggregation.kind = "token_mean"
  config.batch.row_length = 2048
  config.evaluate.update(problems=512, samples=0)
  config.phases = ("rl",)
  config.rl = dict(kind="rl", steps=200)
  names = list(machines)
  if variant and variant not in names:
    raise ValueError(f"there is no variant {variant!r} for this model; there are {', '.join(names)}")
  for section, settings in machines[variant or names[0]].items():
    config[section].update(settings)
  return config
