"""COMPASS: votes weighed by confidence, and paths scored by decisiveness (arXiv:2510.17923).

Changes one thing in GRPO: the reward, which reads no label. The edit
`rollouts.semantic.number_answers` says which answers agree, and `advantages.score_by_confidence`
makes rewards of a weighted vote and of the policy's decisiveness. Reported, TTRL -> COMPASS: AIME24
15.8 -> 18.3, MATH-500 72.4 -> 73.1 (Qwen2.5-Math-1.5B), AIME24 6.7 -> 3.5 (Llama-3.2-1B). Small-scale
check: tests/methods/test_compass.py.

Choices made, as only the abstract and digests were read: confidence is exp(+std), deviations are over
the whole answer, paths are normalised to [0, 1], both weights are 1. The paper trains on the prompts
that it tests on; here they are others. `kappa=0` and `path_weight=0` is TTRL.

Falls short of the card: neither kappa=-1 nor paths alone (`answer_weight=0`) are arms.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.rollout.edits = [dict(name="jaxrl.rollouts.semantic:number_answers")]
  config.advantage = [dict(name="score_by_confidence"), *config.advantage]
  return config


def get_evidence():
  credit = [dict(name="center_by_group"), dict(name="scale_by_group_std")]
  return dict(
      reported="MATH-500 72.4 (TTRL) -> 73.1, AIME24 15.8 -> 18.3 (Qwen2.5-Math-1.5B)",
      arms=dict(
          ttrl=dict(overrides={"advantage": [
              dict(name="score_by_confidence", kappa=0.0, path_weight=0.0), *credit]}),
          start=dict(config="configs/grpo.py", overrides={"rl.optimizer.learning_rate": 0.0})),
      claims=[
          dict(text="samples are better than with a plain majority", metric="test/sampled_accuracy",
               expect="higher", baseline="ttrl"),
          dict(text="and better than before", metric="test/sampled_accuracy", expect="higher",
               baseline="start"),
          dict(text="the winner of the vote is right more often", metric="mean/pseudo_label_right",
               expect="higher", baseline="ttrl")])
