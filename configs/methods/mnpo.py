"""MNPO: a policy that plays against the reference and the policies of its last iterations (arXiv:2509.23102).

Changes one thing in online DPO: the loss, `objectives.mnpo`, which asks a margin of means over tokens, beyond
that of a mixture of the reference and of the policies that this iteration and the one before began with
(`config.frozen`). Reported with Gemma-2-9B-it, AlpacaEval 2 LC / Arena-Hard: SFT 50.2 / 45.0, DPO 54.4 /
45.6, INPO 56.1 / 48.0, TD-MNPO 57.3 / 52.3. Small-scale check: tests/methods/test_mnpo.py.

Choices made: eta = 1, so that the target, 1 / (2 eta), is one that means over tokens reach (published:
0.0075, a target of 67); an iteration is 25 updates on pairs that are sampled anew for each (published: a
third of the prompts, sampled once); samples are as many and as hot as the parent's.
"""

from configs import online_dpo

ITERATION = 25


def get_config():
  config = online_dpo.get_config()
  config.frozen = dict(previous=dict(every=ITERATION), before=dict(every=ITERATION, follows="previous"))
  config.rl.objective = [dict(name="mnpo", rho=1 / 3, eta=1.0, models=("previous", "before"))]
  return config


def get_evidence():
  own = dict(name="mnpo", eta=1.0)
  return dict(
      reported="AlpacaEval 2 LC / Arena-Hard: DPO 54.4 / 45.6, INPO 56.1 / 48.0, TD-MNPO 57.3 / 52.3",
      overrides={"rl.steps": 100},
      arms=dict(
          online_dpo=dict(config="configs/online_dpo.py"),
          one_opponent=dict(overrides={
              "frozen": dict(previous=dict(every=ITERATION)),
              "rl.objective": [dict(own, rho=1 / 3, models=("previous",))]}),
          reference_only=dict(overrides={
              "frozen": {}, "rl.objective": [dict(own, rho=1.0)]})),
      claims=[
          dict(text="samples are better than after online DPO", metric="test/sampled_accuracy",
               expect="higher", baseline="online_dpo"),
          dict(text="two opponents do better than one (INPO)", metric="test/sampled_accuracy",
               expect="higher", baseline="one_opponent"),
          dict(text="opponents do better than the reference alone (IPO)", metric="test/sampled_accuracy",
               expect="higher", baseline="reference_only")])
