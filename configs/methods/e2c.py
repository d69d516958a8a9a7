"""E2C: a short plan, then its execution (arXiv:2509.23946).

Changes in GRPO what answers look like, and what their parts weigh: `rollouts.plan_then_execute`
tags plan and execution, `advantages.weigh_plans` doubles the advantage of plans, and
`objectives.execution_entropy` makes executions certain. `rollouts.execute_distinct_plans` is the
way to answer at test time. Reported: AIME'24 +8.7 points over GRPO (Qwen3-4B); 58.1 with votes over
plans (Qwen3-8B). Small-scale check: tests/methods/test_e2c.py.

Only the abstract, the repository's description and reviews were read. Choices made: weights 2 and
1, 0.01 of entropy, one divisor for all tokens, one phase of reinforcement instead of two, and an
answer without the boundary is simply wrong. Plans are clustered by their text. The toy's warm start
imitates "456=" as the plan of 123+456=, and then the sum.

Left out is tuning on plans alone (EF-SFT). Falls short of the card: other weights of plans are no arms, and
whether an execution follows a plan that is wrong is not asked.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.data.more = ("b",)
  config.data.solution_template = "{b}={solution}"
  config.rollout.max_tokens = 10
  config.rollout.episode = dict(name="plan_then_execute", samples=8, boundary="=")
  config.reward.criteria = [dict(name="in_span", label="correct", pattern=r"\d*=(\d+)")]
  config.advantage = [*config.advantage, dict(name="weigh_plans", plan=2.0, execution=1.0)]
  config.objective = [*config.objective, dict(name="execution_entropy", coefficient=0.01)]
  config.aggregation.kind = "token_mean"
  return config


def get_evidence():
  config = get_config()
  return dict(
      reported="AIME'24 +8.7 points over GRPO (Qwen3-4B)",
      warm={"data.more": ("b",), "data.solution_template": config.data.solution_template,
            "rollout.max_tokens": config.rollout.max_tokens,
            "reward.criteria": [dict(c) for c in config.reward.criteria]},
      arms=dict(equal=dict(overrides={
          "advantage": [dict(name="center_by_group"), dict(name="scale_by_group_std")],
          "objective": [dict(name="clipped_surrogate", low=0.2, high=0.2)]})),
      claims=[
          dict(text="plans of double weight and certain executions answer better",
               metric="test/sampled_accuracy", expect="higher", baseline="equal"),
          dict(text="and learn faster", metric="mean/validation/greedy_accuracy", expect="higher",
               baseline="equal")])
