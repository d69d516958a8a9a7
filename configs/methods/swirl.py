"""SWIRL: a forward and an inverse world model reward each other in turn (arXiv:2602.06130).

Changes the episodes of GRPO (`rollouts.imagine_next_states`, `rollouts.explain_transitions`), which
are phases of their own here: `rl` trains the forward model and `inverse` the inverse one, twice, each
against the policy that the phase began with. Both are one network with two prompts (the paper's
shared weights). Reported: AURORA-Bench 4.36 -> 5.06, ByteMorph 43.4 -> 55.7 with shared weights
(Liquid-7B), StableToolBench 12.85 -> 14.61 (Qwen2.5-3B). Small-scale check: tests/methods/test_swirl.py.

Paper and released code differ in group sizes and KL weights; here 8 samples, and 0.04 forward, 0.1
inverse. No vocabulary is masked, as texts of both kinds are digits. The toy is task:transitions:
12+34= is answered 64, the next state from its last digit, and 12=64+ is answered 34, the action. Its
warm start has seen both kinds of question.

The row compares with the warm start, and with supervised tuning on pseudo-labels (`rollouts.label_transitions`):
one phase of the forward model, with the real next state as the target behind actions that the warm start's inverse
model makes up, as many of them as SWIRL has samples, in as many updates on as many transitions. Unlike the
card's, all of the warm start's examples are labelled, and it ends early instead; nor are labels made noisier.
"""

import copy

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.data.train = config.data.validation = config.data.test = "task:transitions"
  config.data.task = dict(digits=2)
  config.rollout.templates = dict(forward="{state}+{action}=", inverse="{state}={next}+")
  config.rollout.max_tokens = 5
  config.rollout.episode = dict(name="imagine_next_states", samples=8)
  surrogate = dict(name="clipped_surrogate", low=0.2, high=0.2)
  config.objective = [surrogate, dict(name="kl", beta=0.04)]
  config.phases = ("sft", "rl", "inverse", "rl_again", "inverse_again")
  config.rl_again = copy.deepcopy(config.rl)
  for name in ("inverse", "inverse_again"):
    config[name] = copy.deepcopy(config.rl)
    config[name].rollout = dict(episode=dict(name="explain_transitions", samples=8))
    config[name].objective = [surrogate, dict(name="kl", beta=0.1)]
  return config


def get_evidence():
  own = get_config()
  return dict(
      reported="ByteMorph 43.4 -> 55.7 with shared weights (Liquid-7B)",
      warm={**{f"data.{split}": own.data[split] for split in ("train", "validation", "test")},
            "data.task": dict(digits=2, inverse=0.5), "rollout.max_tokens": 5,
            "sft.until.at_least": 0.5},
      overrides={"data.task": dict(digits=2), "rl.steps": 50, "rl.evaluate.every": 50},
      arms=dict(
          start=dict(overrides={"rl.optimizer.learning_rate": 0.0, "rl.steps": 10}),
          pseudo_labels=dict(overrides={
              "phases": ("rl",), "rl.steps": 200, "rollout.episode": dict(name="label_transitions", samples=8),
              "objective": [dict(name="cross_entropy")]})),
      claims=[
          dict(text="next states are predicted better, though no action was ever shown",
               metric="test/sampled_accuracy", expect="higher", baseline="start"),
          dict(text="and better than after supervised tuning on pseudo-labels", joint=True,
               metric="test/sampled_accuracy", expect="higher", baseline="pseudo_labels")])
