"""RPO (RE-PO): which labels are right is inferred by EM beside the policy (arXiv:2509.24159).

Changes one thing in DPO: its loss stands inside `objectives.rpo`, which weighs both orientations of every
pair by the probability that its label is right, and keeps the reliability of every annotator in the state.
The same wrapper takes IPO, CPO and SimPO. Reported, AlpacaEval 2 LC of Llama-3-8B, standard / label
smoothing / robust: DPO 40.8 / 41.3 / 44.1, IPO 43.6 / 40.3 / 48.3. Small-scale check:
tests/methods/test_rpo_em.py.

Only the abstract and a digest were read. Choice made: the weights are those of the policy as it is. The
toy's two annotators exchange 5% and 45% of their answers, at random; held-out pairs are labelled rightly.
"""

from configs import dpo

ANNOTATORS = (0.05, 0.45)  # share of wrong labels of each


def get_config():
  config = dpo.get_config()
  config.data.task.annotators = ANNOTATORS
  config.data.held_out_task = dict(annotators=(0.0,) * len(ANNOTATORS))
  config.data.columns = ("annotator",)
  config.preference.objective = [dict(
      name="rpo", loss=dict(name="dpo", beta=0.1), reliability=0.9, rate=0.1, annotator="annotator",
      annotators=len(ANNOTATORS))]
  return config


def get_evidence():
  own = get_config()
  return dict(
      reported="AlpacaEval 2 LC: DPO 40.8, smoothed 41.3, robust 44.1 (Llama-3-8B)",
      overrides={"preference.steps": 300, "evaluate.pairs": 400, "evaluate.samples": 0},
      warm={"data.train": own.data.train, "data.validation": own.data.validation, "data.test": own.data.test,
            "data.task": own.data.task.to_dict(), "data.held_out_task": own.data.held_out_task.to_dict()},
      arms=dict(
          dpo=dict(overrides={"preference.objective": [dict(name="dpo", beta=0.1)]}),
          smoothed=dict(overrides={
              "preference.objective": [dict(name="dpo", beta=0.1, label_smoothing=0.1)]})),
      claims=[
          dict(text="rightly labelled pairs are ordered rightly more often than by DPO",
               metric="test/pairs/preference_accuracy", expect="higher", baseline="dpo"),
          dict(text="and more often than with label smoothing", metric="test/pairs/preference_accuracy",
               expect="higher", baseline="smoothed"),
          dict(text="and with larger margins than by DPO", metric="test/pairs/preference_margin",
               expect="higher", baseline="dpo")])
