"""SVSL-P: the value systems of a society, from comparisons alone (arXiv:2602.08835).

Changes the loss and the heads of a reward model: `objectives.value_systems` learns one head per value from
comparisons by value, and assigns annotators to few weightings of them by their overall comparisons. Reported:
higher representativeness and conciseness than preference-based multi-objective RL, at comparable hypervolume
(figures not read). Small-scale check: tests/methods/test_pbmorl_value_systems.py, with a grid world.

Only the abstract and reviews were read. Choices made: hard assignments, one gradient step of the weights per
batch, softmax weights, clusters that begin near one value each. `evaluation.value_systems` has the metrics, and
the same clustering for values that are known. Policies per cluster are those of a reward model with mixed heads.
"""

from configs import rlhf_toy


def get_config():
  config = rlhf_toy.get_config("bradley_terry")
  config.data.train = config.data.validation = config.data.test = "task:societies"
  config.data.task_size = 20_000
  config.data.columns = ("agent", "value")
  config.model.heads_on_top = (("values", 3),)
  config.comparisons.objective = [dict(name="value_systems", values=3, clusters=3)]
  return config


def get_evidence():
  return dict(
      reported="higher representativeness and conciseness (figures not read)",
      warm=None, overrides={"evaluate.problems": 0, "evaluate.samples": 0, "evaluate.pairs": 500},
      measure="jaxrl.evaluation.value_systems:parts_found",
      arms=dict(
          one=dict(overrides={"comparisons.objective": [dict(name="value_systems", values=3, clusters=1)]}),
          ungrounded=dict(overrides={"data.task": dict(overall=1.0)})),
      claims=[
          dict(text="clusters stand for their members better than one weighting for all",
               metric="test/pairs/preference_accuracy", expect="higher", baseline="one"),
          dict(text="annotators are put with those who think alike", metric="measured/adjusted_rand",
               expect="higher", baseline="one"),
          dict(text="comparisons by value are needed to find what is weighed",
               metric="measured/weight_cosine", expect="higher", baseline="ungrounded")])
