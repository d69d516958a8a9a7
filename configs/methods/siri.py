"""SIRI: the length cap of rollouts shrinks and grows in cycles (arXiv:2509.25176).

Changes in GRPO the episode (`rollouts.capped_group`, whose cap is a "cosine-cycle" of
`jaxrl.schedule`) and, as the paper does, the clip range to 0.2 / 0.28. Checkpoints at the end of a
cycle are the paper's "high" ones, those half a cycle before its "low" ones. Reported,
R1-Distill-Qwen-1.5B on AIME24, accuracy / tokens: low 40.4 / 7093, high 43.6 / 10049, DAPO 42.8 /
10453. Small-scale check: tests/methods/test_siri.py.

The paper's caps are 16384 and 8192 and its cycle 640 updates, three times; the group size is not
stated. The toy has sums of 1 to 3 digits whose warm start writes a scratchpad for half of them,
caps of 12 tokens, which hold any scratchpad, and 6, which hold those of the shortest sums only,
and cycles of 60 updates. Losses are averaged over tokens, as DAPO's are.

Falls short of the card: its traces would hold re-checks that nobody needs; a cap that only falls, and short
cycles, are no arms.
"""

from configs import grpo

LONGEST, SHORTEST, CYCLE = 12, 6, 60


def get_config():
  config = grpo.get_config()
  config.data.train = config.data.validation = config.data.test = "task:scratchpad_addition"
  config.data.task = dict(shortest=1, longest=3, scratchpad=0.5)
  config.reward.criteria = [dict(name="in_span", label="correct", pattern=r"(?:\+\d*)?=(\d+)")]
  config.rollout.max_tokens = LONGEST
  config.rollout.episode = dict(
      name="capped_group", samples=8,
      max_tokens=dict(schedule="cosine-cycle", start=LONGEST, end=SHORTEST, steps=CYCLE))
  config.objective = [dict(name="clipped_surrogate", low=0.2, high=0.28)]
  config.aggregation.kind = "token_mean"
  config.rl.steps = 3 * CYCLE
  return config


def get_evidence():
  own = get_config()
  return dict(
      reported="AIME24 accuracy / tokens 43.6 / 10049, DAPO 42.8 / 10453 (R1-Distill-Qwen-1.5B)",
      overrides={"rl.steps": own.rl.steps},
      warm={"data.train": own.data.train, "data.validation": own.data.validation,
            "data.test": own.data.test, "data.task": own.data.task.to_dict(),
            "rollout.max_tokens": LONGEST,
            "reward.criteria": [dict(c) for c in own.reward.criteria]},
      arms=dict(
          longest=dict(overrides={"rollout.episode.max_tokens.end": LONGEST}),
          shortest=dict(overrides={"rollout.episode.max_tokens.start": SHORTEST})),
      claims=[
          dict(text="after three cycles answers are shorter than under the largest cap throughout",
               metric="test/greedy_tokens", expect="lower", baseline="longest"),
          dict(text="and as often right", joint=True, metric="test/sampled_accuracy", expect="not lower",
               margin=0.02, baseline="longest"),
          dict(text="they are right more often than under the smallest cap throughout",
               metric="test/sampled_accuracy", expect="higher", baseline="shortest")])
