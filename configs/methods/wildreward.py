"""WildReward: an ordinal reward model from what users said next (arXiv:2602.08829).

  configs/methods/wildreward.py          trains the reward model on single rated answers
  configs/methods/wildreward.py:policy   online DPO with the best and worst of 8 samples by such a model,
                                         which --config.reward.criteria[0].run=WORKDIR names

`objectives.ordinal` is the loss, with one logit per threshold, and `jaxrl.data.feedback` makes ratings of
conversations: labels, hindsight, checked refusals, no neutral turns. Reported: RM-Bench hard 69.7,
Skywork-Reward-8B 49.3 (WildReward-8B); online DPO lifts the mean of six benchmarks from 58.1 to 62.6
(Llama-3.1-8B-Instruct). Small-scale check: tests/methods/test_wildreward.py.

The toy has synthetic users who rate sums by their wrong digits, each as strictly as they happen to be
(`tasks.rated_addition`). Thresholds have weights of their own, as in the public code; `ordered=True` with
heads ("score", 1), ("thresholds", 3) shares them. K = 4.
"""

from configs import base, online_dpo

STAGES = ("reward", "policy")


def get_config(stage: str = "reward"):
  if stage not in STAGES:
    raise ValueError(f"configs/methods/wildreward.py has no stage {stage!r}; there are {', '.join(STAGES)}")
  if stage == "policy":
    config = online_dpo.get_config()
    config.reward.criteria = [dict(name="reward_model", run="", levels=4, label="rating"),
                              dict(name="exact_match")]
    config.reward.aggregate = dict(name="weighted_sum", weights=dict(rating=1.0))
    config.evaluate.correct = "exact_match"
    return config
  config = base.get_config()
  config.data.train = config.data.validation = config.data.test = "task:rated_addition"
  config.data.task = dict(digits=2)
  config.data.task_size = 2000
  config.data.update(chosen="response", rejected="", columns=("label",))
  config.data.max_prompt_tokens = config.data.max_completion_tokens = 16
  config.tokenizer.alphabet = "0123456789+="
  config.model.update(layers=2, d_model=64, heads=4, kv_heads=2, d_ff=192, heads_on_top=(("rating", 3),))
  config.batch.row_length = 64
  config.optimizer.update(learning_rate=1e-3, b2=0.99, warmup_steps=20, weight_decay=0.01)
  config.evaluate.update(problems=0, pairs=300)
  config.phases = ("ratings",)
  config.ratings = dict(
      kind="reward", steps=400, batch=dict(examples=64), aggregation=dict(kind="sequence_mean"),
      objective=[dict(name="ordinal", levels=4)])
  return config


def get_evidence():
  return dict(
      reported="RM-Bench hard 69.7, Skywork-Reward-8B 49.3 (WildReward-8B)", warm=None,
      overrides={"evaluate.problems": 0, "evaluate.samples": 0},
      measure="jaxrl.evaluation.ratings:rating_quality",
      arms=dict(
          one_user=dict(overrides={"data.task": dict(digits=2, users=1)}),
          squares=dict(overrides={"ratings.objective": [
              dict(name="regress_attributes", labels=["label"])]})),
      claims=[
          dict(text="as many ratings of 16 users tell better answers more often than those of a strict one",
               metric="measured/pair_accuracy", expect="higher", baseline="one_user"),
          dict(text="scores rank answers to different questions better than those fitted by squares",
               metric="measured/rank_correlation", expect="higher", baseline="squares")])
