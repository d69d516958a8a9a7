"""Humanline: a reference that follows closely, and token ratios to it that are clamped (arXiv:2509.24207).

Changes three things in GRPO: ratios are to the reference and not to the sampler (`anchor="reference"`), the
reference becomes a copy of the policy before every update (`config.reference`, `lag=True`), and log-ratios
are clamped before the loss, with no gradient beyond (`clamp`). The same goes with `dpo` and `kto`, which
have the argument too. Reported: offline DPO, KTO and GRPO with both match their online versions
(Llama-3-8B, AlpacaEval 2), and GRPO with 64 times fewer rounds of sampling its MATH500 (Qwen2.5-1.5B).
Small-scale check: tests/methods/test_humanline.py.

Choices made: the bounds are those of the public code, -1.0 and 1.5, and so is k = 1. In the runs that test
it, offline data are rollouts of a policy 16 updates old. The KL to the policy that the phase began with
(`start`, of `config.frozen`), which the reference no longer measures, is logged and not held.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.reference.update(every=1, lag=True)
  config.frozen = dict(start=dict())
  config.advantage = [dict(name="center_by_group"), dict(name="scale_by_group_std", epsilon=1e-2)]
  config.objective = [
      dict(name="clipped_surrogate", low=0.2, high=0.2, anchor="reference", clamp=(-1.0, 1.5)),
      dict(name="kl", beta=0.0, model="start")]
  return config


def get_evidence():
  own = get_config()
  plain = [dict(name="clipped_surrogate", low=0.2, high=0.2), dict(own.objective[1])]
  unclamped = {k: v for k, v in own.objective[0].items() if k != "clamp"}
  return dict(
      reported="offline GRPO with humanline as good as online GRPO (Llama-3-8B, Qwen2.5-1.5B)",
      overrides={"rollout.staleness": 16},
      arms=dict(
          stale=dict(overrides={"objective": plain}),
          online=dict(overrides={"objective": plain, "rollout.staleness": 0}),
          unclamped=dict(overrides={"objective": [unclamped, dict(own.objective[1])]})),
      claims=[
          dict(text="on old samples it does better than GRPO", metric="test/sampled_accuracy",
               expect="higher", baseline="stale"),
          dict(text="and as well as GRPO on fresh ones", joint=True, metric="test/sampled_accuracy",
               expect="not lower", margin=0.02, baseline="online"),
          dict(text="the clamp is worth something beside the reference that follows",
               metric="test/sampled_accuracy", expect="higher", baseline="unclamped")])
