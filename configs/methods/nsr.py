"""NSR, PSR and W-REINFORCE: learn from wrong answers, or from right ones, alone (arXiv:2506.01347).

`nsr.py` keeps wrong answers only and pushes all of them down alike; `nsr.py:psr` keeps right answers
only; `nsr.py:w_reinforce` keeps all, right ones at a tenth. Changes three things in GRPO: the
advantage is a constant of the verdict (`advantages.weigh_verdicts`), sequences of the other verdict
leave the batch (the edit `keep`), and every token counts the same, with a small bonus for entropy;
four updates on each batch (the paper's are on quarters of it). Reported (Qwen2.5-Math-7B), pass@1 /
pass@256 on MATH: PSR 74.1 / 91.2, NSR 75.7 / 96.9, W-REINFORCE 76.6 / 96.7, GRPO 76.3 / 95.5. Small-scale
check: tests/methods/test_nsr.py.

The row asks on Countdown, where a problem has many right answers, how many problems are solved within 16
samples and how many right answers 32 samples hold. All arms have as many updates; the card compares them at
the same pass@1, which they do not come to have. The warm start gets two fifths right greedily, the paper's
model 63% of samples.
"""

from configs import grpo, countdown

KEPT = {"": [dict(name="keep", below=0.5)], "psr": [dict(name="keep", at_least=0.5)],
        "w_reinforce": []}
RIGHT = {"": 0.0, "psr": 1.0, "w_reinforce": 0.1}


def get_config(variant: str = ""):
  if variant not in KEPT:
    raise ValueError(f"configs/methods/nsr.py has no variant {variant!r}; it has 'psr' and "
                     "'w_reinforce'")
  config = grpo.get_config()
  config.rollout.edits = KEPT[variant]
  config.rollout.updates = 4
  config.advantage = [dict(name="weigh_verdicts", right=RIGHT[variant], wrong=-1.0)]
  config.objective = [dict(name="clipped_surrogate", low=0.2, high=0.2),
                      dict(name="entropy", coefficient=0.001)]
  config.aggregation.kind = "token_mean"
  return config


def get_evidence():
  return dict(
      reported="MATH pass@1 / pass@256: NSR 75.7 / 96.9, GRPO 76.3 / 95.5, PSR 74.1 / 91.2 (7B)",
      warm={**countdown.TASK, "sft.until.at_least": 0.4},
      overrides={"evaluate.samples": 32, "evaluate.k": 16, "rl.evaluate.every": 50},
      arms=dict(
          grpo=dict(config="configs/grpo.py", overrides={"rollout.updates": 4}),
          psr=dict(config="configs/methods/nsr.py:psr"),
          w_reinforce=dict(config="configs/methods/nsr.py:w_reinforce")),
      claims=[
          dict(text="more problems are solved within 16 samples", metric="test/pass_at_16",
               expect="higher", baseline="grpo"),
          dict(text="and more than when right answers alone are learned from",
               metric="test/pass_at_16", expect="higher", baseline="psr"),
          dict(text="32 samples hold more different right answers", metric="test/distinct_right",
               expect="higher", baseline="grpo"),
          dict(text="with right answers at a tenth, more problems are solved within 16 samples",
               method="w_reinforce", metric="test/pass_at_16", expect="higher", baseline="grpo"),
          dict(text="and samples hold more different right answers", method="w_reinforce",
               metric="test/distinct_right", expect="higher", baseline="grpo")])
