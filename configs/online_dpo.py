"""Online DPO on addition: pairs are built from rollouts by a reward (arXiv:2402.04792).

A warm start, then of 8 samples to a problem the best is preferred to the worst
(`rollouts.edits.best_and_worst`), against the reference that the policy was when the phase began. Any
criteria of `config.reward` may judge, a trained reward model among them, and any term of
`jaxrl.objectives.preference` may stand in `objective`; `kto` needs the edit `mismatch_answers` too.
Problems whose samples are all as good teach nothing and are drawn anew (`filter_zero_variance`).
"""

from configs import quickstart


def get_config():
  config = quickstart.get_config()
  config.rl.rollout = dict(edits=[dict(name="best_and_worst")])
  config.rl.advantage = []
  config.rl.objective = [dict(name="dpo", beta=0.1)]
  config.rl.aggregation = dict(kind="sequence_mean")
  config.rl.steps, config.rl.until = 100, None
  return config
