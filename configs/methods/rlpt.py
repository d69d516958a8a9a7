"""RLPT: segments of documents are predicted, and the document is the judge (arXiv:2509.19249).

Changes in GRPO the episode (`rollouts.predict_segments`: half of the documents are continued, half
have a gap filled) and the reward (`rewards.continues_text`: a prediction may go on through the next
few segments). No question, and no answer to one, is used. Reported: Qwen3-4B MMLU-Pro 59.7 -> 64.8,
GPQA-Diamond 31.3 -> 39.4, AIME24 20.6 -> 27.2 from its cold start. Small-scale check:
tests/methods/test_rlpt.py.

The judge is a comparison of strings. lambda and the number of segments in the reference are not
stated: 0.5, on the loss of gaps, and 3. The toy's documents are task:series, 123+456+579+035+...+,
in which every term is the sum of the two before; 123+456+ is continued 975=579, thought, tag and
prediction, and 123+456+=035+ is the same with the gap in front of 035. The cold start predicts one
to three terms. The first two terms, which nothing determines, are no targets.

Falls short of the card: lambda is not swept, no question that the documents never ask is asked, and no
reinforcement with answers follows.
"""

from configs import grpo

SEGMENT = r"\d+\+?"


def get_config():
  config = grpo.get_config()
  config.data.train = config.data.validation = config.data.test = "task:series"
  config.data.task = dict(digits=3, terms=6, missing=0.5)
  config.data.max_prompt_tokens = config.data.max_completion_tokens = 32
  config.rollout.max_tokens = 16
  config.rollout.templates = {"continue": "{context}", "fill": "{context}={following}"}
  config.rollout.episode = dict(name="predict_segments", samples=8, segments=SEGMENT,
                                field="document", middle=0.5, middle_weight=0.5, first=3)
  predicted = dict(name="continues_text", pattern=r"\d*=(.+)", segments=SEGMENT, ends="+")
  config.reward.criteria = [dict(predicted, label="prefix", window=3),
                            dict(predicted, label="exact", window=1)]
  config.reward.aggregate = dict(name="weighted_sum", weights=dict(prefix=1.0, exact=0.0))
  return config


def get_evidence():
  own = get_config()
  return dict(
      reported="MMLU-Pro 59.7 -> 64.8, AIME24 20.6 -> 27.2 from the cold start (Qwen3-4B)",
      warm={**{f"data.{split}": own.data[split] for split in ("train", "validation", "test")},
            "data.task": own.data.task.to_dict(), "data.max_prompt_tokens": 32,
            "data.max_completion_tokens": 32, "rollout.max_tokens": own.rollout.max_tokens,
            "reward.criteria": [dict(c) for c in own.reward.criteria],
            "reward.aggregate": own.reward.aggregate.to_dict(), "sft.steps": 4000},
      arms=dict(
          cold_start=dict(overrides={"rl.optimizer.learning_rate": 0.0}),
          exact=dict(overrides={"reward.aggregate.weights": dict(prefix=0.0, exact=1.0)})),
      claims=[
          dict(text="series are continued and filled better than after the cold start",
               metric="test/sampled_accuracy", expect="higher", baseline="cold_start"),
          dict(text="more is learnt from as many samples than if one segment had to be met exactly",
               metric="mean/validation/greedy_accuracy", expect="higher", baseline="exact"),
          dict(text="more samples are rewarded", metric="mean/reward", expect="higher",
               baseline="exact")])
