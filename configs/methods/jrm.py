"""JRM: a reward model that also learns to write critiques, and never does (arXiv:2602.07533).

Adds to a Bradley-Terry model the cross-entropy of a critique behind each answer
(`objectives.critique_likelihood`, `data.critique`). The score is read where the answer ends, so judging costs
what it did. `evaluation.representation` measures the effective rank of the states it is read from. Reported:
state of the art on EditReward-Bench and MMRB2, a higher effective rank, steadier online RL (no figures read).
Small-scale check: tests/methods/test_jrm.py.

Only the abstract was read. Choices made: lambda 0.1, one score, critiques of both answers; the EOS of the
answer is the marker that the score is read at. Text alone: the toy judges worked sums, and critiques list
the wrong steps.
"""

from configs import bradley_terry


def get_config():
  config = bradley_terry.get_config()
  config.data.train = config.data.validation = config.data.test = "task:worked_sums"
  config.data.task_size = 8000  # fewer pairs are learnt by heart
  config.data.critique = "critique"
  config.comparisons.objective = [dict(name="bradley_terry"),
                                  dict(name="critique_likelihood", coefficient=0.1)]
  return config


def get_evidence():
  return dict(
      reported="state of the art on EditReward-Bench and MMRB2; higher effective rank (no figures read)",
      warm=None, overrides={"evaluate.problems": 0, "comparisons.steps": 600},
      measure="jaxrl.evaluation.representation:of_reward_model",
      arms=dict(
          preference=dict(overrides={"comparisons.objective": [dict(name="bradley_terry")],
                                     "data.critique": ""}),
          shuffled=dict(overrides={"data.task": dict(shuffled=True)})),
      claims=[
          dict(text="held-out pairs are told apart better than from preferences alone",
               metric="test/pairs/preference_accuracy", expect="higher", baseline="preference"),
          dict(text="the states that scores are read from use more directions",
               metric="measured/effective_rank", expect="higher", baseline="preference"),
          dict(text="critiques of other answers do not help so", baseline="shuffled",
               metric="test/pairs/preference_accuracy", expect="higher")])
