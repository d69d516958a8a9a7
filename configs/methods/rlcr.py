"""RLCR: answers state how sure they are, and a bounded proper rule scores it (arXiv:2507.16806).

Changes GRPO in the reward, 0.5 each for form, right answer and Brier score (`rewards.confidence`),
and as the released code does in the advantage, which is centred only, and the loss, a mean over
tokens. `rlcr.py:rlvr` is the baseline: the same form, the confidence left unrewarded. The code's
mask for truncated completions is left out: they do not have the form. Metrics of calibration are
those of `rollouts.calibration`. Reported, HotpotQA (Qwen2.5-7B): accuracy / ECE 0.444 / 0.078,
without confidence 0.460 / 0.540. Small-scale check: tests/methods/test_rlcr.py.

The toy writes a sum, "=" and three digits: 123+456=975=250 is a confidence of 250 / 999. Its warm
start imitates three digits that say nothing, those of the first operand.

Groups have 8 answers instead of 32. Falls short of the card: the toy's inputs are not corrupted, so that
nothing says which confidence is right, and votes are weighed in the test only.
"""

from configs import grpo

PATTERN = r"(?P<answer>\d+)=(?P<confidence>\d{3})"


def get_config(variant: str = ""):
  config = grpo.get_config()
  config.data.more = ("a",)
  config.data.solution_template = "{solution}={a}"
  config.rollout.max_tokens = 10
  config.rollout.edits = [dict(name="jaxrl.rollouts.calibration:log_calibration")]
  read = dict(pattern=PATTERN, scale=999.0)
  config.reward.criteria = [
      dict(name="correct_and_formed", label="correct", **read),
      dict(name="well_formed", label="form", **read),
      dict(name="brier", label="calibration", **read),
      dict(name="confidence", **read)]
  weights = dict(form=0.5, correct=0.5, calibration=0.5)
  if variant == "rlvr":
    weights.pop("calibration")
  elif variant:
    raise ValueError(f"configs/methods/rlcr.py has no variant {variant!r}; it has 'rlvr'")
  config.reward.aggregate = dict(name="weighted_sum", weights=weights)
  config.advantage = [dict(name="center_by_group")]
  config.aggregation.kind = "token_mean"
  return config


def get_evidence():
  config = get_config()
  return dict(
      reported="HotpotQA accuracy / ECE 0.444 / 0.078, without confidence 0.460 / 0.540 (7B)",
      warm={"data.more": ("a",), "data.solution_template": config.data.solution_template,
            "rollout.max_tokens": config.rollout.max_tokens,
            "reward.criteria": [dict(config.reward.criteria[0])]},  # at its start it has no confidence
      overrides={"reward.criteria": [dict(c) for c in config.reward.criteria]},
      arms=dict(rlvr=dict(config="configs/methods/rlcr.py:rlvr")),
      claims=[
          dict(text="confidences are calibrated", metric="late/ece", expect="lower",
               baseline="rlvr"),
          dict(text="answers are as good", joint=True, metric="test/sampled_accuracy", expect="not lower",
               margin=0.02, baseline="rlvr")])
