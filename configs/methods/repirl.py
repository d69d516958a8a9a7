"""rePIRL: token rewards and policy are learned in turn, from solutions alone (arXiv:2602.07832).

Changes in RLOO where rewards come from: `rollouts.group_and_expert` adds the task's solution to every
group, `advantages.inverse_rewards` gives answers their return under a model of rewards, the critic of
`config.model.critic`, and `objectives.fit_inverse_reward` teaches that model to prefer the solution.
No outcome is read unless `outcome` is set. Reported, average scores: Qwen2.5-3B-Instruct maths 33.5 and
coding 27.7, Qwen3-4B-Base 41.6 and 39.8 (unverified). Small-scale check: tests/methods/test_repirl.py.

Only the abstract and reviews were read. Choices made: importance weights from means over tokens, at
most 0.2 each, one step of both models on each batch with one learning rate, the reward read at the
token that it is about, entropy 0.001, rewards centred over the batch, returns from the first token on, and
advantages divided by their deviation over the batch.

The row compares with supervised tuning on the same 1,000 solutions, 32 in each of as many updates at the same
learning rate, and with verdicts on the same questions. The card expects its gain over supervised tuning on
longer problems; here all are of one length. What rewards say of a step that is wrong, and which of 16 answers
they would pick, is not measured.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.model.critic = True
  config.rollout.episode = dict(name="group_and_expert", samples=8)
  config.advantage = [dict(name="inverse_rewards"), dict(name="leave_one_out"),
                      dict(name="scale_by_batch_std")]
  config.objective = [dict(name="clipped_surrogate", low=0.2, high=0.2),
                      dict(name="fit_inverse_reward", aggregation="sequence_mean")]
  return config


def get_evidence():
  return dict(
      reported="Qwen2.5-3B-Instruct maths 33.5, coding 27.7 (unverified)",
      warm={"model.critic": True},
      overrides={"data.task_size": 1000, "rl.evaluate.every": 50},
      arms=dict(
          start=dict(overrides={"rl.optimizer.learning_rate": 0.0, "rl.steps": 10}),
          sft=dict(overrides={
              "phases": ("sft",), "sft.steps": 200, "sft.batch.examples": 32,
              "sft.optimizer.learning_rate": 3e-4, "sft.optimizer.warmup_steps": 5,
              "sft.evaluate.every": 50}),
          outcome=dict(overrides={
              "rollout.episode": dict(name="group", samples=8),
              "advantage": [dict(name="leave_one_out"), dict(name="scale_by_batch_std")],
              "objective": [dict(name="clipped_surrogate", low=0.2, high=0.2)]})),
      claims=[
          dict(text="solutions alone, without a verdict, improve the policy",
               metric="test/sampled_accuracy", expect="higher", baseline="start"),
          dict(text="and more than imitating them", joint=True, metric="test/sampled_accuracy",
               expect="higher", baseline="sft"),
          dict(text="as much as verdicts do", metric="test/sampled_accuracy", expect="not lower",
               margin=0.02, baseline="outcome")])
