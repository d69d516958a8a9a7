"""RLTR: a frozen model must be able to finish what the policy began to think (arXiv:2602.08489).

Changes one thing in GRPO: the episode (`rollouts.transferable_answers`), which hands a part of every
thought to the frozen reference and adds to the reward what that makes of it. Reported: MATH500
maj@64 3.6 points over RLVR, whose mean accuracy is reached in 2.5 times fewer steps. Small-scale
check: tests/methods/test_rltr.py.

Only the abstract and reviews were read. Choices made: cuts uniform over 0.3 to 0.9 of the thought,
one continuation at temperature 0.7 by the policy that the phase began with, transfer weighs half as
much as the answer, a part that contains the reference answer earns nothing, and the form has no reward of its
own. The toy's thought is the sum from its last digit: 123+456= is answered +975=579. Falls short of the card:
receivers other than the start of the policy are not asked.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.data.train = config.data.validation = config.data.test = "task:scratchpad_addition"
  config.data.task = dict(shortest=3, longest=3, scratchpad=1.0)
  config.rollout.max_tokens = 12
  config.rollout.episode = dict(name="transferable_answers", samples=8, boundary="=", max_tokens=12,
                                transfer_weight=0.5)
  config.reward.criteria = [dict(name="in_span", label="correct", pattern=r"(?:\+\d*)?=(\d+)")]
  return config


def get_evidence():
  own = get_config()
  return dict(
      reported="MATH500 maj@64 +3.6 points over RLVR",
      warm={**{f"data.{split}": own.data[split] for split in ("train", "validation", "test")},
            "data.task": own.data.task.to_dict(), "rollout.max_tokens": own.rollout.max_tokens,
            "reward.criteria": [dict(c) for c in own.reward.criteria]},
      arms=dict(rlvr=dict(overrides={"rollout.episode.transfer_weight": 0.0})),
      claims=[
          dict(text="majorities of 16 answers are right more often", metric="test/majority_accuracy",
               expect="higher", baseline="rlvr"),
          dict(text="single answers are as good", metric="test/sampled_accuracy",
               expect="not lower", margin=0.02, baseline="rlvr"),
          dict(text="thoughts are of more use to the frozen model",
               metric="late/criteria/transfer", expect="higher", baseline="rlvr")])
