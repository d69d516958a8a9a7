"""SeaPO: the rejected answer is the chosen one with an error put in (arXiv:2509.24781).

Changes in online DPO where the rejected answer comes from: `rollouts.best_and_flawed` injects one of
three kinds of errors into the best of 5 samples, so the loss is about the error alone. Reported: +5 to
+10 points of truthfulness over preference optimisation without injection (1.5B to 14B). Small-scale check:
tests/methods/test_seapo.py.

Only the abstract was read. Choices made: a uniform mix of the kinds, 5 samples, beta 0.1, pairs dropped
where the reward sees no error. On sums with a scratchpad a program puts errors in
(`tasks.scratchpad_addition.flawed`), the same ones that 3 of 10 examples of the warm start have; with
`rewrite="flaw"` and such a template in `config.rollout.templates` the policy does it itself.
"""

from configs import online_dpo

KINDS = ("correctness", "logic", "hallucination")


def get_config():
  config = online_dpo.get_config()
  config.data.train = config.data.validation = config.data.test = "task:scratchpad_addition"
  config.data.task = dict(shortest=1, longest=2, scratchpad=1.0, flaws=0.3)
  config.data.held_out_task = dict(flaws=0.0)
  config.reward.criteria = [dict(name="jaxrl.tasks:oracle", label="correct")]
  config.rollout.update(max_tokens=16, filter_zero_variance=False)
  config.rl.rollout = dict(edits=[], episode=dict(
      name="best_and_flawed", samples=5, kinds=list(KINDS),
      flaw="jaxrl.tasks.scratchpad_addition:flawed"))
  return config


def get_evidence():
  own = get_config()
  warm = {**{f"data.{split}": own.data[split] for split in ("train", "validation", "test")},
          "data.task": own.data.task.to_dict(), "data.held_out_task": dict(flaws=0.0),
          "rollout.max_tokens": 16, "reward.criteria": [dict(c) for c in own.reward.criteria]}
  return dict(
      reported="truthfulness +5 to +10 points (1.5B to 14B)",
      warm={**warm, "sft.until.at_least": 0.8, "sft.steps": 600},
      overrides={"rl.steps": 60}, measure="jaxrl.evaluation.flaws:flaw_rates",
      arms=dict(
          best_and_worst=dict(config="configs/online_dpo.py", overrides={
              "rollout.episode": dict(name="group", samples=5), "rollout.filter_zero_variance": False}),
          correctness=dict(overrides={"rl.rollout.episode.kinds": ["correctness"]})),
      claims=[
          dict(text="answers are right more often than with best and worst of 5",
               metric="test/sampled_accuracy", expect="higher", baseline="best_and_worst"),
          dict(text="one kind alone lowers its own rate as much", metric="measured/correctness",
               expect="not lower", margin=0.02, baseline="correctness"),
          dict(text="the mix lowers invented operands more than wrong digits alone",
               metric="measured/hallucination", expect="lower", baseline="correctness"),
          dict(text="and contradictions", metric="measured/logic", expect="lower",
               baseline="correctness")])
