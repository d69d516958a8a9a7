"""CLPO: the policy rewrites what it finds hard, and answers that too (arXiv:2509.25004).

Changes in GRPO the episode (`rollouts.rewrite_and_answer`), which adds a rewritten question for hard
and middling ones and leaves out groups without a contrast, and adds a KL term that is half as strong
for hard questions (`objectives.kl(weight=...)`); `rollouts.rewriting.log_rescues` logs what rewriting adds.
Reported, mean of eight sets (Qwen3-8B): GRPO 62.0, DAPO 64.5, CLPO 73.7. Small-scale check:
tests/methods/test_clpo.py.

In the released code original hard questions may keep the whole KL; here old and new ones have half.
The toy's rewriting swaps the operands: =123+456= is answered 456+123=, which its warm start has seen;
simplifying and varying are one thing there, and the answer is not shown. One arm has the operands
swapped by a rule, the rewriter that the policy's own can at best be as good as.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.rollout.episode = dict(name="rewrite_and_answer", samples=8, rewrite_tokens=9)
  config.rollout.templates = dict(simplify="={question}", vary="={question}", rewritten="{question}")
  config.rollout.edits = [dict(name="jaxrl.rollouts.rewriting:log_rescues")]
  config.objective = [*config.objective, dict(name="kl", beta=1e-3, weight="kl_weight")]
  return config


def get_evidence():
  return dict(
      reported="mean of eight sets 73.7, GRPO 62.0, DAPO 64.5 (Qwen3-8B)",
      # A quarter of the questions want rewritings, which are soon learned.
      warm={"data.task": dict(digits=3, answer_format="reversed", rewrites=0.25),
            "sft.until.at_least": 0.45, "sft.steps": 4000},
      overrides={"data.task": dict(digits=3, answer_format="reversed")},
      arms=dict(filter_only=dict(overrides={"rollout.episode.mode": "none",
                                            "rollout.episode.samples": 16}),
          oracle=dict(overrides={"rollout.episode.oracle": (r"^(\d+)\+(\d+)=$", r"\2+\1=")})),
      claims=[
          dict(text="answers get better than with twice the samples and no rewriting",
               metric="test/sampled_accuracy", expect="higher", baseline="filter_only"),
          dict(text="but not as good as with rewritings by an oracle", metric="test/sampled_accuracy",
               expect="lower", baseline="oracle")])
