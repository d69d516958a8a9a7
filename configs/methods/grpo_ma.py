"""GRPO-MA: several answers to every thought (arXiv:2509.24494).

Changes one thing in GRPO: the episode (`rollouts.answers_to_thoughts`), which branches after the
thought and gives thoughts the mean reward of their answers; thoughts and answers are then two
groups for the parent's credit pieces. Reported: fewer gradient spikes and higher accuracy than GRPO
on maths, code and multimodal tasks, growing with the number of answers. Small-scale check:
tests/methods/test_grpo_ma.py.

Only the abstract and descriptions of the paper were read. Choices made: K = 4 thoughts with M = 4
answers each; answers are compared with all K * M of their prompt; standard deviations divide by
n - 1; both parts of the loss weigh the same. The toy writes no thoughts: the first two digits of a
sum stand for one. To compare, `group` with samples=4 has as many thoughts, with 16 as many answers.

Falls short of the card: gradients are not compared with an oracle's, nor their spikes counted.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.rollout.episode = dict(name="answers_to_thoughts", samples=16, thoughts=4,
                                thought_tokens=2)
  config.advantage = [dict(name="center_by_group"), dict(name="scale_by_group_std", epsilon=1e-6)]
  return config


def get_evidence():
  return dict(
      reported="higher accuracy and fewer gradient spikes than GRPO; no figure read",
      arms=dict(
          four_samples=dict(config="configs/grpo.py", overrides={"rollout.episode.samples": 4}),
          sixteen_samples=dict(config="configs/grpo.py", overrides={"rollout.episode.samples": 16})),
      claims=[
          dict(text="four answers to each of four thoughts teach more than one",
               metric="test/sampled_accuracy", expect="higher", baseline="four_samples"),
          dict(text="and as much as sixteen answers with a thought each",
               metric="test/sampled_accuracy", expect="not lower", margin=0.02,
               baseline="sixteen_samples")])
