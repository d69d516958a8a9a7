"""Octopus: first and second answers recombined into corrections (arXiv:2602.08503).

Changes the episode of GRPO (`rollouts.recombined_corrections`) and the objective, which is GSPO's
with advantages per token and, in the first of two stages, holds first answers near the reference
(`objectives.anchor_first_answers`). Stage 1 trains second answers only; stage 2 first ones too
where both are right or both wrong. Reported: mean of seven benchmarks 71.7, about 1.0 above GSPO with 16
samples at 0.72 of its time per step (Qwen3-VL-8B). Small-scale check:
tests/methods/test_octopus.py.

Text alone: vision is not needed for the idea. The toy writes 123+456= as 974=975, two attempts with
"=" between them; the warm start has seen first attempts that are wrong half of the time. Choices
made: pairs that are too long are left out instead of cut, and stage 2 goes on from the end of stage
1. The paper's clip range 3e-4 to 4e-4 stays.

Falls short of the card: the row compares final answers alone, not first ones or how many are corrected
and spoiled, nor stages without masks; evidence of these is logged.
"""

import copy

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.data.train = config.data.validation = config.data.test = "task:corrected_addition"
  config.data.task = dict(digits=3)
  config.rollout.max_tokens = 10
  config.rollout.episode = dict(name="recombined_corrections", samples=8, separator="=",
                                max_tokens=10, answer=r"\d+", stage=1)
  config.reward.criteria = [dict(name="in_span", label="correct", pattern=r"(?:\d*=)?(\d+)")]
  surrogate = dict(name="clipped_surrogate", level="sequence_token", low=3e-4, high=4e-4)
  config.objective = [surrogate, dict(name="anchor_first_answers", beta=0.01)]
  config.phases = ("sft", "rl", "whole")
  config.whole = copy.deepcopy(config.rl)
  config.whole.rollout = dict(episode=dict(config.rollout.episode, stage=2))
  config.whole.objective = [dict(surrogate)]
  return config


def get_evidence():
  own = get_config()
  task = {**{f"data.{split}": own.data[split] for split in ("train", "validation", "test")},
          "data.task": own.data.task.to_dict(), "rollout.max_tokens": own.rollout.max_tokens,
          "reward.criteria": [dict(c) for c in own.reward.criteria]}
  return dict(
      reported="mean of seven benchmarks 71.7, GSPO with 16 samples about 1.0 less (Qwen3-VL-8B)",
      warm=task, overrides={**task, "rl.steps": 100},
      arms=dict(grpo=dict(config="configs/grpo.py", overrides={"rl.steps": 200})),
      claims=[dict(text="final answers are right more often, from as many samples",
                   metric="test/sampled_accuracy", expect="higher", baseline="grpo")])
