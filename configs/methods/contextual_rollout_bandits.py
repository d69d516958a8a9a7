"""CBS: a small bandit learns which rollouts to train on (arXiv:2602.08499).

Adds to GRPO an edit (`rollouts.replay.choose_rollouts`), which keeps a memory of four batches and chooses
half of them and of the fresh one together, and takes their advantages from it
(`advantages.stored_advantages`). Reported: consistent gains in accuracy and efficiency on six maths sets; no
figure that was read. Small-scale check: tests/methods/test_contextual_rollout_bandits.py.

The row is of the mode without memory, in which all arms have the same candidates and train on as many tokens.

Abstract and a review were read; features, network, exploration and numbers are choices. Entropy is the
sampler's mean of -log-probability, and log-probabilities under the current policy and ratios are no
features, as an edit runs no model.

Falls short of the card: no verdict is flipped at random, so no rollout is noise, and buffers are not
compared.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.rollout.edits = [dict(name="jaxrl.rollouts.replay:choose_rollouts", share=0.5, buffer=4)]
  config.advantage = [dict(name="stored_advantages")]
  return config


def get_evidence():
  def choose(rule):  # without a memory: the candidates are the fresh rollouts of all groups
    return {"rollout.edits": [dict(get_config().rollout.edits[0], rule=rule, buffer=0)]}
  return dict(
      reported="consistent gains on six maths sets (no figures read)",
      overrides=choose("bandit"),
      arms=dict(
          random_half=dict(overrides=choose("random")),
          largest_advantages=dict(overrides=choose("advantage"))),
      claims=[
          dict(text="the bandit's half is better than a random half", metric="test/sampled_accuracy",
               expect="higher", baseline="random_half"),
          dict(text="and than the half of largest advantages", metric="test/sampled_accuracy",
               expect="higher", baseline="largest_advantages")])
