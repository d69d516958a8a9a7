"""C2GSPG: a policy gradient of whole answers that keeps confidence honest (arXiv:2509.23129).

Changes two things in GRPO: the objective (`objectives.confident_policy_gradient`), which weighs
answers by 1 / (1 - confidence) and pulls confidence to the verdict, and the advantage, which is
centred only and hands the term its targets (`advantages.target_confidence`). Reported (1.5B to 3B), Knights
and Knaves: accuracy 79, GRPO 38, GSPO 56; ECE 0.13, GRPO 0.5, GSPO 0.3. Small-scale check:
tests/methods/test_c2gspg.py.

Choices made, as the paper's constants are not known: beta 0.1, and 1 - confidence at least 0.05. One
update on each batch, without ratios.

The row asks for calibration where verdicts are noisy: half of the questions have a sign in front, and to half
of these the verifier wants another answer than the sum, which nothing tells. So an answer to a signed question
is right half of the time at best, and a policy that is sure of one is too sure. Confidence is held against
verdicts in the batches of the last quarter of the updates (`rollouts.log_confidence`), in all arms alike; the
paper's ECE is of test answers. The problems are sums, not Knights and Knaves, and GSPO is not among the arms.
After 200 updates a quarter of the samples are right in all arms, where three quarters could be: confidence is
too high for want of skill more than for noise.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.advantage = [dict(name="target_confidence"), dict(name="center_by_group")]
  config.objective = [dict(name="confident_policy_gradient", beta=0.1)]
  return config


def get_evidence():
  task = "task:noisy_addition"
  return dict(
      reported="Knights and Knaves accuracy 79, GRPO 38, GSPO 56; ECE 0.13, 0.5, 0.3",
      warm={"data.train": task, "data.validation": task, "data.test": task,
            "data.task": dict(digits=2, signed=0.5, doubtful=0.5)},
      overrides={"rollout.edits": [dict(name="log_confidence")], "rl.evaluate.every": 50},
      arms=dict(
          grpo=dict(config="configs/grpo.py"),
          uncalibrated=dict(overrides={"objective": [
              dict(name="confident_policy_gradient", beta=0.0)]})),
      claims=[
          dict(text="samples are better", metric="test/sampled_accuracy", expect="higher",
               baseline="grpo"),
          dict(text="and confidence fits verdicts better", joint=True, metric="late/ece", expect="lower",
               baseline="grpo"),
          dict(text="than without calibration too", metric="late/ece", expect="lower",
               baseline="uncalibrated"),
          dict(text="at answers as good as without it", metric="test/sampled_accuracy",
               expect="not lower", margin=0.02, baseline="uncalibrated")])
