"""CE-PO: rewards mix correctness with how strongly a rationale carries the answer (arXiv:2509.23095).

Changes one thing in GRPO: the episode (`rollouts.influence_rewarded`), whose reward is a power mean,
p = 0.2 with weights 0.7, 0.1, 0.1, 0.1, of correctness and three scores of influence, read off
gradients under the frozen reference. Reported: accuracy 5.49% above the mean of its baselines on four
data sets, up to 9.58% (Llama-3-8B, Qwen3-4B family). Small-scale check: tests/methods/test_ce_po.py.

Choices made: the scorer is the reference of the phase, and not another model; correctness is the
verifier's verdict, where the release grades similarity. The toy has no words, so tokens are shuffled.
Its rationale is the sum from its last digit: 123+456= is answered +975=579.

Prompt, rationale and answer stand as they were sampled, without <eos> between them. Falls short of the
card: no cue gives the toy's answers away, so the row cannot say what happens when one turns false.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.data.train = config.data.validation = config.data.test = "task:scratchpad_addition"
  config.data.task = dict(shortest=3, longest=3, scratchpad=1.0)
  config.rollout.max_tokens = 12
  config.rollout.episode = dict(name="influence_rewarded", samples=8, answer=r"=(\d+)$", draws=4,
                                power=0.2, weights=(0.7, 0.1, 0.1, 0.1), unit="token")
  config.reward.criteria = [dict(name="in_span", label="correct", pattern=r"(?:\+\d*)?=(\d+)")]
  return config


def get_evidence():
  own = get_config()
  return dict(
      reported="accuracy 5.49% above the mean of its baselines on four data sets",
      overrides={"rl.steps": 60, "rl.rollout.prompts": 16},  # 19 gradients for each sample take their time
      warm={**{f"data.{split}": own.data[split] for split in ("train", "validation", "test")},
            "data.task": own.data.task.to_dict(), "rollout.max_tokens": own.rollout.max_tokens,
            "reward.criteria": [dict(c) for c in own.reward.criteria]},
      arms={"accuracy alone": dict(overrides={"rollout.episode.weights": (1.0, 0.0, 0.0, 0.0)}),
            "no counterfactuals": dict(overrides={"rollout.episode.hardened": False})},
      claims=[
          dict(text="answers are right more often than with accuracy alone",
               metric="test/sampled_accuracy", expect="higher", baseline="accuracy alone"),
          dict(text="the rationale carries the answer more",
               metric="late/criteria/influence_xy", expect="higher", baseline="accuracy alone"),
          dict(text="and more often than without counterfactuals",
               metric="test/sampled_accuracy", expect="higher", baseline="no counterfactuals")])
