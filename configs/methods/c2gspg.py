"""C2GSPG: a policy gradient of whole answers that keeps confidence honest (arXiv:2509.23129).

Changes two things in GRPO: the objective (`objectives.confident_policy_gradient`), which weighs
answers by 1 / (1 - confidence) and pulls confidence to the verdict, and the advantage, which is
centred only and hands the term its targets (`advantages.target_confidence`). Reported (1.5B to 3B), Knights
and Knaves: accuracy 79, GRPO 38, GSPO 56; ECE 0.13, GRPO 0.5, GSPO 0.3. Small-scale check:
tests/methods/test_c2gspg.py.

Choices made, as the paper's constants are not known: beta 0.1, and 1 - confidence at least 0.05. One
update on each batch, without ratios.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.advantage = [dict(name="target_confidence"), dict(name="center_by_group")]
  config.objective = [dict(name="confident_policy_gradient", beta=0.1)]
  return config


def get_evidence():
  return dict(
      reported="Knights and Knaves accuracy 79, GRPO 38, GSPO 56; ECE 0.13, 0.5, 0.3",
      arms=dict(
          grpo=dict(config="configs/grpo.py"),
          uncalibrated=dict(overrides={"objective": [
              dict(name="confident_policy_gradient", beta=0.0)]})),
      claims=[
          dict(text="samples are better", metric="test/sampled_accuracy", expect="higher",
               baseline="grpo"),
          dict(text="confidence is nearer to the verdict than without calibration",
               metric="late/calibration_error", expect="lower", baseline="uncalibrated")])
