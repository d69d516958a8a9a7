"""PPO: a critic gives every token its own baseline (arXiv:1707.06347, arXiv:1909.08593).

`ppo.py` has a critic of its own, which begins as a copy of the policy; `ppo.py:shared` a value head
on the policy. Advantages are `advantages.gae`, whitened over the batch; the critic fits its returns
with `objectives.value_loss`; the KL to the warm start is in the reward of every token.
"""

from configs import grpo


def get_config(variant: str = ""):
  config = grpo.get_config()
  config.advantage = [dict(name="penalise_kl", beta=0.01, level="token"),
                      dict(name="gae", gamma=1.0, lam=0.95), dict(name="whiten_tokens")]
  config.objective = [dict(name="clipped_surrogate", low=0.2, high=0.2),
                      dict(name="value_loss", coefficient=0.5, clip=0.2)]
  config.aggregation.kind = "token_mean"
  config.rollout.update(updates=2, episode=dict(name="group", samples=1), prompts=256)
  if variant == "shared":
    config.model.heads_on_top = (("value", 1),)
  elif variant:
    raise ValueError(f"configs/ppo.py has no variant {variant!r}; it has 'shared'")
  else:
    config.model.critic = True
  return config
