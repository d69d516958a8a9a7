"""PrefCleanBench: clean the labels of preference data, then train on it (arXiv:2509.23564).

Changes only the data: `config.data.transforms` may hold `clean`, a score (`transforms.preference_scores`:
judge, reward gap, committee, InsTag, and from files IFD or whatever a model said) and an action, remove
or flip, at a rate; 13 cleaners in all. `flip_labels` makes the noise whose recall can be measured.
Reported: no cleaner is best across data, models and optimisers. Small-scale check:
tests/methods/test_prefcleanbench.py.

Here the reward gap of a linear model, trained on the other half, turns a fifth of the labels around,
and a reward model learns from what comes out; held-out pairs have no noise. Choices made: 2-fold
cross-scoring; IFD removes what the prompt helps least, in the mean over both answers; tags of the toy
are words of the prompt.
"""

from configs import rlhf_toy

NOISE = dict(name="flip_labels", rate=0.2, splits=("train",))
CLEANER = dict(name="clean", score=dict(name="reward_gap"), action="flip", rate=0.2, splits=("train",))


def get_config():
  config = rlhf_toy.get_config("bradley_terry")
  config.data.task, config.data.task_size = dict(noise=0.0, sharpness=200.0), 2000
  config.data.transforms = [dict(NOISE), dict(CLEANER)]
  config.model.heads_on_top = (("score", 1),)
  return config


def get_evidence():
  def arm(**changes):
    return dict(overrides={"data.transforms": [NOISE, {**CLEANER, **changes}]})
  return dict(
      reported="no single cleaner is best across data, model and optimiser",
      warm=None,
      overrides={"evaluate.pairs": 1000, "evaluate.problems": 0, "evaluate.samples": 0},
      arms=dict(raw=dict(overrides={"data.transforms": [NOISE]}), removed=arm(action="remove"),
                too_much=arm(action="remove", rate=0.4)),
      measure="jaxrl.evaluation.cleaning:of_run",
      claims=[
          dict(text="cleaned by the reward gap, more held-out pairs are right",
               metric="test/pairs/preference_accuracy", expect="higher", baseline="raw"),
          dict(text="more of the labels are right", metric="measured/right_labels", expect="higher",
               baseline="raw"),
          dict(text="turning labels around, right more often than not, beats removing them",
               metric="test/pairs/preference_accuracy", expect="higher", baseline="removed"),
          dict(text="removing 40% hurts: more pairs are right after 20%", method="removed",
               metric="test/pairs/preference_accuracy", expect="higher", baseline="too_much")])
