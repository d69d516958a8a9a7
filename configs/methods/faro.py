"""Faro: a reward model under constraints of fairness (arXiv:2602.07799).

Adds `objectives.fairness` to the loss of a reward model: multipliers rise while groups are treated unequally,
and their weight pulls the rates of groups together. Reported: less demographic bias and fewer harmful
generations at kept quality (figures not read). Small-scale check: tests/methods/test_faro.py.

Only the abstract was read. Choices made: s(r(y1) - r(y2)) as the proxy and [r(y1) > r(y2)] as the rate that
counts, one constraint per group against the mean of all ("anchored"), tolerance 0.02, multipliers by gradient
ascent at 0.05 up to 10, running means with 0.95. The toy's judges lean to one kind of word where the question is
about one group, and against it for the other; held-out labels lean to nothing.
"""

from configs import rlhf_toy


def get_config():
  config = rlhf_toy.get_config("bradley_terry")
  config.data.train = config.data.validation = config.data.test = "task:leanings"
  config.data.held_out_task = dict(lean=0.0)
  config.data.update(answers="answers", chosen="text", rejected="", preference="preference",
                     columns=("first", "group"))
  config.tokenizer.alphabet = "abcdefghxy:"
  config.model.heads_on_top = (("score", 1),)
  config.comparisons.objective = [dict(name="bradley_terry"), dict(name="fairness", notion="parity")]
  return config


def get_evidence():
  ranking = dict(name="bradley_terry")
  return dict(
      reported="less demographic bias at kept quality (figures not read)",
      warm=None, overrides={"evaluate.problems": 0, "evaluate.samples": 0, "evaluate.pairs": 500},
      arms=dict(
          bradley_terry=dict(overrides={"comparisons.objective": [ranking, dict(name="fairness", rate=0.0)]}),
          lagrangian=dict(overrides={"comparisons.objective": [ranking, dict(name="fairness", dual="proxy")]})),
      claims=[
          dict(text="groups are treated more equally", metric="late/violation", expect="lower",
               baseline="bradley_terry"),
          dict(text="unbiased labels are predicted as well", joint=True, metric="test/pairs/preference_accuracy",
               expect="not lower", margin=0.01, baseline="bradley_terry"),
          dict(text="true rates for the multipliers hold the constraint more tightly",
               metric="late/violation", expect="lower", baseline="lagrangian")])
