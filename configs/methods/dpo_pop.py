"""DPO-PoP: margins from preferences over preferences (arXiv:2509.22851).

Changes two things in DPO: rows are pairs of pairs, of which one preference was judged stronger
(`data.transforms.pairs_of_pairs`, `config.data.weaker`), and the loss of the stronger pair has the clipped
margin of the weaker one under a moving average of the policy (`objectives.dpo_pop`, `config.frozen`).
Reported: modest gains over DPO and over fixed and gold margins in accuracy and AlpacaEval 2 (Llama,
UltraFeedback; no intervals). Small-scale check: tests/methods/test_dpo_pop.py.

Only the abstract and reviews were read. Choices made: the weaker pair gets the loss of DPO, the average
moves by 0.01 per update, margins end at 5, one comparison per pair, and the pairs are drawn at random
(`scheme="iterative"` favours weak ones). The toy's pairs are words with more and fewer of a letter, labelled
rightly, and who is stronger comes from their gold rewards.
"""

from configs import dpo


def get_config():
  config = dpo.get_config()
  config.data.train = config.data.validation = config.data.test = "task:letters"
  config.data.task = dict(sharpness=100.0, noise=0.0)
  config.data.task_size = 4000
  config.data.weaker = "weaker"
  config.data.transforms = [dict(name="pairs_of_pairs", gap="gap", scheme="random", times=1)]
  config.tokenizer.alphabet = "abcdefgh:"
  config.rollout.max_tokens = 12
  config.reward.criteria = [dict(name="jaxrl.tasks.letters:gold", label="gold")]
  config.sft.steps, config.sft.until = 200, None
  config.frozen = dict(average=dict(every=1, decay=0.99))
  config.preference.batch.examples = 32
  config.preference.objective = [dict(name="dpo_pop", beta=0.1, most=5.0)]
  return config


def get_evidence():
  own = get_config()
  plain = {"data.weaker": "", "data.transforms": [], "frozen": {}, "preference.batch.examples": 64}
  return dict(
      reported="modest gains over DPO, and over fixed and gold margins (Llama, UltraFeedback)",
      overrides={"preference.steps": 200, "evaluate.pairs": 400, "evaluate.samples": 0, "evaluate.problems": 0},
      warm={"data.train": own.data.train, "data.validation": own.data.validation, "data.test": own.data.test,
            "data.task": own.data.task.to_dict(), "data.task_size": own.data.task_size,
            "tokenizer.alphabet": own.tokenizer.alphabet, "rollout.max_tokens": own.rollout.max_tokens,
            "reward.criteria": [dict(c) for c in own.reward.criteria],
            "sft.steps": own.sft.steps, "sft.until": None},
      measure="jaxrl.evaluation.implicit_rewards:of_gaps",
      arms=dict(
          dpo=dict(overrides={**plain, "preference.objective": [dict(name="dpo", beta=0.1)]}),
          gold_margin=dict(overrides={
              **plain, "data.columns": ("gap",),
              "preference.objective": [dict(name="dpo", beta=0.1, margin="gap")]})),
      claims=[
          dict(text="margins follow the true gaps more than those of DPO",
               metric="measured/gap_correlation", expect="higher", baseline="dpo"),
          dict(text="pairs are ordered rightly more often than by DPO", metric="measured/accuracy",
               expect="higher", baseline="dpo"),
          dict(text="and more often than with true gaps as margins", metric="measured/accuracy",
               expect="higher", baseline="gold_margin"),
          dict(text="those of the smallest gaps too", metric="measured/weakest_accuracy", expect="higher",
               baseline="dpo")])
