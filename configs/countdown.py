"""GRPO on Countdown, where a problem has many right answers: `3,8,1,2=24:` -> `8*3`, `8*3*1`, `(8+2*2)*2`.

For claims about diversity, which sums with one right answer cannot test. Worked examples are of one
family: no operand is larger than the one to its left. Right answers outside of it are found by sampling.
"""

from configs import grpo

TASK = {
    "data.train": "task:countdown", "data.validation": "task:countdown", "data.test": "task:countdown",
    "data.task": dict(numbers=4, largest=9, target=30), "tokenizer.alphabet": "0123456789+-*/(),=:",
    "rollout.max_tokens": 14, "reward.criteria": [dict(name="jaxrl.tasks:oracle")]}


def get_config():
  config = grpo.get_config()
  config.update_from_flattened_dict(TASK)
  return config
