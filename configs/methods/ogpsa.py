"""OGPSA: safety training off the gradients of general ability (arXiv:2602.07892).

Changes the gradient of DPO: `transforms.project_out_references` removes from it what would change the loss on
general pairs, whose gradient is taken again every 5 updates. Reported: SimpleQA 3.03 and IFEval 63.96 after
SFT and DPO on safety data, without projection 0.53 and 51.94 (Qwen2.5-7B-Instruct). Small-scale check:
tests/methods/test_ogpsa.py.

The DPO stage alone, on a run that can add: `--config.start=RUN`. Questions with a sign in front are to be
refused, the general pairs are sums, and problems for evaluation are plain sums. Choices made: the paper's
refresh interval, beta and number of references, projection per tensor before clipping and AdamW, as in its
code. Variants are arguments of the piece (`rank`, `variant`, `per_tensor`, `on`).
"""

from configs import dpo


def get_config():
  config = dpo.get_config()
  config.data.train = config.data.validation = config.data.test = "task:guarded_addition"
  config.data.task = dict(digits=3, answer_format="reversed", forbidden=1.0)
  config.data.held_out_task = dict(forbidden=0.0)
  config.phases = ("preference",)
  config.preference.objective = [dict(name="dpo", beta=0.2)]
  general = dict(data=dict(train="task:preferred_addition"), examples=200)
  config.preference.optimizer.transforms = [
      dict(name="project_out_references", references=[general], every=5)]
  return config


def get_evidence():
  (projection,) = get_config().preference.optimizer.transforms
  general = dict(projection)["references"]
  sums = dict(kind="sft", data=dict(train="task:addition", task=dict(answer_format="reversed")),
              objective=[dict(name="cross_entropy")], aggregation="token_mean", examples=200)
  return dict(
      reported="after SFT and DPO on safety data SimpleQA 3.03, IFEval 63.96; without projection 0.53, "
               "51.94 (Qwen2.5-7B-Instruct)",
      # Refusals are learnt by then; after 100 updates, no arm gets more than a sum in a hundred right.
      overrides={"preference.steps": 15, "preference.optimizer.warmup_steps": 3, "evaluate.samples": 0},
      arms=dict(
          dpo=dict(overrides={"preference.optimizer.transforms": []}),
          two=dict(overrides={"preference.optimizer.transforms": [
              dict(name="project_out_references", every=5, references=[*general, sums])]})),
      claims=[
          dict(text="sums are right more often after training on refusals",
               metric="test/greedy_accuracy", expect="higher", baseline="dpo"),
          dict(text="refusals are preferred as much", joint=True, metric="late/preference_accuracy",
               expect="not lower", margin=0.02, baseline="dpo"),
          dict(text="two references keep more than one", metric="test/greedy_accuracy", method="two",
               expect="higher", baseline="method")])
