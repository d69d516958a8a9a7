"""HiPO: deciding whether to think has an advantage of its own (arXiv:2509.23967).

Changes in GRPO what answers look like and how they are compared: `rollouts.answer_in_mode` finds
the decision, `advantages.favour_direct_mode` breaks near-ties in favour of direct answers, and
`advantages.compare_modes` gives the decision an advantage across modes and the rest one within its
mode. The reward is 1 for a right answer and 0.2 for the form. Reported, Qwen3-8B against a cold
start that always thinks: accuracy +6.2%, tokens -30%, thinking rate -39% (GRPO: +3.1% accuracy).
Small-scale check: tests/methods/test_hipo.py.

The algebra of bonus and advantages was read in part only and is a reconstruction; omega 0.01, gamma
0.3 and N 16 are choices. The cold start's data (pass rates by mode, justifications) are replaced by
the task's: sums of 1 to 3 digits, half of whose solutions go by way of a scratchpad behind "+", and
half begin with "=". An answer without a decision is all decision.

Falls short of the card: a larger omega, and decisions without their mode's own term, are no arms.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.data.train = config.data.validation = config.data.test = "task:scratchpad_addition"
  config.data.task = dict(shortest=1, longest=3, scratchpad=0.5)
  config.rollout.update(prompts=16, max_tokens=12)
  config.rollout.episode = dict(name="answer_in_mode", samples=16, on="+", off="=")
  config.reward.criteria = [
      dict(name="in_span", label="correct", pattern=r"(?:\+\d*)?=(\d+)"),
      dict(name="matches_format", label="form", pattern=r"(?:\+\d+)?=\d+")]
  config.reward.aggregate = dict(name="weighted_sum", weights=dict(correct=1.0, form=0.2))
  config.advantage = [dict(name="favour_direct_mode", omega=0.01),
                      dict(name="compare_modes", gamma=0.3)]
  config.aggregation.kind = "token_mean"
  return config


def get_evidence():
  own = get_config()
  grpo_credit = [dict(name="favour_direct_mode", omega=0.0), dict(name="center_by_group"),
                 dict(name="scale_by_group_std")]
  return dict(
      reported="accuracy +6.2%, tokens -30%, thinking rate -39%; GRPO +3.1%, longer (Qwen3-8B)",
      warm={"data.train": own.data.train, "data.validation": own.data.validation,
            "data.test": own.data.test, "data.task": own.data.task.to_dict(),
            "rollout.max_tokens": own.rollout.max_tokens,
            "reward.criteria": [dict(c) for c in own.reward.criteria],
            "reward.aggregate": own.reward.aggregate.to_dict()},
      arms=dict(
          grpo=dict(overrides={"advantage": grpo_credit}),
          no_bonus=dict(overrides={"advantage": [dict(name="favour_direct_mode", omega=0.0),
                                                 dict(name="compare_modes", gamma=0.3)]})),
      claims=[
          dict(text="answers are shorter than GRPO's in the same two modes",
               metric="test/greedy_tokens", expect="lower", baseline="grpo"),
          dict(text="as many of them are right", metric="test/sampled_accuracy",
               expect="not lower", margin=0.02, baseline="grpo"),
          dict(text="without the bonus the model thinks more often", metric="late/thinking_rate",
               expect="lower", baseline="no_bonus")])
