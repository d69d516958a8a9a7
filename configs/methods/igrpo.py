"""iGRPO: the group sees the best of a few drafts (arXiv:2602.09000).

Changes one thing in GRPO: the episode (`rollouts.draft_then_refine`). Of the 8 completions that a
prompt gets there, 4 become drafts without a gradient and 4 are sampled behind the best draft, trained
on and compared. Evaluations ask the plain question. The paper's other settings (temperature 0.7, KL
0, learning rate 1e-6) belong to its models; its clip range is not stated and stays at 0.2. Reported:
mean of six maths sets 41.08 -> 45.04 (Nemotron-H-8B), 68.29 -> 69.87 (R1-Distill-Qwen-7B), against
GRPO. Small-scale check: tests/methods/test_igrpo.py.

The paper's template tells the model in words that the draft may be wrong. The toy's alphabet has no
words: its template writes the draft behind the question, and its warm start has seen such
questions with drafts that are as often wrong as right.

Falls short of the card: of its controls the row has the worst draft, not a random or an empty one, and
the entropy half-way is logged but not compared.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.rollout.episode = dict(name="draft_then_refine", drafts=4, samples=4)
  config.rollout.templates.refine = "{draft}="
  return config


def get_evidence():
  return dict(
      reported="mean of six maths sets 45.04, GRPO 41.08 (Nemotron-H-8B)",
      # A quarter of the questions come with a draft; copying those alone would reach 0.13.
      warm={"data.task": dict(digits=3, answer_format="reversed", drafts=0.25),
            "sft.until.at_least": 0.4, "sft.steps": 4000},
      overrides={"data.task": dict(digits=3, answer_format="reversed")},
      arms=dict(
          grpo=dict(config="configs/grpo.py"),
          worst_draft=dict(overrides={"rollout.episode.pick": "worst"})),
      claims=[
          dict(text="plain questions are answered better, 4 + 4 samples against 8",
               metric="test/sampled_accuracy", expect="higher", baseline="grpo"),
          dict(text="the best draft helps more than the worst", metric="test/sampled_accuracy",
               expect="higher", baseline="worst_draft")])
