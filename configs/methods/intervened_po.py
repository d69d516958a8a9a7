"""IPO: traces are mended where they go wrong, and the rest is preferred (arXiv:2509.24393).

Changes in online DPO where pairs come from: `rollouts.repaired_trace` cuts a bad trace at the first cue
of failure, puts another text there and lets the policy go on; the loss begins at the cut. Reported,
R1-Distill-Llama-8B, harmful reasoning / responses on three safety sets: 15.3 / 6.9, GRPO 18.5 / 17.8, SFT on
such data 22.6 / 12.5. Small-scale check: tests/methods/test_intervened_po.py.

Safety is replaced by a toy in which a cue decides how a trace ends, `jaxrl.tasks.cues`: to half of the
questions the policy begins with no good trace at all. The detector knows the cue; a judge would stand
there. beta is our choice, as the paper's was not readable, and its last stage, benign questions against
refusals of too much, is left out.
"""

from configs import online_dpo

LONGEST = 12


def get_config():
  config = online_dpo.get_config()
  config.data.train = config.data.validation = config.data.test = "task:cues"
  config.data.task = dict()
  config.tokenizer.alphabet = "0123456789abcdeh:+-!?"
  config.reward.criteria = [dict(name="jaxrl.tasks:oracle", label="correct")]
  config.rollout.update(max_tokens=LONGEST, filter_zero_variance=False)
  config.rl.rollout = dict(edits=[], prompts=64, episode=dict(
      name="repaired_trace", triggers=["+", "a+", "b+", "c+", "d+", "+a"],
      detector="jaxrl.tasks.cues:bad_cue", max_tokens=LONGEST))
  return config


def get_evidence():
  own = get_config()
  task = {**{f"data.{split}": own.data[split] for split in ("train", "validation", "test")},
          "data.task": {}, "tokenizer.alphabet": own.tokenizer.alphabet,
          "rollout.max_tokens": LONGEST, "reward.criteria": [dict(c) for c in own.reward.criteria]}
  return dict(
      reported="harmful reasoning / responses 15.3 / 6.9, GRPO 18.5 / 17.8, SFT 22.6 / 12.5 "
               "(R1-Distill-Llama-8B)",
      warm={**task, "sft.until.at_least": 1.0, "sft.steps": 300},
      overrides={"rl.steps": 60},
      arms=dict(
          grpo=dict(config="configs/grpo.py", overrides={"rollout.prompts": 16}),
          sft=dict(overrides={"rl.objective": [dict(name="imitate_preferred")]})),
      claims=[
          dict(text="traces end well more often than after GRPO on as many samples",
               metric="test/sampled_accuracy", expect="higher", baseline="grpo"),
          dict(text="and than after imitating the mended traces", metric="test/sampled_accuracy",
               expect="higher", baseline="sft")])
