"""PCRM: score gaps in proportion to how different two answers are (arXiv:2404.00978).

Changes the loss of a reward model: `objectives.bounded_bradley_terry` pulls the gap of a pair back to half a
cap, which falls with the similarity of the answers. Reported: better rank correlation with people and better
alignment by bounded rewards, also as a loss of DPO (no figures were read). Small-scale check:
tests/methods/test_pcrm.py.

Choices made: similarity by length ratio from the first differing token, b1 = 20 and b3 = -15 as for dialogue,
and scores of last tokens, with `where="every"` as in the paper's code. A cosine of embeddings is any column
(`similarity`); in DPO the same loss is `bounded_dpo`.
"""

from configs import rlhf_toy


def get_config():
  config = rlhf_toy.get_config("bradley_terry")
  config.comparisons.objective = [dict(name="bounded_bradley_terry")]
  return config


def get_evidence():
  return dict(
      reported="better rank correlation with people through bounded rewards (no figures read)",
      warm=None,
      overrides={"data.task_size": 2000, "evaluate.problems": 0, "evaluate.samples": 0, "evaluate.pairs": 500},
      arms=dict(
          bradley_terry=dict(config="configs/rlhf_toy.py:bradley_terry"),
          lower_cap=dict(config="configs/rlhf_toy.py:bradley_terry", overrides={
              "comparisons.objective": [dict(name="bounded_bradley_terry", cap=2.5)]})),
      claims=[
          dict(text="gaps stay smaller than those of the ranking loss",
               metric="test/pairs/preference_margin", expect="lower", baseline="bradley_terry"),
          dict(text="held-out pairs are ranked as well", joint=True, metric="test/pairs/preference_accuracy",
               expect="not lower", margin=0.02, baseline="bradley_terry"),
          dict(text="gaps follow the cap: with half of it they are smaller", metric="test/pairs/preference_margin",
               expect="higher", baseline="lower_cap")])
