"""OPE: parallel answers, each behind an outline of its own (arXiv:2602.08344).

Changes one thing in GRPO: the episode (`rollouts.outlines_then_paths`), which writes outlines in
one sequence, a path behind each, and trains outlines and paths in turn. Reported: better than
sampling paths independently on hard maths sets under several ways to aggregate, with shorter right
answers; no figure that was read. Small-scale check: tests/methods/test_ope.py.

Only the abstract and digests were read. Choices made: half of an outline set's reward is the
majority, half the mean path; 0.1 for outlines that can be continued and against repeated ones;
turns of 10 updates instead of 2-3 rounds; no aggregation pass. The toy's outline is the first digit
of a sum as it is written, so that outline and path together are a plain answer and need no cold
start of their own. An update takes 8 paths per problem, as GRPO's takes 8 answers, and 1 or 4 sets
of two outlines beside them.

Falls short of the card: outlines are not operations of Countdown, and training both kinds in every update
is no arm.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.rollout.episode = dict(
      name="outlines_then_paths", samples=8, outlines=2, sets=4, outline_tokens=1, separator="+",
      train="alternate", period=10)
  return config


def get_evidence():
  return dict(
      reported="better than independent paths on hard maths sets (figures not read)",
      arms=dict(
          grpo=dict(config="configs/grpo.py"),
          paths_only=dict(overrides={"rollout.episode.train": "paths"})),
      claims=[
          dict(text="plain answers get better than with independent ones",
               metric="test/sampled_accuracy", expect="higher", baseline="grpo"),
          dict(text="turns are no worse than training paths alone",
               metric="test/sampled_accuracy", expect="not lower", margin=0.02,
               baseline="paths_only")])
