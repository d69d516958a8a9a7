"""The loop of RLHF on words, with a gold reward that only evaluations see (arXiv:2210.10760).

Stages, each a run of its own; `python scripts/rlhf_toy.py` runs them all and draws the curve of
over-optimisation, proxy and gold reward over the KL to the start:

  configs/rlhf_toy.py:start           a policy imitates words that hold few of the wanted letter
  configs/rlhf_toy.py:bradley_terry   a reward model from noisy comparisons of such words
  configs/rlhf_toy.py:beta            the same with a Beta belief (arXiv:2602.08819)
  configs/rlhf_toy.py:policy          GRPO against a reward model, which
                                      --config.reward.criteria[1].run=WORKDIR names
"""

from configs import base

STAGES = ("start", "bradley_terry", "beta", "policy")


def get_config(stage: str = "start"):
  if stage not in STAGES:
    raise ValueError(f"configs/rlhf_toy.py has no stage {stage!r}; there are {', '.join(STAGES)}")
  config = base.get_config()
  config.data.train = config.data.validation = config.data.test = "task:letters"
  config.data.max_prompt_tokens = config.data.max_completion_tokens = 16
  config.tokenizer.alphabet = "abcdefgh:"
  config.model.update(layers=2, d_model=64, heads=4, kv_heads=4, d_ff=192)
  config.batch.row_length = 64
  config.optimizer.update(learning_rate=1e-3, b2=0.99, warmup_steps=10)
  config.rollout.update(prompts=32, episode=dict(name="group", samples=8), max_tokens=12)
  config.evaluate.update(problems=0, pairs=500)
  if stage == "start":
    config.phases = ("sft",)
    config.sft = dict(kind="sft", steps=200, batch=dict(examples=128),
                      objective=[dict(name="cross_entropy")])
  elif stage == "policy":
    config.phases = ("rl",)
    config.reward.criteria = [dict(label="gold", name="jaxrl.tasks.letters:gold"),
                              dict(label="proxy", name="reward_model", run="")]
    config.reward.aggregate = dict(name="weighted_sum", weights=dict(proxy=1.0))
    # The coefficient is 0: the distance to the start is measured and not held.
    config.rl = dict(
        kind="rl", steps=200, optimizer=dict(learning_rate=1e-4), aggregation=dict(kind="sequence_mean"),
        objective=[dict(name="clipped_surrogate", low=0.2, high=0.2), dict(name="kl", beta=0.0)])
  else:
    config.phases = ("comparisons",)
    config.data.task_size = 20_000
    config.model.heads_on_top = (("score", 1), ("confidence", 1))
    loss = (dict(name="bradley_terry") if stage == "bradley_terry" else
            dict(name="beta_preference", weight=0.1))
    config.comparisons = dict(
        kind="reward", steps=300, batch=dict(examples=64), objective=[loss],
        optimizer=dict(learning_rate=5e-4), aggregation=dict(kind="sequence_mean"))
  return config
