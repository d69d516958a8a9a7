"""OrthAlign: a second preference in directions that the first has not used (arXiv:2509.24610).

Changes the second of two DPO phases: `transforms.project_onto_null_space` keeps its updates off the output
directions in which the first phase has moved each matrix, and bounds what it adds. Reported: average of three
objectives 75.15, DPO 63.55, MODPO 64.55 (Llama-3-SFT, UltraFeedback); harmless rate 93.84 and helpful win
rate 65.71, DPO 71.24 and 60.24. Small-scale check: tests/methods/test_orthalign.py.

It starts from a run that can write: `--config.start=RUN`. In the toy one taste is about the last letter of a
word, the other about its length (`objectives.dpo_by_label`). Choices made: full parameters instead of adapters
(those that are no matrices stay as they are), the null ratio 0.8 of the paper's code and no search
(`metric="..."` searches), the update and not the gradient is projected, since Adam leaves the subspace, and
tau_s is the spectral norm of what the first phase changed.
"""

import copy

from configs import dpo


def get_config():
  config = dpo.get_config()
  config.data.train = config.data.validation = config.data.test = "task:endings"
  config.data.task = dict()
  config.data.columns = ("ending", "length")
  config.tokenizer.alphabet = "abcdefgh:"
  config.rollout.max_tokens = 12
  config.reward.criteria = [dict(name="jaxrl.tasks.endings:firm", label="firm")]
  config.phases = ("first", "second")
  config.first = copy.deepcopy(config.preference)
  config.first.steps = 150
  config.first.objective = [dict(name="dpo_by_label", label="ending", beta=0.1)]
  config.second = copy.deepcopy(config.first)
  config.second.objective = [dict(name="dpo_by_label", label="length", beta=0.1)]
  config.second.optimizer.transforms = [dict(name="project_onto_null_space", ratio=0.8, clip=1.0)]
  del config["preference"]
  return config


def get_evidence():
  own = get_config()
  warm = {**{f"data.{split}": own.data[split] for split in ("train", "validation", "test")},
          "data.task": {}, "tokenizer.alphabet": own.tokenizer.alphabet, "rollout.max_tokens": 12,
          "reward.criteria": [dict(c) for c in own.reward.criteria]}
  return dict(
      reported="average of three objectives 75.15, DPO 63.55, MODPO 64.55 (Llama-3-SFT, UltraFeedback)",
      warm={**warm, "sft.until.at_least": 2.0, "sft.steps": 300}, overrides={"evaluate.samples": 4, "evaluate.k": 4},
      arms=dict(
          sequential=dict(overrides={"second.optimizer.transforms": []}),
          gradient=dict(overrides={"second.optimizer.transforms": [dict(
              name="project_onto_null_space", ratio=0.8, on="gradient")]})),
      claims=[
          dict(text="the first preference survives the second", metric="test/sampled_accuracy",
               expect="higher", baseline="sequential"),
          dict(text="the second is learnt nearly as well", metric="test/pairs/preference_accuracy",
               expect="not lower", margin=0.05, baseline="sequential"),
          dict(text="projecting the update keeps as much as projecting the gradient",
               metric="test/sampled_accuracy", expect="not lower", margin=0.02, baseline="gradient")])
