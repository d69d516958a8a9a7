"""EMPG: steps that the policy was sure of learn more from the outcome (arXiv:2509.09265).

Adds one piece to GRPO's advantage, `advantages.modulate_by_entropy`, with k, k' and zeta of the
authors' pseudocode. In the paper a step is a turn of an agent (`steps="turn"`); the toy's answers
have one turn, so here a step is a token. Entropies are compared over the whole batch of rollouts,
and the last centring is over steps. Reported: success on ALFWorld 74.8 -> 78.5, WebShop 65.6 -> 69.3
(GRPO, 7B); Deep Search 62.0 -> 65.3 (DAPO, 32B). Small-scale check: tests/methods/test_empg.py.

The row asks whether entropy tells which of 9 steps mattered: 3 of them are digits of a sum, and after each
come two coin flips of ten sides without effect (task:detours), one reward at the end. It is no environment that
answers: all that steps depend on is in the question and in the steps before. Of the card's arms that of the
bonus alone is left out, and there are three seeds, where it wants ten.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.advantage.append(dict(name="modulate_by_entropy", k=1.0, k_next=1.0, bonus=0.1,
                               steps="token"))
  return config


def get_evidence():
  task = "task:detours"
  return dict(
      reported="ALFWorld success 74.8 -> 78.5 with GRPO (7B)",
      warm={"data.train": task, "data.validation": task, "data.test": task, "data.task": dict(digits=2, flips=2),
            "rollout.max_tokens": 11, "reward.criteria": [dict(name="jaxrl.tasks:oracle")]},
      overrides={"rl.evaluate.every": 20},
      arms=dict(
          grpo=dict(config="configs/grpo.py"),
          scale=dict(overrides={"advantage": [*get_config().advantage[:-1], dict(
              get_config().advantage[-1], bonus=0.0)]})),
      claims=[
          dict(text="samples are better", metric="test/sampled_accuracy", expect="higher",
               baseline="grpo"),
          dict(text="it learns faster", metric="mean/validation/greedy_accuracy", expect="higher",
               baseline="grpo"),
          dict(text="scaling alone does better", method="scale", metric="test/sampled_accuracy",
               expect="higher", baseline="grpo")])
