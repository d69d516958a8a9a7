"""ROVER: values of the uniformly random policy, fitted by the log-ratio (arXiv:2509.24981).

Changes three things in GRPO: the objective (`objectives.random_policy_valuation`), the advantage,
which is not divided by the deviation of the group (the released maths script does; the text does
not), and the number of updates on a batch, for the first of them is a step of REINFORCE. The paper
makes them on quarters of its batch, here each is on all of it. Log-probabilities are of the
distribution that was sampled from, the paper's of temperature 1. Reported: average pass@1 of maths
sets 48.4, GRPO 39.7 (Qwen3-8B-Base); pass@256 16.8 points over other methods. Small-scale check:
tests/methods/test_rover.py.

Falls short of the card: sums have one right answer, so the row counts no different ones, which only the
test's tree does, and arms are compared after as many updates, not at equal success.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.advantage = [dict(name="center_by_group")]
  config.objective = [dict(name="random_policy_valuation", rho=1.0)]
  config.aggregation.kind = "token_mean"
  config.rollout.updates = 4
  return config


def get_evidence():
  return dict(
      reported="pass@1 48.4, GRPO 39.7 (Qwen3-8B-Base, maths); pass@256 +16.8 points",
      overrides={"rl.steps": 400},
      arms=dict(grpo=dict(config="configs/grpo.py", overrides={"rollout.updates": 4})),
      claims=[
          dict(text="more problems are solved within 8 samples", metric="test/pass_at_8",
               expect="higher", baseline="grpo"),
          dict(text="single samples are better", metric="test/sampled_accuracy", expect="higher",
               baseline="grpo"),
          dict(text="the policy stays more uncertain", metric="late/entropy", expect="higher",
               baseline="grpo")])
