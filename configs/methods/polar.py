"""POLAR: a reward model compares with a reference, as one who tells policies apart (arXiv:2507.05197).

Changes in a Bradley-Terry model what it reads, "x reference x candidate" (`data.prompt_template`, with the
reference as a field of the row), and where pairs come from. Variant "pretrain": two answers of one policy of
a pool against one of another (`transforms.policy_pairs`), without a label. Variant "tune", which
`config.start` lets go on from there: three ranked answers, the best as the reference
(`transforms.ranked_triples`). In reinforcement learning the criterion `reward_model` takes the reference
from the task's row. Reported: average of 20 benchmarks after PPO 62.60 with 1.8B, 59.45 without
pre-training, Skywork-27B 58.34 (InternLM3-8B). Small-scale check: tests/methods/test_polar.py.

Choices made: the toy pool has 12 policies, habits of writing sums and of erring; answers are ranked by how
many of their digits are wrong, in 200 rows.
"""

from configs import bradley_terry

STAGES = dict(pretrain=dict(task=dict(), transform="policy_pairs", size=20_000),
              tune=dict(task=dict(ranked=True), transform="ranked_triples", size=200))


def get_config(stage: str = "tune"):
  if stage not in STAGES:
    raise ValueError(f"configs/methods/polar.py has no stage {stage!r}; there are {', '.join(STAGES)}")
  config = bradley_terry.get_config()
  config.data.train = config.data.validation = config.data.test = "task:habits"
  config.data.task, config.data.task_size = STAGES[stage]["task"], STAGES[stage]["size"]
  config.data.transforms = [dict(name=STAGES[stage]["transform"])]
  config.data.more, config.data.prompt_template = ("reference",), "{question}{reference}={question}"
  config.comparisons.optimizer.learning_rate = 1e-3 if stage == "pretrain" else 3e-4
  return config


def get_evidence():
  pool, own = get_config("pretrain"), get_config()
  warm = {f"data.{k}": pool.data[k] for k in ("train", "validation", "test", "more", "prompt_template",
                                             "max_prompt_tokens", "max_completion_tokens")}
  warm |= {"model.heads_on_top": (("score", 1),), "data.task": {}, "data.task_size": pool.data.task_size,
           "data.transforms": [dict(pool.data.transforms[0])], "evaluate.problems": 0, "evaluate.pairs": 500,
           "sft.kind": "reward", "sft.until": None, "sft.steps": 400, "sft.batch.examples": 64,
           "sft.objective": [dict(name="bradley_terry")], "sft.aggregation.kind": "sequence_mean"}
  tuned = {"data.task": dict(ranked=True), "data.task_size": own.data.task_size,
           "data.transforms": [dict(own.data.transforms[0])]}
  return dict(
      reported="average of 20 benchmarks after PPO 62.60, without pre-training 59.45 (1.8B, InternLM3-8B)",
      warm=warm, overrides=tuned,
      arms=dict(untrained=dict(overrides={"start": ""}),
                no_reference=dict(overrides={"start": "", "data.prompt_template": "{question}"})),
      claims=[
          dict(text="few rankings go further after pre-training on a pool of policies",
               metric="test/pairs/preference_accuracy", expect="higher", baseline="untrained"),
          dict(text="and further than without a reference or pre-training", baseline="no_reference",
               metric="test/pairs/preference_accuracy", expect="higher")])
