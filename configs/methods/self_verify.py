"""Learning to Self-Verify: every fifth update judges the policy's own answers (arXiv:2602.07594).

Changes the episode of GRPO (`rollouts.answer_or_verify`) and adds an edit that remembers what is to be
judged (`rollouts.self_verification.collect_answers`), and clip-higher with a dual clip and a mean over
tokens, as in the released code. This is Verify-Alter; `train_answers=False` learns from judgements alone.
Reported, mean of six maths sets: Generate 20.2, Verify-Alter 22.7 (Qwen2.5-1.5B), 28.5 and 29.4 (3B), 38.9
and 40.3 (7B). Small-scale check: tests/methods/test_self_verify.py.

Only final answers are judged, as in the release. The toy asks 123+456=975+ and wants 1 or 0; its warm
start has seen such questions. An update of judgements has as many samples as one of answers. In the
paper it comes beside the fifth step of answers; here a batch is of one kind, so four updates in five are of
answers. Falls short of the card: verdicts on held-out answers, other intervals, and votes weighed by verdicts
are not compared.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.rollout.episode = dict(name="answer_or_verify", samples=8, interval=5, yes="1", no="0")
  config.rollout.templates.verify = "{question}{answer}+"
  config.rollout.edits = [dict(name="jaxrl.rollouts.self_verification:collect_answers", interval=5)]
  config.objective = [dict(name="clipped_surrogate", low=0.2, high=0.28, dual_clip=10.0)]
  config.aggregation.kind = "token_mean"
  return config


def get_evidence():
  own = get_config()
  return dict(
      reported="mean of six maths sets 22.7, generation alone 20.2 (Qwen2.5-1.5B)",
      # A third of the questions want verdicts, of which a constant gets half right.
      warm={"data.task": dict(digits=3, answer_format="reversed", verdicts=0.33),
            "sft.until.at_least": 0.4, "sft.steps": 4000},
      overrides={"data.task": dict(digits=3, answer_format="reversed")},
      arms=dict(generate=dict(config="configs/grpo.py", overrides={
          "objective": [dict(c) for c in own.objective], "aggregation.kind": "token_mean"})),
      claims=[
          dict(text="answers get better than when answering alone is trained, at as many samples",
               metric="test/sampled_accuracy", expect="higher", baseline="generate")])
