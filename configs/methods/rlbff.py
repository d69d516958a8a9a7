"""RLBFF: does a response satisfy a principle, yes or no? (arXiv:2509.21319).

Changes in a Bradley-Terry model what it is asked: `data.solution_template` writes a principle, a field of
the row, behind every response, the score is the log-odds of two tokens there (`model.verdict`), and the
loss is that of the label (`objectives.binary_label`; `full=True` for a softmax over all tokens). A user may
set another principle at any time; a policy that is trained against the model (criterion `reward_model` with
head="yes_no") does not see it. `data.agreed_principles` is the consensus filter of the data. Reported:
RM-Bench / JudgeBench 83.6 / 76.3, Bradley-Terry on the same data 78.5 / 68.9 (70B). Small-scale check:
tests/methods/test_rlbff.py.

Only the abstract and a digest were read. Choices made: the two-way softmax, one yes and one no for each
principle and pair. The generative judge, which thinks before its verdict, is not here. The toy has strings
of digits and five principles that conflict.
"""

from configs import bradley_terry


def get_config():
  config = bradley_terry.get_config()
  config.data.train = config.data.validation = config.data.test = "task:principles"
  config.data.more, config.data.solution_template = ("principle",), "{solution}+{principle}="
  config.data.held_out_task = dict(conflicts=True, principles="01234")
  config.model.heads_on_top, config.model.verdict = (), ("1", "0")
  config.comparisons.objective = [dict(name="binary_label")]
  return config


def get_evidence():
  plain = {"data.solution_template": "{solution}", "model.heads_on_top": (("score", 1),), "model.verdict": (),
           "comparisons.objective": [dict(name="bradley_terry")]}
  return dict(
      reported="RM-Bench / JudgeBench 83.6 / 76.3, Bradley-Terry 78.5 / 68.9 (Llama-3.3-70B-Instruct)",
      warm=None, overrides={"evaluate.problems": 0},
      arms=dict(bradley_terry=dict(overrides=plain),
                one_principle=dict(overrides={"data.task": dict(principles="3")})),
      claims=[
          dict(text="pairs whose principles conflict are told apart better", baseline="bradley_terry",
               metric="test/pairs/preference_accuracy", expect="higher"),
          dict(text="many principles in training serve better than one", baseline="one_principle",
               metric="test/pairs/preference_accuracy", expect="higher")])
